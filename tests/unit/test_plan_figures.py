"""The figures behind the plan's reports, on a plan whose experts are shared by a GPU and the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.cli.plan_figures import (
    GPU_RUNTIME,
    KV_CACHE,
    ClassPoint,
    Figures,
    device_memory,
    figures_of,
    layer_us,
)
from hetcomp.cli.plan_placement import layer_runs
from hetcomp.cli.plan_summary import summarise
from hetcomp.ir.annotations import ExpertPlacement, Placement
from hetcomp.ir.events import Event
from hetcomp.ir.plan import Plan
from hetcomp.passes.annotate_cost import annotate_cost
from hetcomp.passes.bind_weights import bind_weights
from hetcomp.passes.choose_formats import choose_formats
from hetcomp.passes.context import Context
from hetcomp.passes.insert_transfers import insert_transfers
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.plan_memory import plan_memory
from hetcomp.passes.schedule import schedule
from hetcomp.passes.simulate import simulate
from hetcomp.passes.slice_numa import slice_numa
from tests.reference.plan_builder import EXPERTS, GIB, HIDDEN, VOCAB, WIDTH, context, gpu, tiny_plan

LAYERS = 3
ON_GPU = 5  # experts; the next is streamed in prefill, the others stay on the CPU
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2


def shared_context() -> Context:
    return replace(context(gpus=(gpu(2 * GIB),)), use_gpus=True, planning=True)


def shared_plan(layers: int = LAYERS) -> Plan:
    """Everything within layers on the GPU, but for experts; embeddings on the CPU. Placed by hand."""
    ctx = shared_context()
    plan = annotate_cost(choose_formats(bind_weights(tiny_plan(layers), ctx), ctx), ctx)
    runs = (
        ExpertPlacement(0, ON_GPU - 1, "gpu:0"),
        ExpertPlacement(ON_GPU, ON_GPU, "cpu:0", "gpu:0"),
        ExpertPlacement(ON_GPU + 1, EXPERTS - 1, "cpu:0"),
    )
    calls = []
    for call in plan.calls:
        home = "cpu:0" if call.layer is None else "gpu:0"
        placements = [
            (op.id, Placement(home, runs if op.kind == "moe_experts" else ()))
            for op in plan.template(call.template).ops
        ]
        calls.append(replace(call, placements=tuple(placements)))
    placed = replace(plan, calls=tuple(calls), established=(*plan.established, "placed"))
    for step in (slice_numa, insert_transfers, schedule, plan_memory, simulate):
        placed = step(placed, ctx)
    return placed


@pytest.fixture(scope="module")
def plan() -> Plan:
    return shared_plan()


@pytest.fixture(scope="module")
def figures(plan: Plan) -> Figures:
    return figures_of(plan, shared_context().profile)


def test_every_byte_of_weights_and_states_lies_on_one_device(plan, figures):
    parts = {m.device: dict(m.parts) for m in figures.memory}
    assert parts["gpu:0"]["experts, bf16"] == LAYERS * ON_GPU * EXPERT_BYTES
    assert parts["cpu:0"]["experts, bf16"] == LAYERS * (EXPERTS - ON_GPU) * EXPERT_BYTES
    assert parts["cpu:0"]["embedding, bf16"] == VOCAB * HIDDEN * 2
    assert parts["gpu:0"][GPU_RUNTIME] == GPU_RESERVE and KV_CACHE not in parts["cpu:0"]
    placed = sum(size for names in parts.values() for what, size in names.items() if ", " in what)
    assert placed == sum(group.weight_bytes for group in summarise(plan).groups)


def test_limits_are_what_is_free_and_what_the_user_allows(plan, figures):
    machine = shared_context().profile
    assert {m.device: m.limit for m in figures.memory} == {"cpu:0": 8 * GIB, "gpu:0": 2 * GIB}
    limited = {m.device: m.limit for m in device_memory(plan, machine, vram=GIB)}
    assert limited == {"cpu:0": 8 * GIB, "gpu:0": GIB}
    assert [m.limit for m in device_memory(plan, None)] == [None, None]


def test_ridges_are_compute_over_bandwidth(figures):
    cpu, card = figures.roofs
    machine = shared_context().profile
    assert cpu.ridge == pytest.approx(machine.ridge("bf16"))
    assert (card.device, card.gb_per_s) == ("gpu:0", machine.gpus[0].gb_per_s)
    assert [cpu.limit(x) for x in (cpu.ridge * 0.99, cpu.ridge * 1.01)] == ["memory", "compute"]


def points(figures: Figures, role: str, phase: str) -> dict[str, ClassPoint]:
    return {p.device: p for p in figures.points if (p.role, p.phase) == (role, phase)}


def test_flops_of_experts_are_divided_by_where_they_run(plan, figures):
    experts = next(g for g in summarise(plan).groups if g.role == "moe.experts")
    for step, on_gpu in zip(figures.steps, (ON_GPU, ON_GPU + 1), strict=True):
        phase = step.phase.name
        here = points(figures, "moe.experts", phase)
        assert here["gpu:0"].gflops * here["gpu:0"].us * 1e3 == pytest.approx(
            experts.phases[phase].flops * on_gpu / EXPERTS
        )
        assert here["gpu:0"].intensity == pytest.approx(experts.phases[phase].intensity)


def test_often_chosen_experts_take_their_share_of_the_flops(plan):
    often = [[1.0 if e < ON_GPU else 0.0 for e in range(EXPERTS)]] * LAYERS
    experts = next(g for g in summarise(plan).groups if g.role == "moe.experts")
    found = points(figures_of(plan, shared_context().profile, shares=often), "moe.experts", "decode")
    assert found["gpu:0"].gflops * found["gpu:0"].us * 1e3 == pytest.approx(experts.phases["decode"].flops)


def test_layers_hold_the_step_from_end_to_end():
    events = [
        Event("layer 0 a", "a", 0, "cpu:0", 1.0, 2.0),
        Event("layer 0 b", "b", 0, "gpu:0", 2.0, 3.0),
        Event("layer 1 a", "a", 1, "cpu:0", 4.0, 3.0),
        Event("head", "head", None, "cpu:0", 7.0, 9.0),
    ]
    assert layer_us(events) == {0: 4.0, 1: 2.0}


def test_layers_that_are_placed_alike_are_one_run(plan):
    (run,) = layer_runs(plan)
    assert (run.layers, run.dense) == (f"0-{LAYERS - 1}", "gpu:0")
    assert run.experts == "2 on cpu:0, 1 on cpu:0, in prefill streamed to gpu:0, 5 on gpu:0"
    assert dict(run.bytes)["cpu:0"] == LAYERS * (EXPERTS - ON_GPU) * EXPERT_BYTES
    calls = list(plan.calls)
    calls[2] = replace(calls[2], placements=tuple((op, Placement("cpu:0", p.experts)) for op, p in calls[2].placements))
    assert [r.layers for r in layer_runs(replace(plan, calls=tuple(calls)))] == ["0", "1", "2"]
