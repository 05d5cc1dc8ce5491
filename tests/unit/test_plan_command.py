"""``hetcomp plan`` as a command: its options, its files, its refusals. The model is planned without torch."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import hetcomp.compiler
from hetcomp.cli.main import app
from hetcomp.cli.plan_json import PlanDocument
from hetcomp.errors import HetcompError
from hetcomp.ir.serialise import from_json
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import GIB, context, tiny_plan
from tests.unit.test_plan_figures import shared_context, shared_plan


@pytest.fixture
def asked(monkeypatch):
    """What plan_model was asked for; the answer is the plan that GPU and CPU share, and on any other machine the same
    plan at twice the speed."""
    seen: dict[str, object] = {}
    ctx = shared_context()

    def planned(speed: float = 1.0):
        plan = shared_plan()
        timelines = tuple(
            replace(t, total_us=t.total_us / speed, tokens_per_s=t.tokens_per_s * speed) for t in plan.timelines
        )
        plan = replace(plan, timelines=timelines)
        return SimpleNamespace(plan=plan, profile=ctx.profile, context=ctx, seconds={"place": 0.25}, target=None)

    def plan_model(model, **options: object):
        seen.update(options, model=model)
        return planned()

    monkeypatch.setattr(hetcomp.compiler, "plan_model", plan_model)
    monkeypatch.setattr(hetcomp.compiler, "replan", lambda before, profile: planned(2.0))
    return seen


def plan(*arguments: object, code: int = 0):
    done = CliRunner().invoke(app, ["plan", "tiny", *map(str, arguments)], terminal_width=100)
    assert done.exit_code == code, done.output
    return done


def test_wishes_reach_the_planner(asked):
    plan(
        "--prompt", 800, "--answer", 100, "--batch", 2, "--vram", "16G", "--pinned", "1.5T", "--pin", "attn=gpu:0",
        "--pin", "moe.experts@1-2=cpu", "--stats", "use.json#code", "--expert-cache", "lfu",
        "--no-improvements",
    )  # fmt: skip
    wishes = asked["wishes"]
    assert (wishes.mix.prompt, wishes.mix.answer, wishes.mix.batch) == (800, 100, 2)
    assert (wishes.vram, wishes.pinned_bytes) == (16 * GIB, 1536 * GIB)
    assert wishes.pins == ("attn=gpu:0", "moe.experts@1-2=cpu") and wishes.statistics == "use.json#code"
    assert wishes.expert_cache == "lfu"


def test_vram_of_each_gpu(asked):
    plan("--vram", "12G,24G,0", "--no-improvements")
    assert asked["wishes"].vram == (12 * GIB, 24 * GIB, 0)


@pytest.mark.parametrize("size", ["lots", "16X", "-3G", "", "12G,", "12G,lots"])
def test_a_bad_size_is_refused_in_one_sentence(asked, size):
    done = plan("--vram", size, code=1)
    assert done.stderr.strip().count("\n") == 0 and "--vram" in done.stderr and "16G" in done.stderr


def test_the_report_fits_a_hundred_columns_and_has_its_parts(asked):
    out = plan("--no-improvements").stdout
    assert max(map(len, out.splitlines())) <= 100
    for words in (
        "Op groups", "Arithmetic intensity", "ridges of bf16", "ridge 6.7", "Predicted speed", "decode waits for",
        "Layers", "0-2", "1 on cpu:0, in prefill", "Memory by device", "ring for streamed experts", "limit", "free",
    ):  # fmt: skip
        assert words in out


def test_plans_are_those_that_are_compiled_unless_others_are_asked_for(asked):
    out = plan("--no-improvements").stdout
    assert asked["planning"] is False and "that hetcomp compile generates code from" in out
    out = plan("--no-improvements", "--explore").stdout
    assert asked["planning"] is True and "explored: may stream" in out and max(map(len, out.splitlines())) <= 100
    assert json.loads(plan("--no-improvements", "--explore", "--json").stdout)["explored"] is True


def test_json_follows_its_schema_and_nothing_else_is_on_stdout(asked):
    out = plan("--json", "--what-if", "dram_bandwidth=2x").stdout
    document = PlanDocument.model_validate_json(out)
    assert json.loads(out)["schema"] == [2, 4] and document.explored is False
    assert [d.device for d in document.devices] == ["cpu:0", "gpu:0"]
    assert all(d.bytes == sum(p.bytes for p in d.parts) for d in document.devices)
    assert [r.ridge == pytest.approx(r.gflops / r.gb_per_s) for r in document.roofs] == [True, True]
    assert [(run.first, run.last) for run in document.layers] == [(0, 2)]
    (variant,) = document.what_if
    before = {p.phase: p.tokens_per_s for p in document.predictions}
    assert variant.tokens_per_s == {phase: pytest.approx(2 * speed) for phase, speed in before.items()}
    assert len(document.improvements) == 3 and document.improvements[0].gain == pytest.approx(1.0)


def test_what_if_shows_before_and_after_in_one_table(asked):
    out = plan("--no-improvements", "--what-if", "dram_bandwidth=2x", "--what-if", "vram=+8G").stdout
    table = out[out.index("What if") :]
    assert "as it is" in table and "dram_bandwidth=2x" in table and "vram=+8G" in table and "(+100%)" in table


def test_unknown_changes_are_refused_with_near_names(asked):
    assert "did you mean dram_bandwidth" in plan("--what-if", "dram_bandwith=2x", code=1).stderr


def test_what_would_help_most_is_named(asked):
    assert plan().stdout.count("would help: ") == 3
    assert "would help" not in plan("--no-improvements").stdout


def test_files_are_written_whole(asked, tmp_path):
    plan("--no-improvements", "--plan-out", tmp_path / "plan.json", "--html", tmp_path / "plan.html")
    assert from_json((tmp_path / "plan.json").read_text()) == shared_plan()
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.html", "plan.json"]


def test_html_of_an_unfinished_plan_is_refused(asked, monkeypatch, tmp_path):
    def unfinished(model, **options: object):
        half = run_pipeline(tiny_plan(), context(), stop_after="place")
        return SimpleNamespace(plan=half, profile=context().profile, context=context(), seconds={})

    monkeypatch.setattr(hetcomp.compiler, "plan_model", unfinished)
    done = plan("--stop-after", "place", "--html", tmp_path / "plan.html", code=1)
    assert "--html draws a simulated plan" in done.stderr and not list(tmp_path.iterdir())


def test_what_does_not_fit_ends_with_the_sentence_alone(monkeypatch):
    def refused(model, **options: object):
        raise HetcompError("tiny does not fit into memory; nothing was read.")

    monkeypatch.setattr(hetcomp.compiler, "plan_model", refused)
    done = plan("--json", code=1)
    assert done.stdout == "" and done.stderr == "hetcomp: tiny does not fit into memory; nothing was read.\n"
