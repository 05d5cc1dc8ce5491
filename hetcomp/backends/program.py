"""Renders the program: the C++ that runs a planned model step on the lanes, one function a layer template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hetcomp.backends.adapted_ops import AdaptedOps, adaptable_weights
from hetcomp.backends.decode_flow import OpFlow, decode_flow
from hetcomp.backends.exchange import EXPERT_INPUTS, EXPERT_SUM, VALUE, Exchange
from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.backends.templates import render
from hetcomp.errors import HetcompError
from hetcomp.ir.adaptable import OPERANDS
from hetcomp.ir.cpu_side import CpuRole, CpuTemplate, cpu_plan, cpu_templates
from hetcomp.ir.deferral import CHOICES_LATER, CHOICES_NOW, DEFERRED_SUM, deferrals, deferred_role
from hetcomp.ir.homes import CPU, read_in
from hetcomp.ir.node_parts import Cut, NodePart, cut_weights, part_id, part_workspace, plan_nodes, plan_parts
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind

WAITING = "wait for gpu"  # timer of what the lanes wait at hand-overs


@dataclass(frozen=True)
class ProgramLayout:
    """Order in which the runtime hands weights and states to the program, and the names of its timers.

    ``nodes``: ids of the NUMA nodes; ``main``: index of the one that holds what is not cut. ``weight_nodes``: index of
    each weight's node. ``cuts``: of weights that are a node's part of one, by id: the whole weight and the cut.
    """

    weights: tuple[Value, ...]
    states: tuple[Value, ...]
    timers: tuple[str, ...]
    nodes: tuple[int, ...]
    main: int
    weight_nodes: tuple[int, ...]
    cuts: Mapping[str, tuple[Value, Cut]]

    @staticmethod
    def of(plan: Plan) -> ProgramLayout:
        """The layout that ``plan`` fixes: its values in order, its roles in order of first use."""
        nodes, main = plan_nodes(plan)
        cut, readers = cut_weights(plan), read_in(plan)
        weights: list[tuple[Value, int]] = []
        for v in plan.values:
            if v.kind in (ValueKind.WEIGHT, ValueKind.CONST):
                weights += [(part, nodes.index(node)) for part, _, node in cut.get(v.id, ())]
                weights += [(v, main)] if CPU in readers[v.id] else []
        cuts = {part.id: (v, c) for v in plan.values for part, c, _ in cut.get(v.id, ())}
        states = tuple(v for v in plan.values if v.kind is ValueKind.STATE and CPU in readers[v.id])
        roles: dict[str, None] = {}
        deferring = bool(deferrals(plan))
        for side in cpu_templates(plan).values():
            for op in side.template.ops:
                if side.roles[op.id] is not CpuRole.COMPUTE:
                    roles.setdefault(WAITING)
                roles.setdefault(op.role or op.kind)
                if deferring and side.roles[op.id] is CpuRole.EXPERTS:
                    roles.setdefault(deferred_role(op.role or op.kind))
        return ProgramLayout(
            tuple(v for v, _ in weights), states, tuple(roles), nodes, main, tuple(n for _, n in weights), cuts
        )


def render_program(plan: Plan, kernels: Mapping[tuple[str, str], Kernel], isa: Isa, plan_hash: str) -> str:
    """C++ source of the program. ``plan`` is scheduled and has its memory planned; ``kernels`` holds the kernel
    of every (template, op). Raises HetcompError if a value has no home (a bug in a pass)."""
    layout, exchange, adapted = ProgramLayout.of(plan), Exchange.of(plan), AdaptedOps.of(plan)
    homes = _plan_homes(plan, layout)
    parts = plan_parts(plan)
    flow = decode_flow(cpu_plan(plan, exchange.sides))
    sides = [side for side in exchange.sides.values() if side.template.ops]
    templates = [_template(plan, side, kernels, homes, layout, parts, flow, exchange, adapted) for side in sides]
    index = {t["name"]: 0 for t in templates}
    calls = []
    for number, call in enumerate(plan.calls):
        if call.template in index:
            flag = _first_flag(exchange, number)
            calls.append({"template": call.template, "index": index[call.template], "flag": flag, "number": number})
            index[call.template] += 1
    return render(
        "program/program.cpp.j2",
        model=plan.model.name,
        isa=isa.value,
        plan_hash=plan_hash,
        kernels=sorted({k.name for k in kernels.values()}),
        templates=templates,
        calls=calls,
        n_weights=len(layout.weights),
        n_states=len(layout.states),
        arena_bytes=plan.arena_bytes,
        max_tokens=plan.dim("T").max,
        max_logit_rows=plan.dim("R").max,
        vocab=plan.model.vocab,
        timers=layout.timers,
        waiting=layout.timers.index(WAITING) if exchange.with_cpu() else 0,
        n_nodes=len(layout.nodes),
        n_pinned=len(exchange.of_side(CPU)),
        n_flags=len(exchange.hand_overs) if exchange.with_cpu() else 0,
        adaptable=adaptable_weights(plan, layout.weights, layout.cuts),
        adapter_floats=adapted.floats,
        adapter_rows=adapted.rows,
        deferring=bool(deferrals(plan)),
        sum_place=homes[DEFERRED_SUM][1] if DEFERRED_SUM in homes else 0,
        now_place=homes[CHOICES_NOW][1] if CHOICES_NOW in homes else 0,
        later_places=[homes[name][1] for name in CHOICES_LATER if name in homes],
    )


def _plan_homes(plan: Plan, layout: ProgramLayout) -> dict[str, tuple[str, int]]:
    """Home of every value of the plan: (name of Home's enumerator, index or offset)."""
    homes: dict[str, tuple[str, int]] = {}
    homes.update({v.id: ("kWeight", i) for i, v in enumerate(layout.weights)})
    homes.update({v.id: ("kState", i) for i, v in enumerate(layout.states)})
    homes.update({slot.value: ("kArena", slot.offset) for slot in plan.call_arena})
    for value in plan.values:
        if value.kind is ValueKind.INPUT:
            homes[value.id] = ("kIds" if value.fqn == "ids" else "kPositions", 0)
        elif value.kind is ValueKind.OUTPUT:
            homes[value.id] = ("kLogits", 0)
    return homes


def _template(
    plan: Plan,
    side: CpuTemplate,
    kernels: Mapping[tuple[str, str], Kernel],
    homes: Mapping[str, tuple[str, int]],
    layout: ProgramLayout,
    all_parts: Mapping[tuple[str, str], Sequence[NodePart]],
    flow: Mapping[tuple[str, str], OpFlow],
    exchange: Exchange,
    adapted: AdaptedOps,
) -> dict[str, Any]:
    template = side.template
    parts = {op.id: all_parts.get((template.name, op.id), ()) for op in template.ops}
    cut_formals = {
        op.inputs[operand]: [int(p.node) for p in parts[op.id]]
        for op in template.ops
        for part in parts[op.id]
        for operand, _ in part.cuts
    }
    formals = [*_formals(side, cut_formals), *(name for op in template.ops for name in _handed(op, side))]
    address = {formal: f"p[{i}]" for i, formal in enumerate(formals)}
    offsets = {slot.value: slot.offset for slot in plan.template(template.name).arena}
    for slot_value, offset in offsets.items():
        address.setdefault(slot_value, f"a + {offset}")
    for op in template.ops:
        if side.roles[op.id] is CpuRole.AWAIT:
            address[op.outputs[0]] = address[_pinned(op, VALUE)]

    def find(id: str, op: Op) -> str:
        if id not in address:
            raise HetcompError(
                f"Value {id} of op {op.id} ({op.origin or op.kind}) in {template.name} has no memory; "
                "plan_memory left it out."
            )
        return address[id]

    flags = _flags(plan, template, exchange)
    deferring = deferrals(plan)
    experts = [op.id for op in template.ops if side.roles[op.id] is CpuRole.EXPERTS]
    ops = []
    for op in template.ops:
        role = side.roles[op.id]
        rendered: dict[str, Any] = {
            "id": op.id,
            "kind": op.kind,
            "role": op.role,
            "origin": op.origin,
            "barrier": op.schedule is None or op.schedule.barrier_before,
            "flow": flow[template.name, op.id],
            "timer": layout.timers.index(op.role or op.kind),
            "rows": _rows(template, op),
            "workspace": address.get(f"workspace:{op.id}", "nullptr"),
            "hands": role.value,
            "moved": op.id in side.moved,
            "flag": flags.get(op.id, 0),
            "parts": (),
            "deferral": None,
            "routing": None,
            "adapted": _adapted(adapted, template, op, None, formals),
        }
        if role is CpuRole.SEND:
            value = template.value(op.outputs[0])
            row = value.type.bytes({**plan.max_dims(), str(value.type.shape[0]): 1})
            rendered |= {"source": find(op.inputs[0], op), "target": address[_pinned(op, VALUE)], "row_bytes": row}
        elif role is CpuRole.EXPERTS:
            moved = {name: address[_pinned(op, part)] for name, part in zip(op.inputs, EXPERT_INPUTS, strict=False)}
            rendered["outputs"] = [address[_pinned(op, EXPERT_SUM)]]
            rendered["routing"] = _routing(op, moved.__getitem__)
            if deferring:
                rendered["deferral"] = {
                    "index": experts.index(op.id),
                    "ids": moved[op.inputs[1]],
                    "weights": moved[op.inputs[2]],
                    "answer": rendered["outputs"][0],
                    "timer": layout.timers.index(deferred_role(op.role or op.kind)),
                    "on_cpu": _on_cpu(op, parts[op.id]),
                }
                moved[op.inputs[1]], rendered["outputs"] = "chosen", ["sum"]
            where = partial(_find_moved, moved, partial(find, op=op))
            rendered |= _parts(plan, template, op, parts[op.id], kernels, layout, rendered, where, adapted, formals)
        elif role is CpuRole.COMPUTE:
            rendered["outputs"] = [find(o, op) for o in op.outputs] or ["nullptr"]
            rendered["routing"] = _routing(op, partial(find, op=op))
            if parts[op.id]:
                where = partial(find, op=op)
                rendered |= _parts(plan, template, op, parts[op.id], kernels, layout, rendered, where, adapted, formals)
            else:
                inputs = [find(i, op) for i in op.inputs] or ["nullptr"]
                rendered |= {"inputs": inputs, "kernel": kernels[template.name, op.id].name}
        ops.append(rendered)
    calls = [i for i, c in enumerate(plan.calls) if c.template == template.name]
    return {
        "name": template.name,
        "params": formals,
        "ops": ops,
        "moves": bool(side.moved),
        "calls": [
            {
                "index": i,
                "refs": _refs(plan, side, number, formals, cut_formals, homes, exchange),
                "deferrals": [deferring[number, op] for op in experts if deferring],
            }
            for i, number in enumerate(calls)
        ],
    }


def _first_flag(exchange: Exchange, call: int) -> int:
    return min((h.flag for h in exchange.hand_overs if h.call == call), default=0)


def _flags(plan: Plan, template: Template, exchange: Exchange) -> dict[str, int]:
    """By op: its hand-over, counted from the first of a call; all calls of a template have the same."""
    call = next(i for i, c in enumerate(plan.calls) if c.template == template.name)
    first = _first_flag(exchange, call)
    return {h.op: h.flag - first for h in exchange.hand_overs if h.call == call}


def _find_moved(moved: Mapping[str, str], find: Callable[[str], str], id: str) -> str:
    return moved[id] if id in moved else find(id)


def _on_cpu(op: Op, parts: Sequence[NodePart]) -> Sequence[bool]:
    """By expert, whether any of the CPU's parts has it; empty: all of them."""
    assert isinstance(op.attrs, MoeExperts)
    if any(not part.experts for part in parts):
        return ()
    places = [part.places(op.attrs.experts) for part in parts]
    found = [any(place >= 0 for place in of_expert) for of_expert in zip(*places, strict=True)]
    return () if all(found) else found


def _routing(op: Op, find: Callable[[str], str]) -> dict[str, Any] | None:
    """Where the choices of experts are and their weights; None: the op has no experts."""
    if not isinstance(op.attrs, MoeExperts):
        return None
    _, ids, weights = op.inputs[: len(EXPERT_INPUTS)]
    return {"experts": op.attrs.experts, "top_k": op.attrs.top_k, "ids": find(ids), "weights": find(weights)}


def _pinned(op: Op, part: str) -> str:
    """Name in its template of a buffer that the op hands over."""
    return f"{op.id}.{part}"


def _handed(op: Op, side: CpuTemplate) -> list[str]:
    role = side.roles[op.id]
    if role is CpuRole.COMPUTE:
        return []
    parts = (*EXPERT_INPUTS, EXPERT_SUM) if role is CpuRole.EXPERTS else (VALUE,)
    return [_pinned(op, part) for part in parts]


def _formals(side: CpuTemplate, cut: Mapping[str, Sequence[int]]) -> list[str]:
    """The template's params and results that the CPU touches; of cut weights their parts."""
    template = side.template
    touched: set[str] = set()
    for op in template.ops:
        role = side.roles[op.id]
        touched |= set(op.inputs[len(EXPERT_INPUTS) :] if role is CpuRole.EXPERTS else op.inputs)
        touched |= set(op.outputs if role is CpuRole.COMPUTE else ())
        if role is CpuRole.AWAIT:
            touched -= set(op.inputs)
    names = (*template.params, *(r for r in template.results if r not in template.params))
    return _cut_names((name for name in names if name in touched), cut)


def _refs(
    plan: Plan,
    side: CpuTemplate,
    number: int,
    formals: Sequence[str],
    cut: Mapping[str, Sequence[int]],
    homes: Mapping[str, tuple[str, int]],
    exchange: Exchange,
) -> list[tuple[str, int]]:
    """Where call ``number`` of the plan has the values bound to ``formals``."""
    call, template = plan.calls[number], side.template
    bound: dict[str, str] = {}
    for formal, actual in (
        *zip(template.params, call.args, strict=True),
        *zip(template.results, call.results, strict=True),
    ):
        for node in cut.get(formal, ()):
            bound[part_id(formal, node)] = part_id(actual, node)
        bound.setdefault(formal, actual)
    order = {name: i for i, name in enumerate(exchange.of_side(CPU))}
    pinned = {
        f"{h.op}.{part}": ("kPinned", order[name])
        for h in exchange.hand_overs
        if h.call == number and CPU in (h.giver, h.taker)
        for (flag, part), name in exchange.carriers.items()
        if flag == h.flag
    }
    return [pinned[formal] if formal in pinned else homes[bound[formal]] for formal in formals]


def _parts(
    plan: Plan,
    template: Template,
    op: Op,
    parts: Sequence[NodePart],
    kernels: Mapping[tuple[str, str], Kernel],
    layout: ProgramLayout,
    rendered: Mapping[str, Any],
    find: Callable[[str], str],
    adapted: AdaptedOps,
    formals: Sequence[str],
) -> dict[str, Any]:
    """What the template needs of an op in parts: a call for every node, and the partial sums to add up."""
    chosen = [kernels[template.name, part_id(op.id, part.node)] for part in parts]
    space = part_workspace(op, template, parts, [k.workspace_bytes for k in chosen], plan.max_dims())

    def scratch(offset: int) -> str:
        return f"{rendered['workspace']} + {offset}"

    calls: list[dict[str, Any]] = []
    for i, (part, kernel) in enumerate(zip(parts, chosen, strict=True)):
        cut = {operand for operand, _ in part.cuts}
        inputs = [find(part_id(v, part.node) if n in cut else v) for n, v in enumerate(op.inputs)]
        output = rendered["outputs"][0]
        if part.first_column:
            output = f"column({output}, {part.first_column})"
        elif i > 0 and space.partials:
            output = scratch(space.partials[i - 1])
        call = {"node": layout.nodes.index(part.node), "kernel": kernel.name, "output": output, "inputs": inputs}
        call["local"] = ()
        call["adapted"] = _adapted(adapted, template, op, part, formals)
        if (
            isinstance(part.attrs, MoeExperts)
            and isinstance(op.attrs, MoeExperts)
            and part.attrs.experts < op.attrs.experts
        ):
            call["local"] = part.places(op.attrs.experts)
            call["choices"] = inputs[1]
            inputs[1] = scratch(space.ids[i])
        calls.append(call | {"workspace": scratch(space.scratch[i]) if kernel.workspace_bytes else "nullptr"})
    a = part.attrs
    width, top_k = (a.hidden, a.top_k) if isinstance(a, MoeExperts) else (0, 0)
    return {"parts": calls, "partials": [scratch(offset) for offset in space.partials], "width": width, "top_k": top_k}


def _adapted(
    adapted: AdaptedOps, template: Template, op: Op, part: NodePart | None, formals: Sequence[str]
) -> dict[str, Any] | None:
    """What the template needs of an op, or of a node's part of it, whose weights adapters may change: the places of
    their homes among ``formals``, and of its scratch memory; None: adapters do not concern it."""
    place = adapted.places.get((template.name, op.id if part is None else part_id(op.id, part.node)))
    if place is None:
        return None
    names = [op.inputs[operand] for operand in OPERANDS[op.kind]]
    weights = [formals.index(name if part is None else part_id(name, part.node)) for name in names]
    return {
        "weights": (weights[0], weights[-1]),
        "logit_rows": _rows(template, op) == "s.n_logit_rows",
        "floats": place.floats,
        "rows": place.rows,
    }


def _cut_names(names: Iterable[str], cut: Mapping[str, Sequence[int]]) -> list[str]:
    """The names with those of cut weights replaced by one for every node."""
    return [part for name in names for part in ([part_id(name, n) for n in cut[name]] if name in cut else [name])]


def _rows(template: Template, op: Op) -> str:
    """C++ expression of the op's row count: T, or R behind select_rows."""
    values = template.value_map()
    # kv_append has no output; its rows are those of its input.
    first = values[(op.outputs or op.inputs)[0]].type.shape
    return "s.n_logit_rows" if first and first[0] == "R" else "s.n_tokens"
