"""Deferral of experts: the pass, its prediction, the plan's checks, and the division of a token's choices."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetcomp import installed_runtime
from hetcomp.compiler import replan
from hetcomp.deferral_on_text import DeferralOnText, deferred_choices
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import DeferralQuality, ExpertPlacement
from hetcomp.ir.deferral import DEFERRED_SUM, LayerChoices, deferrals, may_defer, moe_layers
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.ir.verifier import verify
from hetcomp.passes.context import Context, DeferralRequest
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.routing import deferred_of, sample_choices, sample_deferral, sample_tokens
from hetcomp.planned import Planned
from tests.reference.deferral_reference import split_choices
from tests.reference.plan_builder import context, gpu, tiny_plan

BESIDE_A_GPU = ("*=gpu:0", "moe.experts=cpu")


def deferring(request: DeferralRequest | None, pins: Sequence[str] = BESIDE_A_GPU, layers: int = 4) -> Plan:
    """The tiny plan with its experts on the CPU of a machine with one GPU. An expert of 12 kB takes the CPU 41 us, what
    lies between two layers' experts the GPU some 30 us."""
    return run_pipeline(tiny_plan(layers), wish(request, pins))


def wish(request: DeferralRequest | None, pins: Sequence[str] = BESIDE_A_GPU) -> Context:
    made = context(gpus=(gpu(),), bandwidths=(0.3, 0.3))
    return replace(made, use_gpus=True, pins=tuple(parse_pin(pin) for pin in pins), deferral=request)


def counts(plan: Plan) -> list[int]:
    return [layer.placement.deferred for layer in moe_layers(plan)]


def predicted_us(plan: Plan) -> float:
    return next(t.total_us for t in plan.timelines if t.phase == "decode")


class FakeMeasure:
    """By layer a KL of ``costs`` for every choice that is deferred there, and ten times as much from the second on."""

    def __init__(self, costs: Sequence[float] = (0.01, 0.01, 0.01, 0.01)) -> None:
        self.costs = costs
        self.compared: list[list[int]] = []
        self.offered: list[list[int]] = []

    def kl(self, counts: Sequence[int]) -> float:
        return sum(cost * (n + 9 * max(0, n - 1)) for cost, n in zip(self.costs, counts, strict=True))

    def rough_kl(self, candidates: Sequence[Sequence[LayerChoices]]) -> list[float]:
        self.compared = [[layer.deferred for layer in layers] for layers in candidates]
        return [self.kl(counts) for counts in self.compared]

    def most_within(
        self, candidates: Sequence[Sequence[LayerChoices]], max_kl: float
    ) -> tuple[int, DeferralQuality] | None:
        self.offered = [[layer.deferred for layer in layers] for layers in candidates]
        within = [(i, kl) for i, kl in enumerate(map(self.kl, self.offered)) if kl <= max_kl]
        if not within:
            return None
        return within[-1][0], DeferralQuality("a text", 100, within[-1][1], 6.0, 5.0)


def test_off_unless_asked_for():
    plan = deferring(None)
    assert counts(plan) == [0, 0, 0, 0] and not deferrals(plan)
    assert not any("deferral" in note for note in plan.notes)
    assert to_json(deferring(DeferralRequest(0))) == to_json(plan)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (7, 2)])
def test_a_number_is_taken_everywhere_but_in_the_last_layer(asked, given):
    plan = deferring(DeferralRequest(asked))
    assert counts(plan) == [given, given, given, 0]
    assert [d.adds for d in deferrals(plan).values()] == [False, True, True, True]
    assert [d.turn for d in deferrals(plan).values()] == [0, 1, 0, 1]
    assert "in 3 of 4 MoE layers" in plan.notes[-1]
    assert from_json(to_json(plan)) == plan
    assert f"{given} of a token deferred" in print_plan(plan)
    slots = {slot.value: slot for slot in plan.call_arena}
    assert slots[DEFERRED_SUM].bytes == 4 * 16 * 64  # T x hidden


def test_a_layer_whose_experts_are_all_on_the_gpu_breaks_the_chain():
    plan = deferring(
        DeferralRequest(1), ("*=gpu:0", "moe.experts@0-1=cpu", "moe.experts@2=gpu:0", "moe.experts@3-4=cpu"), 5
    )
    assert may_defer(moe_layers(plan)) == (True, False, False, True, False)
    assert counts(plan) == [1, 0, 0, 1, 0]
    assert len(deferrals(plan)) == 4


@pytest.mark.parametrize("pins", [("*=cpu",), ("*=gpu:0",), ("*=gpu:0", "moe.experts@0=cpu", "moe.experts@1-3=gpu:0")])
def test_nothing_to_defer_is_said(pins):
    plan = deferring(DeferralRequest(2), pins)
    assert not any(counts(plan))
    assert "nothing to defer" in plan.notes[-1]


def test_the_prediction_has_the_deferred_work_beside_the_gpus():
    plain, deferred = deferring(None), deferring(DeferralRequest(1))
    assert predicted_us(deferred) < predicted_us(plain)
    decode = next(t for t in deferred.timelines if t.phase == "decode")
    assert dict(decode.roles)["moe.experts deferred"] > 0
    prefill = [next(t for t in plan.timelines if t.phase == "prefill") for plan in (plain, deferred)]
    assert prefill[0] == prefill[1]  # tokens of a prompt are not deferred


def test_all_deferred_waits_for_what_the_layer_before_left():
    """With every choice deferred the answers hold nothing but what was left, and the CPU's work is the same."""
    busy = [
        next(lane.busy_us for lane in t.lanes if lane.lane == "cpu:0")
        for plan in (deferring(DeferralRequest(1)), deferring(DeferralRequest(2)))
        for t in plan.timelines
        if t.phase == "decode"
    ]
    assert busy[1] == pytest.approx(busy[0], rel=0.05)


def test_auto_keeps_the_budget_and_records_what_it_costs():
    wanted = counts(deferring(DeferralRequest(None)))
    assert max(wanted) >= 1 and wanted[-1] == 0
    for max_kl in (0.005, 0.025, 1.0):
        measure = FakeMeasure()
        plan = deferring(DeferralRequest(None, max_kl, measure))
        assert measure.compared[-1] == measure.offered[-1] == wanted
        if plan.deferral is None:
            assert max_kl == 0.005 and not any(counts(plan)) and "one layer costs a KL of more" in plan.notes[-1]
        else:
            assert plan.deferral.kl == pytest.approx(measure.kl(counts(plan))) and plan.deferral.kl <= max_kl
            assert "perplexity" in plan.notes[-1] and "deferral on 100 tokens of a text" in print_plan(plan)
            assert from_json(to_json(plan)) == plan
            assert predicted_us(plan) < predicted_us(deferring(None))
    assert counts(plan) == wanted


def test_auto_defers_where_it_costs_least():
    """Choices come in the order of their costs, the second ones of all layers behind the first; a budget between what
    all layers cost with one and with none is spent."""
    measure = FakeMeasure((0.03, 0.01, 0.02, 0.0))
    plan = deferring(DeferralRequest(None, 0.045, measure))
    assert measure.compared[:3] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert measure.offered[:3] == [[0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    assert counts(plan) == [0, 1, 1, 0] and "in 2 of 4 MoE layers" in plan.notes[-1]
    steps = [sum(after) - sum(before) for before, after in itertools.pairwise(measure.offered)]
    assert steps == [1] * (len(measure.offered) - 1)
    assert len(deferrals(plan)) == 4


def test_auto_defers_nothing_where_the_budget_allows_too_little_to_gain():
    layers = 30
    measure = FakeMeasure([0.01] + [1.0] * (layers - 1))
    plan = deferring(DeferralRequest(None, 0.02, measure), layers=layers)
    assert sum(measure.offered[0]) == 1 and not any(counts(plan))
    assert plan.notes[-1].endswith("would not be faster with as few as keep the KL within 0.02")


def test_numbers_by_layer_are_taken_as_they_are():
    assert counts(deferring(DeferralRequest((0, 2, 9, 1)))) == [0, 2, 2, 0]
    assert to_json(deferring(DeferralRequest((0, 0, 0, 0)))) == to_json(deferring(None))


def test_on_another_machine_layers_defer_what_was_measured():
    measure = FakeMeasure((0.03, 0.01, 0.02, 0.0))
    made = wish(DeferralRequest(None, 0.045, measure))
    plan, imported = run_pipeline(tiny_plan(4), made), cast(Any, SimpleNamespace(plan=tiny_plan(4)))
    assert counts(plan) == [0, 1, 1, 0]
    measure.compared.clear()
    faster = made.profile.model_copy(update={"gpus": (gpu().model_copy(update={"gb_per_s": 9000.0}),)})
    again = replan(Planned(plan, imported, cast(Any, made.target), made.profile, made, {}), faster)
    assert counts(again.plan) == [0, 1, 1, 0] and not measure.compared


def test_auto_without_a_measure_says_so():
    assert "not measured" in deferring(DeferralRequest(None)).notes[-1]


def test_a_plan_that_cannot_be_is_refused():
    plan = deferring(DeferralRequest(1))

    def with_last(deferred: int, device: str = "cpu:0") -> Plan:
        calls = list(plan.calls)
        runs = (ExpertPlacement(0, 7, device),)
        placements = tuple(
            (op, replace(p, deferred=deferred, experts=runs) if op == "experts" else p) for op, p in calls[4].placements
        )
        calls[4] = replace(calls[4], placements=placements)
        return replace(plan, calls=tuple(calls))

    verify(plan)
    with pytest.raises(HetcompError, match="layer 3 defers experts, but those of the next MoE layer"):
        verify(with_last(1))
    with pytest.raises(HetcompError, match="layer 3 defers 3 of a token's 2 choices"):
        verify(with_last(3))
    with pytest.raises(HetcompError, match="deferral:sum, handed from call to call, has no place"):
        verify(replace(plan, call_arena=tuple(s for s in plan.call_arena if s.value != DEFERRED_SUM)))


@pytest.fixture(scope="module")
def divide(tmp_path_factory):
    """divide_choices of hetcomp/deferral.h."""
    folder = tmp_path_factory.mktemp("divide")
    source = folder / "divide.cpp"
    source.write_text(
        '#include "hetcomp/deferral.h"\n'
        'extern "C" void divide(long rows, long top_k, long deferred, const bool* on_cpu, const int* ids,\n'
        "                       const float* weights, int* now, int* later) {\n"
        "  hetcomp::divide_choices(rows, top_k, deferred, on_cpu, ids, weights, now, later);\n}\n"
    )
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{installed_runtime.include()}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(folder / "divide.so")], check=True)
    function = ctypes.CDLL(str(folder / "divide.so")).divide
    function.argtypes = [ctypes.c_long] * 3 + [ctypes.c_void_p] * 5

    def run(ids: np.ndarray, weights: np.ndarray, on_cpu: np.ndarray | None, deferred: int) -> list[np.ndarray]:
        out = [np.full(ids.shape, -7, np.int32) for _ in range(2)]
        here = None if on_cpu is None else on_cpu.ctypes.data
        function(*ids.shape, deferred, here, ids.ctypes.data, weights.ctypes.data, *(o.ctypes.data for o in out))
        return out

    return run


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids [T, k], weights [T, k] with many ties, experts on the CPU [E], and a number to defer."""
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    rows = draw(st.integers(1, 4))
    ids = [draw(st.permutations(range(experts)))[:top_k] for _ in range(rows)]
    weights = [draw(st.lists(st.sampled_from((0.0, 0.25, 0.5, 2.5)), min_size=top_k, max_size=top_k)) for _ in ids]
    on_cpu = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    return np.array(ids, np.int32), np.array(weights, np.float32), np.array(on_cpu), draw(st.integers(0, top_k + 1))


@given(routing=routings())
def test_choices_are_divided_as_the_definition_says(divide, routing):
    ids, weights, on_cpu, deferred = routing
    now, later = divide(ids, weights, on_cpu, deferred)
    of_text = deferred_choices(
        torch.from_numpy(ids).long(), torch.from_numpy(weights), LayerChoices(deferred, tuple(on_cpu.tolist()))
    )
    for t, chosen in enumerate(ids.tolist()):
        kept, left = split_choices(chosen, weights[t].tolist(), on_cpu.tolist(), deferred)
        assert later[t].tolist() == [e if i in left else -1 for i, e in enumerate(chosen)]
        assert now[t].tolist() == [e if i in kept and on_cpu[e] else -1 for i, e in enumerate(chosen)]
        assert of_text[t].nonzero().flatten().tolist() == left
    if on_cpu.all():
        assert [a.tolist() for a in divide(ids, weights, None, deferred)] == [now.tolist(), later.tolist()]


def test_sampled_routings_are_the_same_with_deferral():
    shares, on_cpu = [0.3, 0.2, 0.2, 0.1, 0.1, 0.1], np.array([True, True, False, True, True, False])
    for tokens in (1, 5, 200):
        plain = sample_tokens(shares, 3, tokens, np.random.default_rng(7))
        drawn, later = sample_deferral(shares, 3, tokens, on_cpu, 1, np.random.default_rng(7))
        assert drawn.tolist() == plain.tolist()
        assert (later <= drawn).all() and not later[~on_cpu].any()
        assert later.sum() <= tokens if tokens <= 64 else 100 < later.sum() < 260
    choices = sample_choices(shares, 3, 40, np.random.default_rng(1))
    left = deferred_of(choices, on_cpu, 1)
    assert left.sum() == (on_cpu[choices].sum(1) > 0).sum()
    last = [[e for e in row if on_cpu[e]][-1:] for row in choices.tolist()]
    assert left.tolist() == np.bincount([e for one in last for e in one], minlength=6).tolist()


@pytest.mark.slow
def test_measured_on_text():
    """Deferring nothing changes nothing, and more choices change more."""
    measure = DeferralOnText("demo-moe", None, tokens=160)
    candidates = [[LayerChoices(n, (True,) * 32)] * 5 + [LayerChoices(0, (True,) * 32)] for n in (0, 1, 2, 3)]
    rough = measure.rough_kl(candidates)
    assert rough[0] == pytest.approx(0.0, abs=1e-6) and rough == sorted(rough)
    found = [measure.most_within(candidates, max_kl) for max_kl in (1e-6, 0.05, 10.0)]
    assert [number for number, _ in found] == [0, 1, 3]
    qualities = [quality for _, quality in found]
    assert qualities[0].perplexity == qualities[0].undeferred_perplexity and 0.001 < qualities[1].kl < qualities[2].kl
    assert measure.most_within(candidates[1:], 1e-6) is None
    with pytest.raises(HetcompError, match="has 6 MoE layers"):
        measure.rough_kl([[LayerChoices(1, (True,) * 32)] * 5])
