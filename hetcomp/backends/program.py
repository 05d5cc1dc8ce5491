"""Renders the program: the C++ that runs a planned model step on the lanes, one function a layer template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hetcomp.backends.decode_flow import OpFlow, decode_flow
from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.backends.templates import render
from hetcomp.errors import HetcompError
from hetcomp.ir.node_parts import Cut, NodePart, cut_weights, part_id, part_workspace, plan_nodes, plan_parts
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind


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
        cut = cut_weights(plan)
        weights: list[tuple[Value, int]] = []
        for v in plan.values:
            if v.kind in (ValueKind.WEIGHT, ValueKind.CONST):
                weights += [(part, nodes.index(node)) for part, _, node in cut.get(v.id, ())] or [(v, main)]
        cuts = {part.id: (v, c) for v in plan.values for part, c, _ in cut.get(v.id, ())}
        states = tuple(v for v in plan.values if v.kind is ValueKind.STATE)
        roles: dict[str, None] = {}
        for template in plan.templates:
            for op in template.ops:
                roles.setdefault(op.role or op.kind)
        return ProgramLayout(
            tuple(v for v, _ in weights), states, tuple(roles), nodes, main, tuple(n for _, n in weights), cuts
        )


def render_program(plan: Plan, kernels: Mapping[tuple[str, str], Kernel], isa: Isa, plan_hash: str) -> str:
    """C++ source of the program. ``plan`` is scheduled and has its memory planned; ``kernels`` holds the kernel
    of every (template, op). Raises HetcompError if a value has no home (a bug in a pass)."""
    layout = ProgramLayout.of(plan)
    homes = _plan_homes(plan, layout)
    parts = plan_parts(plan)
    flow = decode_flow(plan)
    templates = [_template(plan, t, kernels, homes, layout, parts, flow) for t in plan.templates]
    index = {t["name"]: 0 for t in templates}
    calls = []
    for call in plan.calls:
        calls.append({"template": call.template, "index": index[call.template]})
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
        n_nodes=len(layout.nodes),
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
    template: Template,
    kernels: Mapping[tuple[str, str], Kernel],
    homes: Mapping[str, tuple[str, int]],
    layout: ProgramLayout,
    all_parts: Mapping[tuple[str, str], Sequence[NodePart]],
    flow: Mapping[tuple[str, str], OpFlow],
) -> dict[str, Any]:
    parts = {op.id: all_parts.get((template.name, op.id), ()) for op in template.ops}
    cut_formals = {
        op.inputs[operand]: [p.node for p in parts[op.id]]
        for op in template.ops
        for part in parts[op.id]
        for operand, _ in part.cuts
    }
    formals = _cut_names((*template.params, *(r for r in template.results if r not in template.params)), cut_formals)
    address = {formal: f"p[{i}]" for i, formal in enumerate(formals)}
    offsets = {slot.value: slot.offset for slot in template.arena}
    for slot_value, offset in offsets.items():
        address.setdefault(slot_value, f"a + {offset}")

    def find(id: str, op: Op) -> str:
        if id not in address:
            raise HetcompError(
                f"Value {id} of op {op.id} ({op.origin or op.kind}) in {template.name} has no memory; "
                "plan_memory left it out."
            )
        return address[id]

    ops = []
    for op in template.ops:
        workspace = f"workspace:{op.id}"
        schedule = op.schedule
        ops.append(
            {
                "id": op.id,
                "kind": op.kind,
                "role": op.role,
                "origin": op.origin,
                "barrier": schedule is None or schedule.barrier_before,
                "flow": flow[template.name, op.id],
                "timer": layout.timers.index(op.role or op.kind),
                "outputs": [find(o, op) for o in op.outputs] or ["nullptr"],
                "rows": _rows(template, op),
                "workspace": address.get(workspace, "nullptr"),
            }
        )
        if parts[op.id]:
            ops[-1] |= _parts(plan, template, op, parts[op.id], kernels, layout, ops[-1], partial(find, op=op))
        else:
            ops[-1] |= {
                "inputs": [find(i, op) for i in op.inputs] or ["nullptr"],
                "kernel": kernels[template.name, op.id].name,
                "parts": (),
            }
    calls = [c for c in plan.calls if c.template == template.name]
    return {
        "name": template.name,
        "params": formals,
        "ops": ops,
        "calls": [
            {"index": i, "refs": [homes[v] for v in _actuals(template, call, cut_formals)]}
            for i, call in enumerate(calls)
        ],
    }


def _parts(
    plan: Plan,
    template: Template,
    op: Op,
    parts: Sequence[NodePart],
    kernels: Mapping[tuple[str, str], Kernel],
    layout: ProgramLayout,
    rendered: Mapping[str, Any],
    find: Callable[[str], str],
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
        if isinstance(part.attrs, MoeExperts) and part.experts:
            here = [e for start, stop in part.experts for e in range(start, stop)]
            assert isinstance(op.attrs, MoeExperts)
            call["local"] = [here.index(e) if e in here else -1 for e in range(op.attrs.experts)]
            call["top_k"] = part.attrs.top_k
            call["choices"] = inputs[1]
            inputs[1] = scratch(space.ids[i])
        calls.append(call | {"workspace": scratch(space.scratch[i]) if kernel.workspace_bytes else "nullptr"})
    width = part.attrs.hidden if isinstance(part.attrs, MoeExperts) else 0
    return {"parts": calls, "partials": [scratch(offset) for offset in space.partials], "width": width}


def _cut_names(names: Iterable[str], cut: Mapping[str, Sequence[int]]) -> list[str]:
    """The names with those of cut weights replaced by one for every node."""
    return [part for name in names for part in ([part_id(name, n) for n in cut[name]] if name in cut else [name])]


def _actuals(template: Template, call: Call, cut: Mapping[str, Sequence[int]]) -> list[str]:
    """The plan values bound to ``params`` and then to those results that are not params, in order; for cut weights
    those of their parts."""
    results = [
        actual for formal, actual in zip(template.results, call.results, strict=True) if formal not in template.params
    ]
    of_plan = {actual: cut[formal] for formal, actual in zip(template.params, call.args, strict=True) if formal in cut}
    return _cut_names((*call.args, *results), of_plan)


def _rows(template: Template, op: Op) -> str:
    """C++ expression of the op's row count: T, or R behind select_rows."""
    values = template.value_map()
    # kv_append has no output; its rows are those of its input.
    first = values[(op.outputs or op.inputs)[0]].type.shape
    return "s.n_logit_rows" if first and first[0] == "R" else "s.n_tokens"
