"""The plan report on the hand-built plan: its numbers against numbers counted by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from hetcomp.cli.plan_json import plan_report_json
from hetcomp.cli.plan_report import count, plan_report, size
from hetcomp.cli.plan_summary import summarise
from hetcomp.cli.plan_weights import weight_classes
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, context, tiny_plan

LAYERS = 2


@pytest.fixture
def planned():
    return run_pipeline(tiny_plan(LAYERS), context("bf16"))


def text_of(plan, **options: int) -> str:
    console = Console(width=200, no_color=True, record=True, file=io.StringIO())
    console.print(plan_report(plan, **options))
    return console.export_text()


def group_of(plan, role):
    return next(group for group in summarise(plan).groups if group.role == role)


def test_costs_are_counted_once_a_call(planned):
    experts = group_of(planned, "moe.experts")
    assert experts.ops == LAYERS
    assert experts.phases["decode"].flops == LAYERS * 6 * TOP_K * HIDDEN * WIDTH
    assert experts.phases["decode"].weight_bytes == pytest.approx(LAYERS * TOP_K * 3 * HIDDEN * WIDTH * 2)
    assert experts.weight_bytes == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 2
    assert group_of(planned, "residual").ops == 2 * LAYERS


def test_a_tied_weight_is_counted_once(planned):
    assert group_of(planned, "embed").weight_bytes == VOCAB * HIDDEN * 2
    assert group_of(planned, "lm_head").weight_bytes == 0
    assert group_of(planned, "lm_head").phases["decode"].weight_bytes == VOCAB * HIDDEN * 2


def test_intensity_is_flops_over_all_bytes_moved(planned):
    op = next(o for o in planned.template("layer_0").ops if o.id == "experts")
    assert group_of(planned, "moe.experts").phases["prefill"].intensity == pytest.approx(
        op.cost.phase("prefill").intensity
    )


def test_times_of_the_groups_add_up_to_the_timeline(planned):
    for timeline in planned.timelines:
        whole = sum(group.phases[timeline.phase].us for group in summarise(planned).groups)
        assert whole == pytest.approx(timeline.total_us)


def test_memory_adds_up(planned):
    summary = summarise(planned)
    items = {item.what: item.bytes for item in summary.memory}
    row = 4 * 16
    # slots x heads x context x head_dim, k and v, bf16, two layers
    assert items["KV cache, 2 x 64 positions"] == 2 * row * 64 * 2 * 2 * LAYERS
    assert items["weights, experts, bf16"] == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 2
    assert items["activations, 16 tokens a step"] == planned.arena_bytes
    assert summary.memory_bytes == sum(items.values())


def test_matrices_are_named_with_what_they_are_stored_and_computed_in(planned):
    experts = next(one for one in weight_classes(planned) if one.role == "experts")
    assert (experts.source, experts.source_bits, experts.format, experts.exact) == ("BF16", 16, "bf16", True)
    assert experts.numbers == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH
    assert experts.bits == 16
    rounded = weight_classes(run_pipeline(tiny_plan(LAYERS), context("q8")))
    assert {one.exact for one in rounded if one.role == "experts"} == {False}
    assert "bf16" in text_of(planned)
    document = json.loads(plan_report_json(planned))
    assert sum(one["bytes"] for one in document["matrices"]) == sum(one.bytes for one in weight_classes(planned))


def test_json_has_the_numbers_of_the_table(planned):
    document = json.loads(plan_report_json(planned, available_bytes=10**9))
    assert document["schema"] == [2, 4]
    experts = next(g for g in document["groups"] if g["role"] == "moe.experts")
    decode = next(p for p in experts["phases"] if p["phase"] == "decode")
    assert decode["flops"] == LAYERS * 6 * TOP_K * HIDDEN * WIDTH
    assert experts["devices"] == ["cpu:0"]
    assert document["memory"]["available_bytes"] == 10**9
    predicted = {p["phase"]: p["tokens_per_s"] for p in document["predictions"]}
    assert predicted == {t.phase: t.tokens_per_s for t in planned.timelines}


def test_text_shows_groups_speed_memory_and_notes(planned):
    text = text_of(replace(planned, notes=("warning: a note",)), available_bytes=5_000_000_000)
    for words in ("moe.experts", "cpu:0", "decode batch 2", "tokens/s", "KV cache", "5.00 GB", "note: warning: a note"):
        assert words in text


def test_devices_name_every_node_that_works_on_a_group():
    plan = run_pipeline(tiny_plan(), context("bf16", nodes=2))
    assert group_of(plan, "attn.q").devices == ["cpu:0", "cpu:1"]


@pytest.mark.parametrize("stage", ["lower", "bind_weights", "choose_formats", "annotate_cost", "place", "schedule"])
def test_a_plan_of_any_stage_can_be_reported(stage):
    plan = run_pipeline(tiny_plan(), replace(context("bf16"), checkpoint=None), stop_after=stage)
    assert "moe.experts" in text_of(plan)
    assert json.loads(plan_report_json(plan))["predictions"] == []


def test_before_the_simulation_times_are_the_sums_of_the_costs():
    plan = run_pipeline(tiny_plan(LAYERS), context("bf16"), stop_after="place")
    op = next(o for o in plan.template("layer_0").ops if o.id == "experts")
    assert group_of(plan, "moe.experts").phases["decode"].us == pytest.approx(LAYERS * op.cost.phase("decode").us)


def test_units():
    assert [size(b) for b in (0, 999, 1500, 2_500_000, 3.25e9)] == ["0 B", "999 B", "1.50 kB", "2.50 MB", "3.25 GB"]
    assert [count(n) for n in (768, 1.5e3, 7e6, 2e9, 1e12)] == ["768", "1.50 k", "7.00 M", "2.00 G", "1.00 T"]
