"""Experts that are streamed in waves through few slots: the pass, the GPU's program, and what is predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.backends.gpu.expert_stream import TABLES
from hetcomp.backends.gpu.gpu_program import GpuProgram, lower_programs
from hetcomp.cli.plan_figures import RING, device_memory
from hetcomp.compiler import plan_model
from hetcomp.ir.annotations import Mix, Placement, StreamRates
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.ops import Linear
from hetcomp.ir.plan import Call, Op, Plan
from hetcomp.passes import simulate
from hetcomp.passes.lane_tasks import StepTasks
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.phases import phases
from hetcomp.passes.placement_candidates import ROUTERS_FIRST
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned

EXPERTS, LAYERS = 32, 6
# An expert costs the CPU a hundred times as much as a copy.
ALL = StreamRates(1.0, 100.0, ((1, 5000.0), (64, 5000.0)), ((1, 1.0), (64, 1.0)))


def planned(room: int) -> Planned:
    """demo-moe with all experts on the CPU, and ``room`` bytes of the GPU beside what its runtime takes."""
    return plan_model(
        "demo-moe",
        hw_profile="preset:9950x-64gb+rtx4090",
        formats="q4",
        isa=["avx2"],
        context_length=512,
        wishes=PlanWishes(vram=GPU_RESERVE + room, pins=("*=gpu:0", "moe.experts=cpu")),
    )


@pytest.fixture(scope="module")
def ample() -> Planned:
    return planned(8 << 30)


def in_waves_of(found: Planned, slots: int) -> Planned:
    assert found.plan.stream is not None
    return replace(found, plan=replace(found.plan, stream=replace(found.plan.stream, slots=slots)))


def test_the_plan_says_how_experts_are_streamed_and_what_their_slots_take(ample):
    assert ample.plan.stream is not None and ample.plan.stream.slots == EXPERTS
    (note,) = (n for n in ample.plan.notes if n.startswith("prompts:"))
    assert f"up to {EXPERTS} experts of a layer are streamed to gpu:0, in waves of {EXPERTS} (64 slots" in note
    (program,) = lower_programs(ample.plan)
    taken = sum(b.bytes for b in program.buffers() if b.kind == "stream" and b.name != TABLES)
    (on_gpu,) = (m for m in device_memory(ample.plan, None) if m.device == "gpu:0")
    assert dict(on_gpu.parts)[RING] == taken


def test_a_gpu_with_less_room_has_smaller_waves_for_all_experts(ample):
    assert ample.plan.stream is not None
    (program,) = lower_programs(ample.plan)
    assert program.stream is not None
    expert = sum(operand.bytes for operand in program.stream.layers[0].operands)
    found = planned(8 * 2 * 20 * expert)  # an eighth of it is for slots, two for each expert of a wave
    assert found.plan.stream is not None and found.plan.stream.slots == 20
    (program,) = lower_programs(found.plan)
    assert program.stream is not None and [layer.waves for layer in program.stream.layers] == [2] * LAYERS


def place_of(program: GpuProgram, waves: int) -> list[tuple[int, ...]]:
    """Rows of the tables by layer."""
    assert program.stream is not None
    layers = program.stream.layers
    return [
        tuple(program.stream.table(layer, w) // program.stream.row_bytes for w in range(waves + 1)) for layer in layers
    ]


@pytest.mark.parametrize("slots", [5, 11, EXPERTS])
def test_every_wave_has_flags_and_a_table_of_its_own(ample, slots):
    (program,) = lower_programs(in_waves_of(ample, slots).plan)
    stream, waves = program.stream, -(-EXPERTS // slots)
    assert stream is not None and (stream.slots, stream.wave) == (2 * slots, slots)
    flags = [layer.flag + wave for layer in stream.layers for wave in range(waves)]
    assert flags == list(range(LAYERS, LAYERS + LAYERS * waves)) and stream.first_flag == LAYERS
    rows = [row for layer in place_of(program, waves) for row in layer]
    assert rows == list(range(1, 1 + LAYERS * (waves + 1)))
    assert stream.tables_bytes == (rows[-1] + 1) * stream.row_bytes
    for graph in program.graphs:
        handed = [n["hand_over"] for n in graph.nodes if "hand_over" in n and n["hand_over"]["flag"] >= LAYERS]
        assert [h["flag"] for h in handed] == ([] if graph.rows.exact else [f for f in flags for _ in range(2)])
        assert [h["to"] for h in handed[::2]] == ["gpu:0"] * (len(handed) // 2)  # it has come, then it is computed
        assert [h["to"] for h in handed[1::2]] == ["cpu"] * (len(handed) // 2)


@pytest.mark.parametrize("slots", [5, EXPERTS])
def test_the_prediction_streams_every_expert_however_few_slots_there_are(ample, slots):
    found = in_waves_of(ample, slots).plan
    assert found.stream is not None
    plan = replace(found, stream=replace(found.stream, rates=ALL))
    steps = phases(plan)
    phase = next(i for i, step in enumerate(steps) if step.name == "prefill")
    tasks = StepTasks(plan, phase, steps[phase], ample.context).tasks(0)
    copies = [task for task in tasks if task.lane == "gpu:0 copy weights"]
    # Of 5 + 5 slots two are left until the routing is known: the second wave comes in two parts.
    assert len(copies) == LAYERS * (-(-EXPERTS // slots) + (slots < EXPERTS))
    (program,) = lower_programs(plan)
    assert program.stream is not None
    whole = sum(operand.bytes for layer in program.stream.layers for operand in layer.operands) * EXPERTS
    assert sum(task.us * task.gb_per_s * 1e3 for task in copies) == pytest.approx(whole, rel=1e-6)
    assert not any(task.lane.startswith("cpu") and task.role == "moe.experts" for task in tasks)
    timeline = simulate.timeline(plan, phase, steps[phase], ample.context)
    assert timeline.total_us >= sum(task.us for task in copies)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_routers_stay_on_a_gpu_without_room_for_all_dense_weights_so_that_prompts_stream():
    # 1.2 GB of dense weights in q4; a router gains less a byte in decode than anything else.
    found = plan_model(
        "qwen1.5-moe-a2.7b",
        hw_profile="preset:9950x-64gb+rtx4090",
        formats="q4",
        isa=["avx2"],
        context_length=1024,
        wishes=PlanWishes(vram=GPU_RESERVE + (1000 << 20), mix=Mix(512, 64)),
        stop_after="stream_experts",
    ).plan
    linears = {memory_of(p.device) for c in found.calls for op, p in _placed(found, c) if isinstance(op.attrs, Linear)}
    assert found.stream is not None and linears == {CPU, "gpu:0"}
    assert {memory_of(p.device) for call in found.calls for op, p in _placed(found, call) if p.experts} == {"gpu:0"}
    assert found.solution is not None and found.solution.chosen == ROUTERS_FIRST
    others = min(c.mix_us for c in found.solution.candidates if c.method != ROUTERS_FIRST)
    assert next(c.mix_us for c in found.solution.candidates if c.method == ROUTERS_FIRST) < 0.98 * others


def _placed(plan: Plan, call: Call) -> list[tuple[Op, Placement]]:
    placements = dict(call.placements)
    return [(op, placements[op.id]) for op in plan.template(call.template).ops]
