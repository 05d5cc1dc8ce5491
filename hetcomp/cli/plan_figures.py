"""The figures that the plan's terminal, JSON and HTML reports share: roofs, op classes under them, memory by device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends.adapted_ops import pair_bytes, shape_of
from hetcomp.backends.gpu.pair_layout import PairLayout
from hetcomp.backends.packing import packed_bytes
from hetcomp.cli.plan_placement import homes, placed_ops
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.adaptable import adaptable_weights
from hetcomp.ir.annotations import Placement
from hetcomp.ir.deferral import experts_on_cpu, whole_role
from hetcomp.ir.events import Event
from hetcomp.ir.kv_pool import CHECKPOINTS, KvPool
from hetcomp.ir.plan import Op, Plan, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.passes.device_time import GPU_READS, gpu_tflops
from hetcomp.passes.memory_table import GPU_RESERVE, usable_bytes
from hetcomp.passes.phases import Phase, phases
from hetcomp.passes.placement_problem import STAGED_EXPERTS
from hetcomp.prediction import trace

KV_CACHE, RECURRENT, WORKSPACE = "KV cache", "states of recurrences", "activations"
RING, GPU_RUNTIME = "ring for streamed experts", "GPU runtime (reserved)"
WEIGHT_RING = "ring for streamed weights"
CACHE = "slots of the expert cache"
ADAPTERS = "room for LoRA adapters"


@dataclass(frozen=True)
class Step:
    """One simulated step: what every lane does when."""

    phase: Phase
    events: tuple[Event, ...]

    @property
    def total_us(self) -> float:
        """End of the last event."""
        return max((e.start_us + e.us for e in self.events), default=0.0)


@dataclass(frozen=True)
class Roof:
    """What a device can give kernels of one weight format: 10^9 FLOP/s and 10^9 bytes/s of its own memory.
    ``device``: ``cpu`` (all nodes together) or ``gpu:N``."""

    device: str
    name: str
    weight_format: str
    gflops: float
    gb_per_s: float

    @property
    def ridge(self) -> float:
        """FLOP a byte above which arithmetic is the limit, below which memory is."""
        return self.gflops / self.gb_per_s

    def limit(self, intensity: float) -> str:
        """``memory`` or ``compute``: what bounds work of that many FLOP a byte."""
        return "memory" if intensity < self.ridge else "compute"


@dataclass(frozen=True)
class ClassPoint:
    """An op class on a device in a phase: FLOP a byte moved, the 10^9 FLOP/s that the prediction gives it, and the
    microseconds that it occupies the device in a step."""

    device: str
    role: str
    phase: str
    intensity: float
    gflops: float
    us: float


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device by what they are for, and how many a plan may use there (None: not known)."""

    device: str
    name: str
    parts: tuple[tuple[str, int], ...]
    limit: int | None

    @property
    def bytes(self) -> int:
        """Sum of the parts."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class Figures:
    """All of a plan on its machine; ``place_seconds`` is the time that the placement took to find, where known."""

    profile: HardwareProfile
    steps: tuple[Step, ...]
    roofs: tuple[Roof, ...]
    points: tuple[ClassPoint, ...]
    memory: tuple[DeviceMemory, ...]
    place_seconds: float | None = None


def figures_of(
    plan: Plan,
    profile: HardwareProfile,
    *,
    isa: str | None = None,
    shares: Sequence[Sequence[float]] | None = None,
    vram: int | tuple[int, ...] | None = None,
    place_seconds: float | None = None,
) -> Figures:
    """The figures of a finished plan.

    isa: instruction set of the program (None: the profile's best). shares[layer][expert]: how often experts are chosen,
    MoE layers in order (None: equally often). vram: as in :func:`device_memory`.
    """
    steps = simulated_steps(plan, profile, isa)
    return Figures(
        profile,
        steps,
        roofs(plan, profile, isa),
        class_points(plan, steps, shares),
        device_memory(plan, profile, vram),
        place_seconds,
    )


def simulated_steps(plan: Plan, profile: HardwareProfile, isa: str | None) -> tuple[Step, ...]:
    """One decode step and one prefill chunk of the plan's mix; nothing before the plan is simulated."""
    if not plan.timelines:
        return ()
    wanted = phases(plan)
    decode = next((p for p in wanted if p.steps > 0), wanted[0])
    return tuple(Step(p, trace(plan, profile, p, isa)) for p in dict.fromkeys((decode, wanted[-1])))


def main_format(plan: Plan) -> str:
    """The format of most bytes of weights."""
    sizes: Counter[str] = Counter()
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT and value.format is not None:
            sizes[value.format] += packed_bytes(value)
    return sizes.most_common(1)[0][0] if sizes else "bf16"


def roofs(plan: Plan, profile: HardwareProfile, isa: str | None) -> tuple[Roof, ...]:
    """The roof of the CPU and of every GPU that the plan uses, for the plan's main format."""
    form = main_format(plan)
    nodes = [n.id for n in profile.compute_nodes]
    fraction = profile.rate(form, isa).bandwidth_fraction
    flops = sum(profile.gflops(form, node, isa) for node in nodes)
    found = [Roof("cpu", profile.cpu, form, flops, sum(map(profile.bandwidth, nodes)) * fraction)]
    used = _used_gpus(plan)
    for i, gpu in enumerate(profile.gpus):
        if f"gpu:{i}" in used and (roof := _gpu_roof(i, gpu, form)) is not None:
            found.append(roof)
    return tuple(found)


def _gpu_roof(index: int, gpu: Gpu, form: str) -> Roof | None:
    if gpu.gb_per_s is None:
        return None
    try:
        rate = gpu_tflops(gpu, form) * 1e3
    except HetcompError:
        return None
    reads = gpu.gb_per_s * (1.0 if gpu.source is Source.MEASURED else GPU_READS)
    return Roof(f"gpu:{index}", gpu.name, form, rate, reads)


def _used_gpus(plan: Plan) -> set[str]:
    devices = {p.device for call in plan.calls for _, p in call.placements}
    runs = [run for call in plan.calls for _, p in call.placements for run in p.experts]
    devices |= {run.device for run in runs} | {run.streamed_to for run in runs if run.streamed_to}
    return {d for d in devices if d.startswith("gpu:")}


def class_points(
    plan: Plan, steps: Sequence[Step], shares: Sequence[Sequence[float]] | None = None
) -> tuple[ClassPoint, ...]:
    """Op classes that compute, by device, most time first.

    ``shares[layer][expert]``: how often experts are chosen, MoE layers in order (None: equally often); it divides the
    FLOPs of an expert op over the devices.
    """
    found = []
    for step in steps:
        flops, whole, moved = _step_work(plan, step.phase, shares)
        for (device, role), us in _busy(step.events).items():
            done = flops.get((device, role), 0.0)
            if done > 0 and us > 0 and moved[role] > 0:
                rate = done / us / 1e3
                found.append(ClassPoint(device, role, step.phase.name, whole[role] / moved[role], rate, us))
    return tuple(sorted(found, key=lambda p: -p.us))


def _step_work(
    plan: Plan, step: Phase, shares: Sequence[Sequence[float]] | None
) -> tuple[Mapping[tuple[str, str], float], Mapping[str, float], Mapping[str, float]]:
    """FLOPs by device and role, FLOPs by role, bytes moved by role."""
    flops: dict[tuple[str, str], float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    layer = 0
    for _, op, placement in placed_ops(plan):
        if op.cost is None:
            continue
        cost, role = op.cost.phase(step.name), op.role or op.kind
        whole[role] += cost.flops
        moved[role] += cost.weight_bytes + cost.act_bytes + cost.state_bytes
        for device, share in _run_shares(placement, step, shares[layer] if shares and placement.experts else None):
            flops[device, role] += cost.flops * share
        layer += bool(placement.experts)
    return flops, whole, moved


def _run_shares(placement: Placement, step: Phase, chosen: Sequence[float] | None) -> list[tuple[str, float]]:
    """Devices that run the op in that step and their part of its work."""
    if not placement.experts:
        return [(_kind(placement.device), 1.0)]
    count = placement.experts[-1].last + 1
    weights = list(chosen) if chosen is not None else [1.0] * count
    parts = []
    for run in placement.experts:
        streamed = run.streamed_to if step.tokens > step.sequences else None
        parts.append((_kind(streamed or run.device), sum(weights[run.first : run.last + 1]) / sum(weights)))
    return parts


def _busy(events: Sequence[Event]) -> dict[tuple[str, str], float]:
    """Time that roles occupy devices; CPU nodes work side by side, so that the longest of them counts."""
    lanes: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if " copy " not in event.lane:
            lanes[event.lane, whole_role(event.role)] += event.us
    found: dict[tuple[str, str], float] = {}
    for (lane, role), us in lanes.items():
        key = (_kind(lane), role)
        found[key] = max(found.get(key, 0.0), us)
    return found


def _kind(device: str) -> str:
    return "cpu" if device.startswith("cpu") else device


def device_memory(
    plan: Plan, profile: HardwareProfile | None, vram: int | tuple[int, ...] | None = None
) -> tuple[DeviceMemory, ...]:
    """Weights by role and format, KV cache and workspace of every device that holds something.

    ``vram``: bytes that may be used of each GPU, or one figure a GPU (None: what is free).
    """
    parts: dict[str, Counter[str]] = defaultdict(Counter)
    largest_expert, streams, rings = 0, set(), set()
    values, seen, pool = plan.value_map(), set(), KvPool.of(plan.max_dims())
    room, changeable = plan.adapter_room, adaptable_weights(plan)
    for call, op, placement in placed_ops(plan):
        actual = dict(zip(plan.template(call.template).params, call.args, strict=True))
        streams |= {run.streamed_to for run in placement.experts if run.streamed_to}
        if plan.stream is not None and any(experts_on_cpu(placement)):
            rings.add(placement.device)
        experts = 0
        for name in op.inputs:
            value = values.get(actual.get(name, ""))
            if value is None:
                continue
            if value.kind in (ValueKind.WEIGHT, ValueKind.CONST) and value.format is not None:
                experts += packed_bytes(value)
            if value.id in seen:
                continue
            seen.add(value.id)
            if value.kind in (ValueKind.WEIGHT, ValueKind.CONST) and value.format is not None:
                _spread(parts, _label(op, value.format), packed_bytes(value), homes(op, placement))
                if room is not None and value.id in changeable:
                    size = room.count * sum(pair_bytes(shape_of(value), room.rank))
                    for device, share in homes(op, placement).items():
                        parts[device][ADAPTERS] += round(size * share) if device.startswith("cpu") else 0
            elif value.kind is ValueKind.STATE:
                kind = KV_CACHE if value.type.is_cache else RECURRENT
                parts[placement.device][kind] += pool.bytes(value.type, placement.device)
        if placement.experts:
            largest_expert = max(largest_expert, experts // (placement.experts[-1].last + 1))
    for gpu in _used_gpus(plan):
        if parts[gpu][KV_CACHE]:
            parts[gpu][KV_CACHE] += pool.granule_waste
        parts[gpu][GPU_RUNTIME] += GPU_RESERVE
        if (pairs := PairLayout.of(plan, gpu)) is not None:
            parts[gpu][ADAPTERS] += pairs.pair_bytes + pairs.table_bytes
        if gpu in streams:
            parts[gpu][RING] += 2 * STAGED_EXPERTS * largest_expert
        if plan.stream is not None and gpu in rings:
            parts[gpu][RING] += plan.stream.ring * largest_expert
        if plan.weight_stream is not None and gpu in plan.weight_stream.gpus:
            parts[gpu][WEIGHT_RING] += plan.weight_stream.ring_bytes
        if plan.expert_cache is not None and (cache := plan.expert_cache.on(gpu)) is not None:
            parts[gpu][CACHE] += cache.bytes
    main = next((p.device for _, _, p in placed_ops(plan) if p.device.startswith("cpu")), "cpu:0")
    recurrent = [v.type for v in plan.values if v.kind is ValueKind.STATE and not v.type.is_cache]
    parts[main][RECURRENT] += CHECKPOINTS * sum(map(pool.cpu_bytes, recurrent))
    for device in [d for d in parts if d.startswith("gpu") or d == main]:
        parts[device][WORKSPACE] += plan.arena_bytes
    return tuple(_device_memory(d, parts[d], profile, vram) for d in sorted(parts))


def _label(op: Op, form: str) -> str:
    return f"{weight_role(op)}, {form}"


def _spread(parts: dict[str, Counter[str]], what: str, size: int, shares: Mapping[str, float]) -> None:
    """Whole bytes on every device, summing to ``size``."""
    left = size
    for i, (device, share) in enumerate(shares.items()):
        part = left if i == len(shares) - 1 else round(size * share)
        parts[device][what] += part
        left -= part


def _device_memory(
    device: str, parts: Counter[str], profile: HardwareProfile | None, vram: int | tuple[int, ...] | None
) -> DeviceMemory:
    name, limit = device, None
    kind, _, number = device.partition(":")
    if profile is not None and kind == "cpu":
        name, limit = profile.cpu, profile.node(int(number)).available_bytes
    elif profile is not None and int(number) < len(profile.gpus):
        gpu = profile.gpus[int(number)]
        name, limit = gpu.name, usable_bytes(gpu, int(number), vram)
    ordered = sorted(parts.items(), key=lambda item: (_ORDER.get(item[0], 0), -item[1]))
    return DeviceMemory(device, name, tuple((what, size) for what, size in ordered if size), limit)


_ORDER = {KV_CACHE: 1, RECURRENT: 1, WORKSPACE: 2, CACHE: 3, RING: 4, WEIGHT_RING: 4, ADAPTERS: 5, GPU_RUNTIME: 6}


def layer_us(events: Sequence[Event]) -> dict[int, float]:
    """Microseconds by which each layer holds the step up: from the end of the layer before it to its own."""
    ends: dict[int, float] = defaultdict(float)
    starts: dict[int, float] = {}
    for event in events:
        if event.layer is not None:
            ends[event.layer] = max(ends[event.layer], event.start_us + event.us)
            starts[event.layer] = min(starts.get(event.layer, event.start_us), event.start_us)
    found, before = {}, None
    for layer in sorted(ends):
        start = starts[layer] if before is None else before
        found[layer] = max(0.0, ends[layer] - start)
        before = max(ends[layer], start)
    return found
