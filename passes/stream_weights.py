"""Decides which linear layers of the CPU a GPU runs in long steps of a prompt, with weights that are copied to it.

A token that is generated reads a weight once, faster from the CPU's memory than over the link. A step of many tokens
computes with it: the GPU does that in less time than a CPU, and the copy is made under what is computed before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from hetcomp.ir import ops
from hetcomp.ir.annotations import WeightStream
from hetcomp.ir.flat_ops import FlatOp, flat_ops
from hetcomp.ir.homes import CPU, memory_of, number, read_in
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind
from hetcomp.ir.step_rows import decode_rows, prompt_rows
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import cpu_time, link_gb_per_s
from hetcomp.passes.gpu_room import rooms_of_gpus, taken_on
from hetcomp.passes.memory_table import GPU_RESERVE, workspace_estimate
from hetcomp.passes.phases import Phase
from hetcomp.passes.placement_groups import SMALL_BYTES
from hetcomp.passes.registry import plan_pass
from hetcomp.passes.stream_experts import stream_reserves
from hetcomp.passes.work import work_of

# The ring is worth no more than this part of a GPU's memory: what else lies there serves every token.
_RING_PART = 8
_ALIGNMENT = 256  # of a weight in the ring
_STORED = (ValueKind.WEIGHT, ValueKind.CONST)
_STAYS = (ops.Embed, ops.MoeExperts, ops.Transfer)  # an embedding is looked up, experts have a stream of their own


@plan_pass(requires=("sliced",))
def stream_weights(plan: Plan, context: Context) -> Plan:
    """Sets ``in_prompts`` of the CPU's ops, and ``weight_stream``, where a GPU alone reads what they make, their
    weights lie in one piece (on one NUMA node), it has memory for a ring, and steps of a prompt gain."""
    if context.planning or not context.use_gpus or plan.disk is not None:
        return plan
    moved = _Moved.of(plan, context)
    if not moved.bytes:
        return plan
    gpus = tuple(sorted(set(moved.ops.values())))
    rooms = rooms_of_gpus(context)
    for gpu in gpus:
        room = rooms[number(gpu)]
        free = room - taken_on(plan, context, gpu) - sum(stream_reserves(plan, context, [room]))
        if moved.ring > min(room // _RING_PART, free):
            return plan
    tokens = _least_tokens(plan, context, moved)
    if tokens is None:
        return plan
    calls = list(plan.calls)
    for index, call in enumerate(calls):
        placements = tuple((op, replace(p, in_prompts=moved.ops.get((index, op), ""))) for op, p in call.placements)
        calls[index] = replace(call, placements=placements)
    note = (
        f"prompts: in steps of {tokens} tokens and more {', '.join(gpus)} also runs {moved.bytes / 1e9:.2f} GB of "
        f"weights of the CPU, which come through {moved.ring / 1e6:.0f} MB"
    )
    stream = WeightStream(tokens, moved.ring, moved.bytes, gpus)
    return replace(plan, calls=tuple(calls), weight_stream=stream, notes=(*plan.notes, note))


def ring_reserves(plan: Plan, context: Context, rooms: Sequence[int], streams: Sequence[int]) -> list[int]:
    """What weights on their way take of each GPU's ``rooms``: nothing where these have room for all but experts beside
    what ``streams`` of these need, or where a ring is too large a part of one."""
    if context.planning:
        return [0] * len(rooms)
    largest = max((size for t in plan.templates for size in _grouped(t, t.ops, context).values()), default=0)
    others = _not_dense(plan)
    fixed = [v for v in plan.values if v.kind in _STORED and v.id not in others]
    pool = KvPool.of(plan.max_dims())
    needed = sum(context.target.packed_bytes(v) for v in fixed)
    needed += sum(pool.gpu_bytes(v.type) for v in plan.values if v.kind is ValueKind.STATE)
    of_each = pool.granule_waste + workspace_estimate(plan) + GPU_RESERVE
    if needed <= sum(max(0, room - of_each - stream) for room, stream in zip(rooms, streams, strict=True)):
        return [0] * len(rooms)
    return [2 * largest if 2 * largest <= room // _RING_PART else 0 for room in rooms]


def _not_dense(plan: Plan) -> set[str]:
    """Ids of weights that are never streamed as dense ones are."""
    found: set[str] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            if isinstance(op.attrs, _STAYS):
                found |= {actual[name] for name in op.inputs if name in actual}
    return found


def _grouped(template: Template, some: Sequence[Op], context: Context) -> Mapping[tuple[str, ...], int]:
    """Bytes of the weights of those ops that may be streamed, by what they multiply: a GPU may run them in one launch,
    for which all of them must be there."""
    values = template.value_map()
    sizes: dict[tuple[str, ...], int] = defaultdict(int)
    for op in some:
        if not _may_move(op, values):
            continue
        acts = tuple(n for n in op.inputs if values[n].kind is ValueKind.ACT)
        weights = [values[n] for n in op.inputs if values[n].kind in _STORED]
        sizes[acts] += sum(_aligned(context.target.packed_bytes(v)) for v in weights)
    return sizes


def _may_move(op: Op, values: Mapping[str, Value]) -> bool:
    """Whether its weights may be copied in a step: it has a row for each token and no memory of earlier ones."""
    if isinstance(op.attrs, _STAYS) or any(values[n].kind is ValueKind.STATE for n in op.inputs):
        return False
    acts = [values[n] for n in (*op.inputs, *op.outputs) if values[n].kind is ValueKind.ACT]
    made = [values[n] for n in op.outputs]
    return all(v.type.shape[0] == "T" for v in acts) and all(v.kind is ValueKind.ACT for v in made)


@dataclass(frozen=True)
class _Moved:
    """The CPU's ops that a GPU runs in prompts, by call and id: which one. ``bytes`` of their weights; ``ring``: of
    memory in which any two groups of them that follow each other have room."""

    ops: Mapping[tuple[int, str], str]
    bytes: int
    ring: int

    @staticmethod
    def of(plan: Plan, context: Context) -> _Moved:
        flat, values = flat_ops(plan)
        closed = _closed(flat, values, _candidates(plan, context, flat))
        sizes = _copied(plan, context, flat, closed)
        moved = _worth_it(flat, closed, sizes)
        found = {(flat[i].call, flat[i].id): gpu for i, gpu in moved.items()}
        largest = 0
        for index, call in enumerate(plan.calls):
            template = plan.template(call.template)
            mine = [op for op in template.ops if (index, op.id) in found]
            largest = max(largest, *_grouped(template, mine, context).values(), 0) if mine else largest
        return _Moved(found, sum(sizes[i] for i in moved), 2 * largest)


def _copied(plan: Plan, context: Context, flat: Sequence[FlatOp], moved: Mapping[int, str]) -> dict[int, int]:
    """Bytes of each of the ops' weights that are not on its GPU anyway."""
    readers, values = read_in(plan), plan.value_map()
    stored = {v.id: context.target.packed_bytes(v) for v in values.values() if v.kind in _STORED}
    return {
        i: sum(stored[name] for name in flat[i].op.inputs if name in stored and gpu not in readers[name])
        for i, gpu in moved.items()
    }


def _candidates(plan: Plan, context: Context, flat: Sequence[FlatOp]) -> dict[int, str]:
    """By place in the step, the CPU's ops that a GPU has code for, and the GPU that works next to them."""
    may: dict[tuple[str, str], bool] = {}
    near = [memory_of(f.placement.device) for f in flat]
    last = next((m for m in near if m != CPU), None)
    found: dict[int, str] = {}
    for i, f in enumerate(flat):
        last = near[i] if near[i] != CPU else last
        if near[i] != CPU or last is None or len(f.placement.slices) > 1:
            continue
        template = plan.template(plan.calls[f.call].template)
        key = (template.name, f.id)
        if key not in may:
            op = next(op for op in template.ops if op.id == f.id)
            may[key] = _may_move(op, template.value_map()) and context.target.gpu_refusal(op, template) is None
        if may[key]:
            found[i] = last
    return found


def _closed(flat: Sequence[FlatOp], values: Mapping[str, Value], candidates: Mapping[int, str]) -> dict[int, str]:
    """Those of the candidates whose results nobody but their GPU reads, and that read nothing of another one: these
    would need hand-overs in prompts that there are in no other step. What the CPU makes they may read: it is handed
    over in all steps, one time more than without them."""
    moved = dict(candidates)
    writer, readers = _writers(flat), _readers(flat)

    def runs_on(i: int) -> str:
        return moved.get(i) or memory_of(flat[i].placement.device)

    def stays(i: int) -> bool:
        acts = (name for name in flat[i].op.inputs if values[name].kind is ValueKind.ACT)
        sources = all(runs_on(writer[name]) in (CPU, moved[i]) for name in acts)
        return sources and all(runs_on(r) == moved[i] for name in flat[i].op.outputs for r in readers[name])

    changed = True
    while changed:
        changed = False
        for i in (*sorted(moved), *sorted(moved, reverse=True)):
            if i in moved and not stays(i):
                del moved[i]
                changed = True
    return moved


def _worth_it(flat: Sequence[FlatOp], moved: Mapping[int, str], sizes: Mapping[int, int]) -> dict[int, str]:
    """Those of the ops that hand to each other more than small weights: others would only be handed more."""
    graph = nx.Graph()
    graph.add_nodes_from(moved)
    writer = _writers(flat)
    graph.add_edges_from((i, writer[n]) for i in moved for n in flat[i].op.inputs if writer.get(n) in moved)
    kept = (part for part in nx.connected_components(graph) if sum(sizes[i] for i in part) > SMALL_BYTES)
    return {i: moved[i] for part in kept for i in part}


def _writers(flat: Sequence[FlatOp]) -> dict[str, int]:
    return {name: i for i, f in enumerate(flat) for name in f.op.outputs}


def _readers(flat: Sequence[FlatOp]) -> Mapping[str, Sequence[int]]:
    readers: dict[str, list[int]] = defaultdict(list)
    for i, f in enumerate(flat):
        for name in f.op.inputs:
            readers[name].append(i)
    return readers


def _least_tokens(plan: Plan, context: Context, moved: _Moved) -> int | None:
    """Of the smallest step that gains, by the graphs that there are: from so many tokens on its mean one does. None:
    none does."""
    slowest = min(link_gb_per_s(context.profile.gpus[number(gpu)]) for gpu in moved.ops.values())
    copies_us = moved.bytes / slowest / 1e3
    below = max(decode_rows(plan), default=0)
    for bound in prompt_rows(plan):
        if _cpu_us(plan, context, moved, round(math.sqrt((below + 1) * bound))) > copies_us:
            return below + 1
        below = bound
    return None


def _cpu_us(plan: Plan, context: Context, moved: _Moved, tokens: int) -> float:
    """What the CPU takes for all of them in a step of so many tokens."""
    step = Phase("prefill", tokens, 1, tokens)
    times: dict[tuple[str, str], float] = {}
    total = 0.0
    for call, id in moved.ops:
        template = plan.template(plan.calls[call].template)
        key = (template.name, id)
        if key not in times:
            op = next(op for op in template.ops if op.id == id)
            work = work_of(op, template.value_map(), step, context.target)
            times[key] = cpu_time(op, work, step, context.profile, context.isa, 0.0).us
        total += times[key]
    return total


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
