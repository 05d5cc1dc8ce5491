"""Decides whether experts in CPU memory may be copied to GPUs in a step of a prompt, and how many at once.

Which are copied is decided in each step, layer by layer, when the routing is known
(runtime_lib/src/gpu/stream_split.h): this pass gives it the rates to decide by; place has reserved the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hetcomp.hardware.figures import Gpu
from hetcomp.ir.annotations import Curve, ExpertStream, StreamRates
from hetcomp.ir.deferral import MoeLayer, experts_on_cpu, moe_layers
from hetcomp.ir.homes import memory_of, number
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, ValueKind
from hetcomp.passes.adapter_memory import pair_bytes
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import gpu_time, joint_gb_per_s, link_gb_per_s
from hetcomp.passes.expert_time import expert_cpu_us, expert_gpu_us, expert_work
from hetcomp.passes.gpu_room import rooms_of_gpus, taken_on
from hetcomp.passes.memory_table import GPU_RESERVE, workspace_estimate
from hetcomp.passes.phases import Phase
from hetcomp.passes.registry import plan_pass
from hetcomp.passes.step_placement import moved_to
from hetcomp.passes.work import Work, work_of

# Memory for experts on their way is worth no more than this part of the GPU's: what it holds is used in prompts only,
# resident experts in decode as well.
_STREAM_PART = 8
# Of a layer's experts at once: with fewer (unless it has fewer) its waves would be many launches of little work.
_LEAST_SLOTS = 8
# Between powers of two where curves have steps (hetcomp/profiler/kernel_cases.py).
_EXPERT_TOKENS = (1, 2, 4, 8, 12, 13, 16, 24, 25, 32, 48, 63, 64, 128, 256, 512, 1024)
_STEP_TOKENS = (32, 128, 512, 2048, 8192)


@plan_pass(requires=("sliced",))
def stream_experts(plan: Plan, context: Context) -> Plan:
    """Sets ``stream`` where GPUs make the input of experts that the CPU has, each of them has memory for slots, and
    every expert lies in one piece (on one NUMA node)."""
    if context.planning or not context.use_gpus:
        return plan
    if plan.disk is not None:
        note = "experts are not streamed to GPUs in prefill: memory that GPUs copy from must hold them all"
        return replace(plan, notes=(*plan.notes, note))
    found = [layer for layer in moe_layers(plan) if layer.hands_over]
    homes = {memory_of(s.placement.device) for s in found}
    rooms = ((f"gpu:{i}", room) for i, room in enumerate(rooms_of_gpus(context)))
    slots = min((_slots_on(plan, context, gpu, room) for gpu, room in rooms if gpu in homes), default=0)
    if not slots:
        return plan
    if any(len(s.placement.slices) > 1 for s in found):
        note = "experts are not streamed to the GPU in prefill: each is cut over several NUMA nodes"
        return replace(plan, notes=(*plan.notes, note))
    gpu = context.profile.gpus[0]
    first = found[0]
    spines = _spines_us(plan, context, found)
    stream = ExpertStream(slots, _rates(plan, context, gpu, first.op, first.template), spines)
    most = max(sum(experts_on_cpu(layer.placement)) for layer in found)
    note = (
        f"prompts: up to {most} experts of a layer are streamed to {', '.join(sorted(homes))}, in waves of {slots} "
        f"({stream.ring} slots, {stream.ring * largest_expert(plan, context) / 1e9:.2f} GB)"
    )
    return replace(plan, stream=stream, notes=(*plan.notes, note))


def _slots_on(plan: Plan, context: Context, gpu: str, room: int) -> int:
    """Half of the slots of ``gpu`` for experts on their way, within its ``room`` bytes and beside what lies on it."""
    slots = stream_slots(plan, context, room)
    free = max(0, room - taken_on(plan, context, gpu)) // (2 * max(1, largest_expert(plan, context)))
    return slots if slots <= free else free if free >= _LEAST_SLOTS else 0


def stream_slots(plan: Plan, context: Context, room: int) -> int:
    """Experts of a layer that may be computed at once within a GPU's ``room`` bytes, while as many are on their way; 0:
    none."""
    ops = [(op, t) for t in plan.templates for op in t.ops if isinstance(op.attrs, MoeExperts)]
    if not ops:
        return 0
    most = max(op.attrs.experts for op, _ in ops if isinstance(op.attrs, MoeExperts))
    part = max(0, room - GPU_RESERVE) // _STREAM_PART
    slots = min(most, part // (2 * max(1, largest_expert(plan, context))))
    return slots if slots >= min(_LEAST_SLOTS, most) else 0


def stream_bytes(plan: Plan, context: Context, room: int) -> int:
    """What the slots take of the GPU."""
    return 2 * stream_slots(plan, context, room) * largest_expert(plan, context)


def stream_reserves(plan: Plan, context: Context, rooms: Sequence[int]) -> list[int]:
    """What experts on their way take of each GPU's ``rooms``: nothing where these have room for everything."""
    stored = [v for v in plan.values if v.kind in (ValueKind.WEIGHT, ValueKind.CONST)]
    pool = KvPool.of(plan.max_dims())
    states = sum(pool.gpu_bytes(v.type) for v in plan.values if v.kind is ValueKind.STATE)
    everything = sum(context.target.packed_bytes(v) for v in stored) + states
    everything += sum(pair_bytes(plan, context).values())
    of_each = pool.granule_waste + workspace_estimate(plan) + GPU_RESERVE
    if everything <= sum(max(0, room - of_each) for room in rooms):
        return [0] * len(rooms)
    return [stream_bytes(plan, context, room) for room in rooms]


def largest_expert(plan: Plan, context: Context) -> int:
    """Bytes of the plan's largest expert."""
    return max(
        (expert_bytes(op, t, context) for t in plan.templates for op in t.ops if isinstance(op.attrs, MoeExperts)),
        default=0,
    )


def expert_bytes(op: Op, template: Template, context: Context) -> int:
    """Bytes of one of the op's experts."""
    assert isinstance(op.attrs, MoeExperts)
    values = [template.value(name) for name in op.inputs]
    return sum(context.target.packed_bytes(v) for v in values if v.kind is ValueKind.WEIGHT) // op.attrs.experts


def _rates(plan: Plan, context: Context, gpu: Gpu, op: Op, template: Template) -> StreamRates:
    size = float(expert_bytes(op, template, context))
    values = template.value_map()

    def curve(us: Callable[[float, Phase], float]) -> Curve:
        return tuple((n, us(float(n), _prompt(n))) for n in _EXPERT_TOKENS)

    def work(tokens: float, step: Phase) -> Work:
        return expert_work(op, work_of(op, values, step, context.target), size, tokens)

    return StreamRates(
        link_gb_per_s=link_gb_per_s(gpu),
        joint_gb_per_s=max(link_gb_per_s(gpu), joint_gb_per_s(context.profile)),
        cpu_expert_us=curve(lambda n, step: expert_cpu_us(op, work(n, step), step, context)),
        gpu_expert_us=curve(lambda n, step: expert_gpu_us(op, work(n, step), step, gpu)),
    )


def _prompt(tokens: int) -> Phase:
    """A step of a prompt from its beginning."""
    return Phase("prefill", tokens, 1, tokens)


def _spines_us(plan: Plan, context: Context, found: Sequence[MoeLayer]) -> tuple[Curve, ...]:
    by_step = [_spines(plan, context, found, _prompt(n)) for n in _STEP_TOKENS]
    return tuple(tuple(zip(_STEP_TOKENS, of_layer, strict=True)) for of_layer in zip(*by_step, strict=True))


def _spines(plan: Plan, context: Context, found: Sequence[MoeLayer], step: Phase) -> list[float]:
    """What GPUs do before each of the layers, behind the last one on its GPU."""
    streaming = {(layer.call, layer.op.id) for layer in found}
    times: dict[tuple[str, str, str], float] = {}
    since: dict[str, float] = dict.fromkeys((layer.placement.device for layer in found), 0.0)
    spines = []
    for index, call in enumerate(plan.calls):
        template, placements = plan.template(call.template), dict(call.placements)
        for op in template.ops:
            placement = placements[op.id]
            if (index, op.id) in streaming:
                spines.append(since[placement.device])
                since[placement.device] = 0.0
                continue
            gpu = moved_to(plan, placement, step) or memory_of(placement.device)
            if gpu == "cpu":
                continue
            key = (template.name, op.id, gpu)
            if key not in times:
                own = work_of(op, template.value_map(), step, context.target)
                times[key] = gpu_time(op, own, step, context.profile.gpus[number(gpu)]).us
            since = {of: us + times[key] for of, us in since.items()}
    return spines
