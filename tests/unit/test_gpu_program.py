"""Plans with a GPU, lowered: what each side does, and that both count the same hand-overs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from hetcomp.backends.exchange import EXPERT_SUM, Exchange
from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.backends.gpu.step_events import AskExperts, AwaitExperts, Run, SomeExperts, step_events
from hetcomp.backends.program import ProgramLayout, render_program
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import select_kernels
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir.flat_ops import flat_ops
from hetcomp.ir.node_parts import cut_weights, gpu_cut_weights
from hetcomp.ir.serialise import to_json
from hetcomp.ir.verifier import verify
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned
from hetcomp.replay import replay

DEMO = "demo-moe"
ALL = ("*=gpu:0",)
EXPERTS_ON_CPU = (*ALL, "moe.experts=cpu")
SOME_LAYERS_ON_CPU = (*ALL, "attn@2-3=cpu", "moe@2-3=cpu")


def planned(
    pins: tuple[str, ...] = (),
    vram: int | tuple[int, ...] = 8 << 30,
    max_batch: int = 1,
    hw: str = "preset:9950x-64gb+rtx4090",
) -> Planned:
    return plan_model(
        DEMO,
        hw_profile=hw,
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


def flags_of_kernels(graph) -> list[tuple[str, list[int], list[tuple[str, str]]]]:
    """Of those that hand over by themselves: function, and the flags' numbers and ends."""
    found = []
    for node in graph.nodes:
        flags = [a for a in node.get("arguments", ()) if "flag" in a]
        if flags:
            function = graph.kernels[node["kernel"]].function
            found.append((function, [f["flag"] for f in flags], [(f["from"], f["to"]) for f in flags]))
    return found


@pytest.mark.parametrize("pins", [EXPERTS_ON_CPU, SOME_LAYERS_ON_CPU])
def test_every_graph_asks_and_awaits_every_hand_over_once_in_the_cpus_order(pins):
    (program,) = lower_programs(planned(pins).plan)
    everything = [h.flag for h in program.exchange.hand_overs]
    assert everything == list(range(len(everything))) and everything
    answered = [h.flag for h in program.exchange.hand_overs if h.answered or h.giver == "cpu"]
    for graph in program.graphs:
        layers = program.stream.layers if program.stream and not graph.rows.exact else ()
        streamed = [layer.flag + wave for layer in layers for wave in range(layer.waves)]
        assert sorted(flags_of(graph, "cpu")) == [*everything, *streamed]
        assert sorted(flags_of(graph, "gpu:0")) == [*answered, *streamed]
        assert [flag for flag in flags_of(graph, "cpu") if flag in everything] == everything
        assert [flag for flag in flags_of(graph, "gpu:0") if flag in answered] == answered
        # In line, so that the arena's reuse is right.
        assert [node["after"] for node in graph.nodes] == [[], *([i] for i in range(len(graph.nodes) - 1))]


def test_without_a_gpu_in_the_plan_there_is_no_program():
    assert lower_programs(planned(vram=0).plan) == ()


def test_everything_on_the_gpu_leaves_the_cpu_nothing():
    plan = planned(ALL).plan
    layout, exchange = ProgramLayout.of(plan), Exchange.of(plan)
    assert layout.weights == () and layout.states == () and exchange.hand_overs == ()
    assert plan.arena_bytes == 0


def test_experts_on_the_cpu_are_its_only_weights(experts_on_cpu):
    layout = ProgramLayout.of(experts_on_cpu.plan)
    assert layout.states == ()
    assert {w.type.shape[0] for w in layout.weights} == {32} and len(layout.weights) == 2 * 6
    (program,) = lower_programs(experts_on_cpu.plan)
    assert sum(place.buffer == "states" for place in program.places.values()) == 2 * 6
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
    (program,) = lower_programs(plan)
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
    (program,) = lower_programs(planned(ALL, max_batch=3).plan)
    rows = [(g.rows.count, g.rows.exact) for g in program.graphs]
    assert rows == [(1, True), (2, True), (4, True), (64, False), (512, False)]


def test_values_that_live_together_do_not_share_memory(experts_on_cpu):
    """Every kernel's operands are apart: an output overlaps an input only in place, which no launch here does."""
    (program,) = lower_programs(experts_on_cpu.plan)
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
    (program,) = lower_programs(again)
    assert len(program.constants) == 128


def test_steps_of_decoding_wait_only_where_a_choice_is_on_the_cpu(experts_on_cpu):
    (program,) = lower_programs(split_experts(experts_on_cpu).plan)
    flags = [h.flag for h in program.exchange.hand_overs]
    assert program.exchange.optional == set(flags) and len(flags) > 2
    asked, answered = ("gpu:0", "cpu"), ("cpu", "gpu:0")
    want = [("ask", [0], [asked]), ("add_missing", [0], [answered])]
    for flag in flags[1:]:  # the set of buffers of the one before is the next one's again
        want += [("ask", [flag], [asked]), ("add_missing", [flag, flag - 1], [answered, answered])]
    carriers = program.exchange.carriers
    for one, next_one, again in zip(flags, flags[1:], flags[2:], strict=False):
        assert carriers[one, "ids"] == carriers[again, "ids"] != carriers[next_one, "ids"]
    exact = [graph for graph in program.graphs if graph.rows.exact]
    assert exact
    for graph in exact:
        assert flags_of_kernels(graph) == want
        assert flags_of(graph, "cpu") == flags_of(graph, "gpu:0") == []
        # Residual additions of the experts' sums are theirs: only the attentions' are left.
        assert sum(step.ops[0].attrs.kind == "add" for step in graph.groups) <= len(flags)
    for graph in program.graphs:
        if not graph.rows.exact:
            assert flags_of_kernels(graph) == []
            assert set(flags) <= set(flags_of(graph, "cpu"))


def test_what_always_has_an_answer_is_awaited_by_the_graph(experts_on_cpu):
    (program,) = lower_programs(experts_on_cpu.plan)
    assert program.exchange.hand_overs and not program.exchange.optional
    assert all(flags_of_kernels(graph) == [] for graph in program.graphs)


LAYERS_ON_TWO = ("embed=gpu:0", "*@0-2=gpu:0", "*@3-5=gpu:1", "final_norm=gpu:1", "lm_head=gpu:1")


@pytest.fixture(scope="module")
def on_two_gpus() -> Planned:
    """Layers on both GPUs, experts of the first and the last on the CPU."""
    return planned((*LAYERS_ON_TWO, "moe.experts@0=cpu", "moe.experts@5=cpu"), hw="preset:9950x-64gb+2xrtx4090")


def ends_of(graph) -> list[tuple[int, str, str]]:
    handed = (node["hand_over"] for node in graph.nodes if "hand_over" in node)
    return [(h["flag"], h["from"], h["to"]) for h in handed]


@pytest.mark.parametrize("at_once", [32, 9])
def test_what_one_gpu_gives_the_other_awaits_at_the_same_place_of_the_order(on_two_gpus, at_once):
    plan = on_two_gpus.plan
    assert plan.stream is not None
    first, second = lower_programs(replace(plan, stream=replace(plan.stream, slots=at_once)))
    assert (first.device, second.device) == ("gpu:0", "gpu:1")
    everything = first.exchange.hand_overs
    assert [h.flag for h in everything] == list(range(len(everything)))
    between = [(h.flag, h.giver, h.taker) for h in everything if "cpu" not in (h.giver, h.taker)]
    assert between and {h[1:] for h in between} == {("gpu:0", "gpu:1")}
    for a, b in zip(first.graphs, second.graphs, strict=True):
        assert a.rows == b.rows
        ours, theirs = ends_of(a), ends_of(b)
        assert [h for h in ours if h[2] == "gpu:1"] == [h for h in theirs if h[1] == "gpu:0"] == between
        streams = [p.stream for p in (first, second) if p.stream is not None and not a.rows.exact]
        layers = [layer for stream in streams for layer in stream.layers]
        streamed = [layer.flag + wave for layer in layers for wave in range(layer.waves)]
        behind = range(len(everything), len(everything) + len(streamed))
        assert streamed == list(behind)
        assert {flag for flag, _, _ in (*ours, *theirs)} == {*(h.flag for h in everything), *behind}
        for ends in (ours, theirs):
            assert (flags := [f for f, _, _ in ends if f not in behind]) == sorted(flags)


def test_each_gpu_has_its_own_layers_and_the_results_are_where_the_logits_are(on_two_gpus):
    first, second = lower_programs(on_two_gpus.plan)
    mine, theirs = ({w.fqn for w in p.weights if w.fqn} for p in (first, second))
    assert mine & theirs == {"model.embed_tokens.weight"}  # tied: the embedding's and the output's
    for program in (first, second):
        assert sum(place.buffer == "states" for place in program.places.values()) == 2 * 3
    names = [{b.name: b.kind for b in p.buffers()} for p in (first, second)]
    assert "logits" not in names[0] and names[1]["logits"] == "result" and names[1]["best"] == "pinned_out"
    assert names[0]["ids"] == "step" and "ids" not in names[1]  # the embedding's alone
    assert names[0]["positions"] == names[1]["positions"] == names[1]["logit_rows"] == "step"
    crossing = {name for name in names[0].keys() & names[1].keys() if name.startswith("transfer")}
    assert crossing and all(names[0][n] == "pinned_out" and names[1][n] == "pinned_in" for n in crossing)


def test_rope_tables_cross_to_the_other_gpu_once(on_two_gpus):
    crossing = [h for h in lower_programs(on_two_gpus.plan)[0].exchange.hand_overs if h.taker == "gpu:1"]
    assert len(crossing) == 3  # the residual stream, cosines and sines


def test_the_cpu_has_no_part_in_what_gpus_hand_to_each_other(on_two_gpus):
    exchange = Exchange.of(on_two_gpus.plan)
    assert all(name.startswith("experts") for name in exchange.of_side("cpu"))
    kernels = select_kernels(on_two_gpus.plan, on_two_gpus.target, Isa.AVX2)
    source = render_program(on_two_gpus.plan, kernels, Isa.AVX2, "0" * 64)
    flags = [h.flag for h in exchange.hand_overs if h.taker == "cpu"]
    assert len(flags) == 2 and all(f"std::uint32_t{{{flag}}}" in source for flag in flags)
    assert f"4, {len(exchange.hand_overs)}, kAdaptable, " in source  # buffers, hand-overs


def test_without_the_cpu_its_program_has_no_hand_overs():
    plan = planned(LAYERS_ON_TWO, hw="preset:9950x-64gb+2xrtx4090")
    exchange = Exchange.of(plan.plan)
    assert exchange.hand_overs and not exchange.with_cpu() and exchange.of_side("cpu") == {}
    source = render_program(plan.plan, select_kernels(plan.plan, plan.target, Isa.AVX2), Isa.AVX2, "0" * 64)
    assert "0, 0, nullptr, 0, 0, run," in source and "await_gpu" not in source


def test_vram_needs_one_figure_or_one_a_gpu():
    with pytest.raises(HetcompError, match=r"--vram has 3 sizes, profile .*2xrtx4090 2 GPUs"):
        planned(vram=(1 << 30, 2 << 30, 0), hw="preset:9950x-64gb+2xrtx4090")


def test_a_gpu_without_memory_to_use_takes_no_part():
    plan = planned(vram=(0, 8 << 30), hw="preset:9950x-64gb+2xrtx4090").plan
    (program,) = lower_programs(plan)
    assert (program.device, program.number) == ("gpu:1", 1)


def test_a_plan_with_copies_on_a_second_gpu_is_compiled_as_it_stands(on_two_gpus, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(to_json(on_two_gpus.plan))
    again = replay(path, on_two_gpus.imported.plan, on_two_gpus.context)
    assert [p.device for p in lower_programs(again)] == ["gpu:0", "gpu:1"]
