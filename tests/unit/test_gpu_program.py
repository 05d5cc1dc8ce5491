"""Plans with a GPU, lowered: what each side does, and that both count the same hand-overs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hetcomp.backends.exchange import EXPERT_SUM, Exchange
from hetcomp.backends.gpu.flat_ops import flat_ops
from hetcomp.backends.gpu.gpu_program import lower_program
from hetcomp.backends.gpu.step_events import AskExperts, AwaitExperts, Run, SomeExperts, step_events
from hetcomp.backends.program import ProgramLayout, render_program
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import select_kernels
from hetcomp.compiler import PlanWishes, plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir.cpu_side import CpuRole
from hetcomp.ir.node_parts import cut_weights, gpu_cut_weights
from hetcomp.ir.serialise import to_json
from hetcomp.ir.verifier import verify
from hetcomp.planned import Planned
from hetcomp.replay import replay

DEMO = "demo-moe"
ALL = ("*=gpu:0",)
EXPERTS_ON_CPU = (*ALL, "moe.experts=cpu")
SOME_LAYERS_ON_CPU = (*ALL, "attn@2-3=cpu", "moe@2-3=cpu")


def planned(pins: tuple[str, ...] = (), vram: int = 8 << 30, max_batch: int = 1) -> Planned:
    return plan_model(
        DEMO,
        hw_profile="preset:9950x-64gb+rtx4090",
        max_batch=max_batch,
        formats="q4",
        isa=["avx2"],
        context_length=512,
        wishes=PlanWishes(vram=vram, pins=pins),
    )


def split_experts(found: Planned) -> Planned:
    """The plan with the experts of every layer on both sides, as a user may edit it."""
    calls = []
    for call in found.plan.calls:
        placements = []
        for op, placement in call.placements:
            if placement.experts:
                (run,) = placement.experts
                cut = run.last // 3
                homes = (replace(run, last=cut, device="gpu:0"), replace(run, first=cut + 1, device="cpu:0"))
                placement = replace(placement, experts=homes)
            placements.append((op, placement))
        calls.append(replace(call, placements=tuple(placements)))
    return replace(found, plan=replace(found.plan, calls=tuple(calls)))


@pytest.fixture(scope="module")
def experts_on_cpu() -> Planned:
    return planned(EXPERTS_ON_CPU)


def flags_of(graph, direction: str) -> list[int]:
    handed = (node["hand_over"] for node in graph.nodes if "hand_over" in node)
    return [h["flag"] for h in handed if h["to"] == direction]


@pytest.mark.parametrize("pins", [EXPERTS_ON_CPU, SOME_LAYERS_ON_CPU])
def test_every_graph_asks_and_awaits_every_hand_over_once_in_the_cpus_order(pins):
    program = lower_program(planned(pins).plan)
    assert program is not None
    everything = [h.flag for h in program.exchange.hand_overs]
    assert everything == list(range(len(everything))) and everything
    answered = [h.flag for h in program.exchange.hand_overs if h.role is not CpuRole.AWAIT]
    for graph in program.graphs:
        assert flags_of(graph, "cpu") == everything
        streamed = [layer.flag for layer in program.stream.layers] if program.stream and not graph.rows.exact else []
        assert sorted(flags_of(graph, "gpu")) == [*answered, *streamed]
        assert [flag for flag in flags_of(graph, "gpu") if flag in answered] == answered
        # In line, so that the arena's reuse is right.
        assert [node["after"] for node in graph.nodes] == [[], *([i] for i in range(len(graph.nodes) - 1))]


def test_without_a_gpu_in_the_plan_there_is_no_program():
    assert lower_program(planned(vram=0).plan) is None


def test_everything_on_the_gpu_leaves_the_cpu_nothing():
    plan = planned(ALL).plan
    layout, exchange = ProgramLayout.of(plan), Exchange.of(plan)
    assert layout.weights == () and layout.states == () and exchange.hand_overs == ()
    assert plan.arena_bytes == 0


def test_experts_on_the_cpu_are_its_only_weights(experts_on_cpu):
    layout = ProgramLayout.of(experts_on_cpu.plan)
    assert layout.states == ()
    assert {w.type.shape[0] for w in layout.weights} == {32} and len(layout.weights) == 2 * 6
    program = lower_program(experts_on_cpu.plan)
    assert program is not None and sum(place.buffer == "states" for place in program.places.values()) == 2 * 6
    whole = {w.id.partition("@")[0] for w in layout.weights}
    assert not whole & {w.id for w in program.weights}


def test_split_experts_are_on_one_side_each(experts_on_cpu):
    plan = split_experts(experts_on_cpu).plan
    verify(plan)
    cpu, gpu = cut_weights(plan), gpu_cut_weights(plan)
    assert set(cpu) == set(gpu) and len(gpu) == 2 * 6
    for name, parts in cpu.items():
        mine = [e for start, stop in gpu[name][1].runs for e in range(start, stop)]
        theirs = [e for _, cut, _ in parts for start, stop in cut.runs for e in range(start, stop)]
        assert sorted([*mine, *theirs]) == list(range(32))
    program = lower_program(plan)
    assert program is not None
    # One table for all layers: which of the experts are here, at which place.
    assert len(program.constants) == 128
    assert program.constants == b"".join((i if i <= 10 else -1).to_bytes(4, "little", signed=True) for i in range(32))


def test_the_sum_is_awaited_after_what_runs_beside_the_experts(experts_on_cpu):
    plan = split_experts(experts_on_cpu).plan
    ops, _ = flat_ops(plan)
    events = step_events(ops, Exchange.of(plan), "gpu:0")
    kinds = [type(event) for event in events]
    first = kinds.index(AskExperts)
    shared = [op.role for event in events if isinstance(event, Run) for op in event.ops if "shared" in op.role]
    assert kinds[first + 1] is SomeExperts
    if shared:  # the model has a shared expert
        between = events[first + 2]
        assert isinstance(between, Run) and any("shared" in op.role for op in between.ops)
    assert Counter(kinds)[AskExperts] == Counter(kinds)[AwaitExperts] == Counter(kinds)[SomeExperts] == 6


def test_layers_share_the_buffers_of_their_experts(experts_on_cpu):
    exchange = Exchange.of(experts_on_cpu.plan)
    assert len(exchange.hand_overs) == 6
    assert len(exchange.buffers) == 4
    sums = {exchange.buffer(h, EXPERT_SUM).name for h in exchange.hand_overs}
    assert len(sums) == 1


def test_decode_graphs_are_powers_of_two_up_to_the_batch_and_prompts_have_bounds():
    program = lower_program(planned(ALL, max_batch=3).plan)
    assert program is not None
    rows = [(g.rows.count, g.rows.exact) for g in program.graphs]
    assert rows == [(1, True), (2, True), (4, True), (64, False), (512, False)]


def test_values_that_live_together_do_not_share_memory(experts_on_cpu):
    """Every kernel's operands are apart: an output overlaps an input only in place, which no launch here does."""
    program = lower_program(experts_on_cpu.plan)
    assert program is not None
    size = {buffer.name: buffer.bytes for buffer in program.buffers()}
    for graph in program.graphs:
        for node in graph.nodes:
            places = [(a["buffer"], a["offset"]) for a in node.get("arguments", ()) if "buffer" in a]
            assert all(offset < size[buffer] and offset % 16 == 0 for buffer, offset in places)
            arena = [offset for buffer, offset in places if buffer == "arena"]
            assert len(set(arena)) == len(arena), node["kernel"]


def test_the_cpus_program_awaits_and_answers(experts_on_cpu):
    plan = split_experts(experts_on_cpu).plan
    kernels = select_kernels(plan, experts_on_cpu.target, Isa.AVX2)
    assert len({k.name for k in kernels.values()}) == 1
    source = render_program(plan, kernels, Isa.AVX2, "0" * 64)
    assert source.count("await_gpu(lane, s, flag + 0)") == source.count("answer_gpu(lane, s, flag + 0)") == 1
    assert source.count("std::uint32_t{5}") == 1  # the sixth layer's flag


def test_q8_caches_keep_attention_on_the_cpu_and_the_plan_says_so():
    found = plan_model(
        DEMO,
        hw_profile="preset:9950x-64gb+rtx4090",
        formats={"experts": "q4", "kv": "q8"},
        isa=["avx2"],
        context_length=512,
        wishes=PlanWishes(vram=8 << 30),
    )
    homes = {p.device for call in found.plan.calls for op, p in call.placements if "attention" in op or "append" in op}
    assert homes == {"cpu:0"}
    assert any("stays on the CPU" in note and "q8" in note for note in found.plan.notes)
    with pytest.raises(HetcompError, match=r"is pinned to gpu:0, but .* dtype q8"):
        plan_model(
            DEMO,
            hw_profile="preset:9950x-64gb+rtx4090",
            formats={"kv": "q8"},
            isa=["avx2"],
            context_length=512,
            wishes=PlanWishes(vram=8 << 30, pins=("attn=gpu:0",)),
        )


def test_an_edited_plan_is_compiled_as_it_stands(experts_on_cpu, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(to_json(split_experts(experts_on_cpu).plan))
    again = replay(path, experts_on_cpu.imported.plan, experts_on_cpu.context)
    program = lower_program(again)
    assert program is not None and len(program.constants) == 128
