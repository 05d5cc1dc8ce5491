"""Checks a plan: names, arities, types of every op, and the invariants that the passes claim to have established."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hetcomp.errors import HetcompError
from hetcomp.ir import op_types
from hetcomp.ir.cpu_side import CpuTemplate, cpu_templates
from hetcomp.ir.deferral import check_deferral, deferral_buffers
from hetcomp.ir.homes import memory_of
from hetcomp.ir.layouts import ORDERED_FORMATS, has_act_order
from hetcomp.ir.node_parts import node_parts, plan_parts, shared_weights
from hetcomp.ir.ops import STATE_WRITERS
from hetcomp.ir.plan import Call, Op, Plan, Template, ValueKind


def verify(plan: Plan) -> None:
    """Raises HetcompError naming template, op and origin at the first thing that is wrong."""
    dims = {d.name for d in plan.dims}
    for template in plan.templates:
        _verify_template(template, dims)
    _verify_calls(plan)
    for invariant in plan.established:
        if invariant not in _INVARIANTS:
            raise HetcompError(f"The plan claims '{invariant}', which this hetcomp does not know.")
        _INVARIANTS[invariant](plan)


def _where(template: Template, op: Op) -> str:
    return f"op %{op.id} ({op.kind}, {op.origin or op.role}) of template {template.name}"


def _verify_template(template: Template, dims: set[str]) -> None:
    values = template.value_map()
    if len(values) != len(template.values):
        raise HetcompError(f"Template {template.name} names two values alike.")
    for value in template.values:
        for extent in value.type.shape:
            if isinstance(extent, str) and extent not in dims:
                raise HetcompError(f"Value {value.id} of template {template.name} has the unknown dimension {extent}.")
    for name in template.params:
        if name not in values:
            raise HetcompError(f"Template {template.name} has the parameter {name}, which is none of its values.")
    defined = set(template.params)
    seen: set[str] = set()
    for op in template.ops:
        if op.id in seen:
            raise HetcompError(f"Template {template.name} names two ops {op.id}.")
        seen.add(op.id)
        for name in op.inputs:
            if name not in values or name not in defined:
                raise HetcompError(f"{_where(template, op)} reads {name}, which nothing defines before it.")
        for name in op.outputs:
            if name not in values or name in defined:
                raise HetcompError(f"{_where(template, op)} writes {name}, which is unknown or already defined.")
            defined.add(name)
        problem = op_types.check(op, [values[i].type for i in op.inputs], [values[o].type for o in op.outputs])
        if problem:
            raise HetcompError(f"{_where(template, op)}: {problem}.")
    for name in template.results:
        if name not in defined:
            raise HetcompError(f"Template {template.name} hands out {name}, which nothing defines.")


def _verify_calls(plan: Plan) -> None:
    values = plan.value_map()
    if len(values) != len(plan.values):
        raise HetcompError("The plan names two values alike.")
    known = {t.name for t in plan.templates}
    if len(known) != len(plan.templates):
        raise HetcompError("The plan names two templates alike.")
    ready = {v.id for v in plan.values if v.kind is not ValueKind.ACT and v.kind is not ValueKind.OUTPUT}
    for i, call in enumerate(plan.calls):
        if call.template not in known:
            raise HetcompError(f"call {i} is of template {call.template}, which the plan does not have.")
        template = plan.template(call.template)
        where = f"call {i} of template {call.template}"
        for given, formal in ((call.args, template.params), (call.results, template.results)):
            if len(given) != len(formal):
                raise HetcompError(f"{where} binds {len(given)} values to {len(formal)} names.")
            for actual, name in zip(given, formal, strict=True):
                if actual not in values:
                    raise HetcompError(f"{where} names the unknown value {actual}.")
                if values[actual].type != template.value(name).type:
                    raise HetcompError(
                        f"{where} binds {actual}: {values[actual].type} to {name}: {template.value(name).type}."
                    )
        for actual in call.args:
            if actual not in ready:
                raise HetcompError(f"{where} reads {actual}, which no call before it writes.")
        ready.update(call.results)


def _weights_bound(plan: Plan) -> None:
    weights = [v for v in plan.values if v.kind is ValueKind.WEIGHT]
    unbound = [v.fqn or v.id for v in weights if v.source is None]
    if unbound and len(unbound) != len(weights):
        raise HetcompError(f"Weight {unbound[0]} is not bound although others are.")


def _formats_chosen(plan: Plan) -> None:
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT and value.format is None:
            raise HetcompError(f"Weight {value.fqn or value.id} has no format.")
    values = plan.value_map()
    for call in plan.calls:
        template = plan.template(call.template)
        formals = template.value_map()
        for name, actual in zip(template.params, call.args, strict=True):
            # Kernels are generated for the template's format and layout, weights are packed in the plan's.
            read, stored = (f"{v.format} in {v.type.layout}" for v in (formals[name], values[actual]))
            if values[actual].kind is ValueKind.WEIGHT and read != stored:
                raise HetcompError(
                    f"Weight {actual} is stored as {stored}, but template {template.name} reads it as {read}."
                )
            if has_act_order(values[actual].type.layout) and values[actual].format not in ORDERED_FORMATS:
                raise HetcompError(
                    f"Weight {actual} is stored as {stored}; columns have an order in {' or '.join(ORDERED_FORMATS)}."
                )


def _ops(plan: Plan) -> Iterator[tuple[Template, Op]]:
    for template in plan.templates:
        for op in template.ops:
            yield template, op


def _costed(plan: Plan) -> None:
    for template, op in _ops(plan):
        # Transfers are inserted after costs are known and carry their own latency.
        if op.cost is None and op.kind != "transfer":
            raise HetcompError(f"{_where(template, op)} has no cost.")
        for phase in op.cost.phases if op.cost else ():
            if min(phase.flops, phase.weight_bytes, phase.act_bytes, phase.state_bytes, phase.us) < 0:
                raise HetcompError(f"{_where(template, op)} has a negative cost in {phase.phase}.")


def _placed(plan: Plan) -> None:
    for call in plan.calls:
        template = plan.template(call.template)
        placements = dict(call.placements)
        for op in template.ops:
            if op.id not in placements:
                raise HetcompError(f"{_where(template, op)} has no placement in layer {call.layer}.")
            if op.kind == "moe_experts":
                _experts_covered(template, op, call)


def _experts_covered(template: Template, op: Op, call: Call) -> None:
    runs = sorted((e.first, e.last) for e in dict(call.placements)[op.id].experts)
    expected = 0
    for first, last in runs:
        if first != expected or last < first:
            raise HetcompError(f"{_where(template, op)}: expert {expected} has no single home in layer {call.layer}.")
        expected = last + 1
    if expected != getattr(op.attrs, "experts", 0):
        raise HetcompError(f"{_where(template, op)}: only {expected} experts are placed in layer {call.layer}.")


# Slices begin at whole panels of rows, and at whole groups of columns of the quantised formats.
_SLICE_STEPS = {"linear": 16, "moe_experts": 32}


def _sliced(plan: Plan) -> None:
    shared = shared_weights(plan)
    for call in plan.calls:
        template = plan.template(call.template)
        template_ops = {op.id: op for op in template.ops}
        actual = dict(zip(template.params, call.args, strict=True))
        for name, placement in call.placements:
            if not placement.slices:
                continue
            where = f"The NUMA slices of op %{name} in layer {call.layer}"
            op = template_ops[name]
            expected = 0
            for piece in placement.slices:
                if piece.start != expected or piece.stop <= piece.start:
                    raise HetcompError(f"{where} have a gap or overlap.")
                if piece.start % _SLICE_STEPS.get(op.kind, 1):
                    raise HetcompError(f"{where} must begin at multiples of {_SLICE_STEPS[op.kind]}.")
                expected = piece.stop
            if expected != getattr(op.attrs, "intermediate", getattr(op.attrs, "out_features", expected)):
                raise HetcompError(f"{where} end at {expected}, which is not all of it.")
            if len({piece.node for piece in placement.slices}) != len(placement.slices):
                raise HetcompError(f"{where} name a node twice.")
            several = [actual[i] for i in op.inputs if actual.get(i) in shared]
            if len(placement.slices) > 1 and several:
                raise HetcompError(f"{where} cut the weight {several[0]}, which other ops read as a whole.")


def _transfers_inserted(plan: Plan) -> None:
    handed = {v.id: "cpu" for v in plan.values}
    for call in plan.calls:
        template = plan.template(call.template)
        devices = dict(call.placements)
        home = {v.id: "cpu" for v in template.values}
        home.update({formal: handed[actual] for formal, actual in zip(template.params, call.args, strict=True)})
        for op in template.ops:
            memory = memory_of(devices[op.id].device)
            for name in op.inputs:
                if op.kind != "transfer" and template.value(name).kind is ValueKind.ACT and home[name] != memory:
                    raise HetcompError(f"{_where(template, op)} reads {name} from {home[name]} without a transfer.")
            target = getattr(op.attrs, "target", memory)
            home.update(dict.fromkeys(op.outputs, target))
        handed.update({actual: home[formal] for formal, actual in zip(template.results, call.results, strict=True)})
    _cut_alike(plan)


def _cut_alike(plan: Plan) -> None:
    """All calls of a template must cut their ops over NUMA nodes in the same way: one code serves them."""
    parts = plan_parts(plan)
    for call in plan.calls:
        placements = dict(call.placements)
        for op in plan.template(call.template).ops:
            if node_parts(op, placements[op.id]) != parts.get((call.template, op.id), ()):
                raise HetcompError(
                    f"Op %{op.id} of template {call.template} is cut over NUMA nodes in another way in layer "
                    f"{call.layer} than elsewhere."
                )


def _scheduled(plan: Plan) -> None:
    for template in plan.templates:
        values = template.value_map()
        written: set[str] = set()
        for i, op in enumerate(template.ops):
            if op.schedule is None or op.schedule.index != i:
                raise HetcompError(f"{_where(template, op)} has no place in its lane's order.")
            if op.schedule.barrier_before:
                written = set()
            elif i == 0:
                raise HetcompError(f"{_where(template, op)} begins a template without a barrier.")
            late = [name for name in op.inputs if name in written]
            if late:
                raise HetcompError(f"{_where(template, op)} reads {late[0]} without a barrier after its writer.")
            written.update(op.outputs)
            if op.kind in STATE_WRITERS:
                written.update(n for n in op.inputs if values[n].kind is ValueKind.STATE)


def _memory_planned(plan: Plan) -> None:
    dims, sides = plan.max_dims(), cpu_templates(plan)
    _call_arena_planned(plan, dims, sides)
    call_end = max((s.offset + s.bytes for s in plan.call_arena), default=0)
    for template in (plan.template(name) for name in sides):
        slots = {s.value: s for s in template.arena}
        side = sides[template.name]
        live = {name: alive for name, alive in _live_epochs(side.template).items() if name in side.arena}
        for name in live:
            if name not in slots:
                raise HetcompError(f"Value {name} of template {template.name} has no place in the arena.")
            slot = slots[name]
            if slot.bytes < template.value(name).type.bytes(dims):
                raise HetcompError(f"Value {name} of template {template.name} has too small a place.")
        for slot in template.arena:
            if slot.offset % 64 or slot.bytes < 0:
                raise HetcompError(f"{slot.value} of template {template.name} has an unaligned place.")
            if slot.offset < call_end or slot.offset + slot.bytes > plan.arena_bytes:
                raise HetcompError(f"{slot.value} of template {template.name} lies outside of its part of the arena.")
        for op, epoch in zip(side.template.ops, _epochs(side.template), strict=True):
            if f"workspace:{op.id}" in slots:
                live[f"workspace:{op.id}"] = (epoch, epoch)
        where = f"of template {template.name}"
        _no_overlap(where, [(n, *live[n], slots[n].offset, slots[n].bytes) for n in live])


def _call_arena_planned(plan: Plan, dims: dict[str, int], sides: Mapping[str, CpuTemplate]) -> None:
    """Values handed from call to call on the CPU: each has a place of its own from its first call to its last."""
    values = {v.id: v for v in plan.values if v.kind is ValueKind.ACT}
    slots = {s.value: s for s in plan.call_arena}
    needed = {name: value.type.bytes(dims) for name, value in values.items()}
    live: dict[str, tuple[int, int]] = {}
    for buffer in deferral_buffers(plan):
        live[buffer.value] = (buffer.first, buffer.last)
        needed[buffer.value] = buffer.bytes
    for i, call in enumerate(plan.calls):
        side = sides[call.template]
        formals = (*side.template.params, *side.template.results)
        for formal, name in zip(formals, (*call.args, *call.results), strict=True):
            if name in values and formal in side.arena:
                live[name] = (live.get(name, (i, i))[0], i)
    for name in live:
        if name not in slots:
            raise HetcompError(f"Value {name}, handed from call to call, has no place in the arena.")
        slot = slots[name]
        if slot.bytes < needed[name] or slot.offset % 64:
            raise HetcompError(f"Value {name}, handed from call to call, has too small or unaligned a place.")
        if slot.offset < 0 or slot.offset + slot.bytes > plan.arena_bytes:
            raise HetcompError(f"Value {name}, handed from call to call, lies outside of the arena.")
    _no_overlap("handed from call to call", [(n, *live[n], slots[n].offset, slots[n].bytes) for n in live])


def _no_overlap(where: str, items: list[tuple[str, int, int, int, int]]) -> None:
    for i, (a, first_a, last_a, at_a, bytes_a) in enumerate(items):
        for b, first_b, last_b, at_b, bytes_b in items[i + 1 :]:
            alive = first_a <= last_b and first_b <= last_a
            if alive and at_a < at_b + bytes_b and at_b < at_a + bytes_a:
                raise HetcompError(f"{a} and {b} {where} share memory while both are alive.")


def _epochs(template: Template) -> list[int]:
    epoch, result = 0, []
    for op in template.ops:
        epoch += bool(op.schedule and op.schedule.barrier_before)
        result.append(epoch)
    return result


def _live_epochs(template: Template) -> dict[str, tuple[int, int]]:
    values = template.value_map()
    outside = {*template.params, *template.results}
    live: dict[str, tuple[int, int]] = {}
    for op, epoch in zip(template.ops, _epochs(template), strict=True):
        for name in (*op.inputs, *op.outputs):
            if values[name].kind is ValueKind.ACT and name not in outside:
                live[name] = (live.get(name, (epoch, epoch))[0], epoch)
    return live


def _simulated(plan: Plan) -> None:
    for timeline in plan.timelines:
        busiest = max((lane.busy_us for lane in timeline.lanes), default=0.0)
        if timeline.total_us <= 0 or busiest > timeline.total_us * (1 + 1e-9):
            raise HetcompError(f"The predicted timeline of {timeline.phase} is shorter than its busiest lane.")
    if not timeline_phases(plan):
        raise HetcompError("The plan has no predicted timeline.")


def timeline_phases(plan: Plan) -> list[str]:
    """Names of the phases that were simulated."""
    return [t.phase for t in plan.timelines]


_INVARIANTS: dict[str, Callable[[Plan], None]] = {
    "weights_bound": _weights_bound,
    "formats_chosen": _formats_chosen,
    "costed": _costed,
    "placed": _placed,
    "sliced": _sliced,
    "transfers_inserted": _transfers_inserted,
    "deferral_chosen": check_deferral,
    "scheduled": _scheduled,
    "memory_planned": _memory_planned,
    "simulated": _simulated,
}
