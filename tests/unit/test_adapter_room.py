"""Room for LoRA adapters in a plan: memory on GPUs, graphs that add pairs, what is predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hetcomp.backends.adapted_ops import pair_bytes
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.gpu_program import GpuProgram, lower_programs
from hetcomp.backends.gpu.low_rank import PAIRS
from hetcomp.cli.plan_figures import ADAPTERS, device_memory
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.ir.serialise import to_json
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned
from hetcomp.replay import replay

ON_GPU, EXPERTS_ON_CPU = ("*=gpu:0",), ("*=gpu:0", "moe.experts=cpu")


def planned(room: AdapterRoom | None, pins: tuple[str, ...] = ON_GPU, vram: int = 8 << 30) -> Planned:
    wishes = PlanWishes(vram=vram, pins=pins, adapter_room=room)
    machine = "preset:9950x-64gb+rtx4090"
    options = {"formats": "q4", "isa": ["avx2"], "context_length": 512}
    return plan_model("demo-moe", hw_profile=machine, wishes=wishes, **options)


def program_of(found: Planned) -> GpuProgram:
    (program,) = lower_programs(found.plan)
    return program


@pytest.fixture(scope="module")
def plain() -> Planned:
    return planned(None)


@pytest.fixture(scope="module")
def roomy() -> Planned:
    return planned(AdapterRoom(4, 16))


def test_steps_without_adapters_run_what_they_would_run_without_room(plain, roomy):
    """The same launches, at other addresses; those with adapters have a launch more for each group of linears and two
    for experts."""
    without, graphs = program_of(plain).graphs, program_of(roomy).graphs
    base, adapted = graphs[: len(without)], graphs[len(without) :]

    def kernels(some) -> list[list[str]]:
        return [[node.get("kernel", "") for node in graph.nodes] for graph in some]

    assert kernels(base) == kernels(without) and not any(graph.adapted for graph in base)
    assert [g.rows for g in adapted] == [g.rows for g in base] and all(graph.adapted for graph in adapted)
    one = adapted[0]
    launched = Counter(node["kernel"].split("_k")[0].split("_n")[0] for node in one.nodes)
    assert len(one.nodes) - len(base[0].nodes) == launched["shrink_bf16"] + launched["shrink_fp32"]
    # q, k and v share one; o; of an MoE layer gate and up, down, the router. The output layer is the embedding's.
    assert launched["shrink_bf16"] + launched["shrink_fp32"] == 5 * roomy.plan.model.layers


def test_the_figure_of_device_memory_is_the_programs(plain, roomy):
    """What the room takes is in the report, in the program's buffers, and in its sum."""
    program = program_of(roomy)
    layout = program.pairs
    assert layout is not None
    pairs = 4 * sum(sum(pair_bytes(shape, 16)) for _, shape in layout.weights)
    assert {b.name: b.bytes for b in program.buffers()}[PAIRS] == pairs == layout.pair_bytes
    (memory,) = [m for m in device_memory(roomy.plan, roomy.profile) if m.device == "gpu:0"]
    assert dict(memory.parts)[ADAPTERS] == pairs + layout.table_bytes
    nothing: list[CompiledKernel] = []
    more = program.device_bytes(nothing) - program_of(plain).device_bytes(nothing)
    assert pairs <= more <= 1.02 * pairs + (1 << 20)  # and what h takes


def test_experts_need_none_where_the_user_wants_no_room_for_them(roomy):
    dense = program_of(planned(AdapterRoom(4, 16, experts=False))).pairs
    whole = program_of(roomy).pairs
    assert dense is not None and whole is not None
    assert dense.pair_bytes < whole.pair_bytes / 4
    assert {v.id for v, _ in dense.weights} < {v.id for v, _ in whole.weights}


def test_streamed_experts_have_their_pairs_on_the_gpu():
    found = planned(AdapterRoom(1, 16), EXPERTS_ON_CPU)
    assert found.plan.stream is not None
    layout = program_of(found).pairs
    assert layout is not None and any(shape.matrices > 1 for _, shape in layout.weights)


def test_room_takes_the_place_of_experts(plain):
    """Where not everything fits, fewer experts do."""
    limit = 640 << 20

    def on_gpu(room: AdapterRoom | None) -> int:
        calls = planned(room, (), limit).plan.calls
        runs = [run for call in calls for _, p in call.placements for run in p.experts]
        return sum(run.last - run.first + 1 for run in runs if run.device == "gpu:0")

    assert on_gpu(AdapterRoom(8, 16)) < on_gpu(None)


def test_decode_with_an_adapter_is_predicted(roomy):
    room, (note,) = roomy.plan.adapter_room, [n for n in roomy.plan.notes if n.startswith("LoRA adapters: room for 4")]
    base = next(t.total_us for t in roomy.plan.timelines if t.phase == "decode")
    assert room is not None and base < room.decode_us < 2 * base
    assert f"{room.decode_us / 1e3:.3f} ms" in note and f"{base / 1e3:.3f} without" in note
    on_cpu, more = (planned(AdapterRoom(1, rank), (), vram=0).plan for rank in (16, 64))
    assert on_cpu.adapter_room is not None and more.adapter_room is not None
    assert on_cpu.timelines[0].total_us < on_cpu.adapter_room.decode_us < more.adapter_room.decode_us


@pytest.mark.parametrize("room", [AdapterRoom(33, 16), AdapterRoom(-1, 16), AdapterRoom(1, 0), AdapterRoom(1, 129)])
def test_what_is_not_possible_is_refused(room):
    with pytest.raises(HetcompError, match=r"is not possible; give --adapter"):
        planned(room)


def test_a_replayed_plan_keeps_its_room(roomy, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(to_json(roomy.plan))
    context = replace(roomy.context, adapter_room=None)
    again = replay(path, roomy.imported.plan, context)
    assert again.adapter_room is not None and again.adapter_room.count == 4
    with pytest.raises(HetcompError, match="leave --adapters out"):
        replay(path, roomy.imported.plan, roomy.context)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("pins", "measured"),
    [
        (ON_GPU, 1.514),  # benchmarks/results/adapter_cost-20261126T144013-749c42e.json
        (EXPERTS_ON_CPU, 1.178),  # adapter_cost-20261126T144324-749c42e.json, with pairs in bf16
    ],
)
def test_what_an_adapter_costs_beside_an_h100_is_predicted(pins, measured):
    """Within 15 % of Qwen3-30B-A3B's time a token with rank 16 on attention and all experts, over the base's."""
    wishes = PlanWishes(pins=pins, adapter_room=AdapterRoom(4, 16))
    options = {"formats": "q4", "isa": ["amx_bf16"], "context_length": 512}
    plan = plan_model("qwen3-30b-a3b", hw_profile="preset:8480-256gb+h100-sxm", wishes=wishes, **options).plan
    assert plan.adapter_room is not None
    base = next(t.total_us for t in plan.timelines if t.phase == "decode")
    assert plan.adapter_room.decode_us / base == pytest.approx(measured, rel=0.15)
