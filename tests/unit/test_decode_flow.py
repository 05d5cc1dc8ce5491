"""Which ops thread 0 does alone, and where all threads go on together."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.backends.decode_flow import OpFlow, decode_flow
from hetcomp.ir import ops
from hetcomp.ir.annotations import Cost, PhaseCost, Schedule
from hetcomp.ir.plan import Call, Op, Plan, Template
from tests.reference.plan_builder import tiny_plan

NORM, LINEAR = ops.RmsNorm(64, 1e-6), ops.Linear(64, 64)


def _op(id: str, attrs: ops.Attrs, barrier: bool = True, kib: float = 1) -> Op:
    cost = Cost((PhaseCost("decode", 1, 0.0, 0.0, kib * 1024, 0.0, 0.0, 0.0, "memory"),))
    return Op(id, attrs, (), (), cost=cost, schedule=Schedule("cpu:0", 0, barrier))


def _plan(**templates: list[Op]) -> Plan:
    """A plan that calls the templates in order, "layer" twice."""
    calls = [name for name in templates for _ in range(2 if name == "layer" else 1)]
    return replace(
        tiny_plan(),
        templates=tuple(Template(name, (), tuple(body), (), ()) for name, body in templates.items()),
        calls=tuple(Call(name, None, (), ()) for name in calls),
    )


def _marks(plan: Plan) -> str:
    """Ops in order: { begins, ( resumes, } ends, ) stays open, ' follows, - inside or outside of runs."""

    def mark(flow: OpFlow) -> str:
        begin = "{" if flow.begins else "(" if flow.resumes else "'" if flow.follows else ""
        return f"{begin}-{'}' if flow.ends else ')' if flow.stays_open else ''}"

    flows = decode_flow(plan)
    return "|".join("".join(mark(flows[t.name, op.id]) for op in t.ops) for t in plan.templates)


def test_a_run_is_closed_before_the_next_shared_op():
    body = [_op("q", LINEAR), _op("a", NORM), _op("b", NORM, barrier=False), _op("c", NORM), _op("o", LINEAR)]
    assert _marks(_plan(layer=body)) == "-{---}'-"


def test_a_run_needs_a_barrier_to_begin_at():
    body = [_op("q", LINEAR), _op("a", NORM, barrier=False), _op("b", NORM)]
    assert _marks(_plan(layer=body)) == "--{-}"


def test_large_ops_and_ops_without_costs_are_shared():
    unknown = replace(_op("c", NORM), cost=None)
    assert _marks(_plan(layer=[_op("a", NORM), _op("b", NORM, kib=65), unknown])) == "{-}'--"


def test_runs_go_on_over_templates_where_all_callers_agree():
    layer = [_op("a", NORM), _op("q", LINEAR), _op("b", NORM)]
    assert _marks(_plan(first=[_op("e", NORM)], layer=layer, last=[_op("f", NORM)])) == "{-)|(-}'-{-)|(-}"
    # The last template begins with a shared op: the layers before it cannot leave their runs open, nor can the first.
    assert _marks(_plan(first=[_op("e", NORM)], layer=layer, last=[_op("h", LINEAR)])) == "{-}|{-}'-{-}|-"


def test_the_first_template_resumes_nothing_and_the_last_leaves_nothing_open():
    assert _marks(_plan(layer=[_op("a", NORM)])) == "{-}"
