"""Renders the program: the C++ that runs a planned model step on the lanes, one function a layer template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.backends.templates import render
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind


@dataclass(frozen=True)
class ProgramLayout:
    """Order in which the runtime hands weights and states to the program, and the names of its timers."""

    weights: tuple[Value, ...]
    states: tuple[Value, ...]
    timers: tuple[str, ...]

    @staticmethod
    def of(plan: Plan) -> ProgramLayout:
        """The layout that ``plan`` fixes: its values in order, its roles in order of first use."""
        weights = tuple(v for v in plan.values if v.kind in (ValueKind.WEIGHT, ValueKind.CONST))
        states = tuple(v for v in plan.values if v.kind is ValueKind.STATE)
        roles: dict[str, None] = {}
        for template in plan.templates:
            for op in template.ops:
                roles.setdefault(op.role or op.kind)
        return ProgramLayout(weights, states, tuple(roles))


def render_program(plan: Plan, kernels: Mapping[tuple[str, str], Kernel], isa: Isa, plan_hash: str) -> str:
    """C++ source of the program. ``plan`` is scheduled and has its memory planned; ``kernels`` holds the kernel
    of every (template, op). Raises HetcompError if a value has no home (a bug in a pass)."""
    layout = ProgramLayout.of(plan)
    homes = _plan_homes(plan, layout)
    templates = [_template(plan, t, kernels, homes, layout) for t in plan.templates]
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
) -> dict[str, Any]:
    formals = (*template.params, *(r for r in template.results if r not in template.params))
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
                "timer": layout.timers.index(op.role or op.kind),
                "inputs": [find(i, op) for i in op.inputs] or ["nullptr"],
                "outputs": [find(o, op) for o in op.outputs] or ["nullptr"],
                "rows": _rows(template, op),
                "workspace": address.get(workspace, "nullptr"),
                "kernel": kernels[template.name, op.id].name,
            }
        )
    calls = [c for c in plan.calls if c.template == template.name]
    return {
        "name": template.name,
        "params": formals,
        "ops": ops,
        "calls": [{"index": i, "refs": [homes[v] for v in _actuals(template, call)]} for i, call in enumerate(calls)],
    }


def _actuals(template: Template, call: Call) -> list[str]:
    """The plan values bound to ``params`` and then to those results that are not params, in order."""
    results = [
        actual for formal, actual in zip(template.results, call.results, strict=True) if formal not in template.params
    ]
    return [*call.args, *results]


def _rows(template: Template, op: Op) -> str:
    """C++ expression of the op's row count: T, or R behind select_rows."""
    values = template.value_map()
    # kv_append has no output; its rows are those of its input.
    first = values[(op.outputs or op.inputs)[0]].type.shape
    return "s.n_logit_rows" if first and first[0] == "R" else "s.n_tokens"
