"""The verifier on what lies between templates: the call arena, formats on both sides of a call, unknown names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import ArenaSlot
from hetcomp.ir.plan import Plan
from hetcomp.ir.verifier import verify
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import context, tiny_plan


@pytest.fixture(scope="module")
def planned() -> Plan:
    return run_pipeline(tiny_plan(), context())


def slots(change: Callable[[tuple[ArenaSlot, ...]], tuple[ArenaSlot, ...]]) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, call_arena=change(plan.call_arena))


def other_format(plan: Plan) -> Plan:
    template = plan.template("layer_0")
    values = tuple(replace(v, format="f32") if v.id == "gate_up.w" else v for v in template.values)
    return plan.map_templates({"layer_0": replace(template, values=values)})


def workspace(plan: Plan, offset: int) -> Plan:
    template = plan.template("layer_0")
    arena = (*template.arena, ArenaSlot("workspace:y", offset, 64))
    return plan.map_templates({"layer_0": replace(template, arena=arena)})


BREAKAGES: dict[str, Callable[[Plan], Plan]] = {
    "h0 and h1 handed from call to call share memory": slots(lambda a: tuple(replace(s, offset=0) for s in a)),
    "handed from call to call, has no place": slots(lambda a: a[1:]),
    "too small or unaligned": slots(lambda a: (replace(a[0], bytes=4), *a[1:])),
    "has too small or unaligned a place": slots(lambda a: (replace(a[0], offset=a[0].offset + 4), *a[1:])),
    "handed from call to call, lies outside": slots(lambda a: (replace(a[0], offset=1 << 40), *a[1:])),
    "is stored as bf16 in panels16, but template layer_0 reads it as f32": other_format,
    "workspace:y of template layer_0 lies outside": lambda p: workspace(p, 0),
    "workspace:y of template layer_0 has an unaligned": lambda p: workspace(p, p.arena_bytes - 65),
    "which the plan does not have": lambda p: replace(p, calls=(replace(p.calls[0], template="lost"), *p.calls[1:])),
    "claims 'perfect', which this hetcomp does not know": lambda p: replace(p, established=("perfect",)),
    "names two templates alike": lambda p: replace(p, templates=(*p.templates, p.templates[0])),
    "parameter ghost, which is none of its values": lambda p: p.map_templates(
        {"layer_0": replace(p.template("layer_0"), params=(*p.template("layer_0").params, "ghost"))}
    ),
}


@pytest.mark.parametrize("words", BREAKAGES)
def test_breakages_are_caught(planned: Plan, words: str):
    verify(planned)
    with pytest.raises(HetcompError, match=words):
        verify(BREAKAGES[words](planned))
