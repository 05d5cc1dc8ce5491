"""The Plan: JSON there and back, the printer, and a verifier that catches each broken invariant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import ExpertPlacement, NodeSlice, Placement
from hetcomp.ir.plan import Op, Plan, Template
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, plan_hash, to_json
from hetcomp.ir.verifier import verify
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import context, tiny_plan


@pytest.fixture(scope="module")
def planned() -> Plan:
    return run_pipeline(tiny_plan(), context())


def test_json_round_trip(planned: Plan):
    assert from_json(to_json(planned)) == planned
    assert plan_hash(from_json(to_json(planned))) == plan_hash(planned)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=[2, 0]), "schema"),
        (
            lambda d: d["templates"][0]["ops"][0]["attrs"].update(kind="teleport"),
            r"damaged at templates\.0\.ops\.0",
        ),
        (lambda d: d["calls"][1].pop("args"), r"damaged at calls\.1\.args"),
        (lambda d: d.update(dims=7), "damaged at dims"),
    ],
)
def test_damaged_json_names_the_place(planned: Plan, change, words):
    document = json.loads(to_json(planned))
    change(document)
    with pytest.raises(HetcompError, match=words):
        from_json(json.dumps(document))


def test_text_that_is_no_json():
    with pytest.raises(HetcompError, match="not valid JSON"):
        from_json('{"schema": [1, 0], ')


def test_printed_plan(planned: Plan, golden):
    golden(Path(__file__).parents[1] / "golden" / "tiny_plan.txt", print_plan(planned))


def change_op(plan: Plan, template: str, op: str, **fields: object) -> Plan:
    def edit(o: Op) -> Op:
        return replace(o, **fields) if o.id == op else o

    t = plan.template(template)
    return plan.map_templates({template: replace(t, ops=tuple(edit(o) for o in t.ops))})


def change_template(plan: Plan, name: str, **fields: object) -> Plan:
    return plan.map_templates({name: replace(plan.template(name), **fields)})


def change_placement(plan: Plan, op: str, placement: Placement | None) -> Plan:
    placements = tuple(
        (name, placement if name == op and placement else p)
        for name, p in plan.calls[1].placements
        if name != op or placement
    )
    return replace(plan, calls=(plan.calls[0], replace(plan.calls[1], placements=placements), *plan.calls[2:]))


def moved(template: Template, value: str, onto: str) -> tuple:
    target = next(s for s in template.arena if s.value == onto)
    return tuple(replace(s, offset=target.offset) if s.value == value else s for s in template.arena)


def scheduled_without(plan: Plan, op: str) -> Plan:
    found = next(o for o in plan.template("layer_0").ops if o.id == op)
    return change_op(plan, "layer_0", op, schedule=replace(found.schedule, barrier_before=False))


BREAKAGES = {
    "reads .*nothing defines": lambda p: change_op(p, "layer_0", "o", inputs=("nowhere", "o.w")),
    "already defined": lambda p: change_op(p, "layer_0", "k", outputs=("q",)),
    "expected 64 elements a row": lambda p: change_op(p, "layer_0", "y", inputs=("mid", "logits")),
    "expected 2 and 1": lambda p: change_op(p, "layer_0", "o", inputs=("attended",)),
    "hands out": lambda p: change_template(p, "layer_0", results=("nowhere",)),
    "binds 10 values to 11": lambda p: replace(
        p, calls=(p.calls[0], replace(p.calls[1], args=p.calls[1].args[:-1]), *p.calls[2:])
    ),
    "no call before it writes": lambda p: replace(p, calls=(p.calls[0], *p.calls[2:])),
    "binds l0.router.w": lambda p: replace(
        p,
        calls=(
            p.calls[0],
            replace(p.calls[1], args=(*p.calls[1].args[:5], "l0.router.w", *p.calls[1].args[6:])),
            *p.calls[2:],
        ),
    ),
    "is not bound": lambda p: replace(
        p, values=tuple(replace(v, source=None) if v.id == "l0.q.w" else v for v in p.values)
    ),
    "has no format": lambda p: replace(
        p, values=tuple(replace(v, format=None) if v.id == "l0.q.w" else v for v in p.values)
    ),
    "has no cost": lambda p: change_op(p, "layer_0", "o", cost=None),
    "has no placement": lambda p: change_placement(p, "o", None),
    "expert 5 has no single home": lambda p: change_placement(
        p, "experts", Placement("cpu:0", (ExpertPlacement(0, 4, "cpu:0"), ExpertPlacement(6, 7, "cpu:0")))
    ),
    "only 6 experts are placed": lambda p: change_placement(
        p, "experts", Placement("cpu:0", (ExpertPlacement(0, 5, "cpu:0"),))
    ),
    "gap or overlap": lambda p: change_placement(p, "o", Placement("cpu:0", (), (NodeSlice(0, 16, 64),))),
    "without a transfer": lambda p: change_placement(p, "o", Placement("gpu:0")),
    "no place in its lane": lambda p: change_op(p, "layer_0", "o", schedule=None),
    "without a barrier after its writer": lambda p: scheduled_without(p, "attend"),
    "begins a template without": lambda p: scheduled_without(p, "norm"),
    "no place in the arena": lambda p: change_template(p, "layer_0", arena=p.template("layer_0").arena[1:]),
    "share memory while both": lambda p: change_template(p, "layer_0", arena=moved(p.template("layer_0"), "q", "k")),
    "lies outside": lambda p: replace(p, arena_bytes=p.arena_bytes // 2),
    "no predicted timeline": lambda p: replace(p, timelines=()),
}


def test_the_plan_itself_is_sound(planned: Plan):
    verify(planned)


@pytest.mark.parametrize("words", BREAKAGES)
def test_every_breakage_is_caught(planned: Plan, words: str):
    with pytest.raises(HetcompError, match=words):
        verify(BREAKAGES[words](planned))
