"""Constants of the kernels: found by timing, kept in the profile, rendered into the code and into nothing else."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from hetcomp.backends import packing
from hetcomp.backends.cpu import FORMATS, CpuBackend
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa, KernelRequest
from hetcomp.backends.select_kernels import select_kernels
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile, parse_profile
from hetcomp.hardware.tuning import KernelTuning, Tuning
from hetcomp.ir.ops import Linear, MoeExperts
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.profiler import tune_kernels
from hetcomp.profiler.kernel_cases import Detail, curve_plans
from hetcomp.profiler.tune_kernels import STAGES, Variant, Work, search
from tests.reference import tiny_models
from tests.reference.kernel_harness import CompiledKernel, activation, isas_here, weight
from tests.reference.kernel_numbers import draw, packed
from tests.unit.test_hardware_profile import document

OTHER = Tuning(prefetch_bytes=64, draw_bytes=1 << 20, task_blocks=3, gemv_rows=1)
START = [Variant(form, cpu_isa(Isa.AVX512).tuning(form)) for form in ("q4", "bf16")]


class FakeMachine:
    """Times variants by a rule; ``disturb`` (round, place of the variant) lengthens single readings."""

    def __init__(
        self,
        rule: Callable[[Variant, Work], float],
        disturb: Callable[[int, int], float] = lambda round, place: 1.0,
        rounds: int = 9,
    ) -> None:
        self.stages: list[list[Variant]] = []
        self._rule, self._disturb, self._rounds = rule, disturb, rounds

    def __call__(self, variants: Sequence[Variant], works: Sequence[Work]) -> list[list[Mapping[Work, float]]]:
        self.stages.append(list(variants))
        return [
            [{work: self._rule(v, work) * self._disturb(r, i) for work in works} for i, v in enumerate(variants)]
            for r in range(self._rounds)
        ]


def slower_away_from(best: Mapping[str, Tuning]) -> Callable[[Variant, Work], float]:
    """A rule under which every constant's best value is a tenth faster than any other, on the work it shows in."""

    def rule(variant: Variant, work: Work) -> float:
        us = 100.0
        for knob in (knob for stage in STAGES for knob in stage if knob.work is work):
            same = getattr(variant.tuning, knob.constant) == getattr(best[variant.weight_format], knob.constant)
            us *= 1.0 if same else 1.1
        return us

    return rule


def test_a_known_optimum_is_found_whatever_the_disturbance_of_few_rounds():
    best = {
        "q4": Tuning(prefetch_bytes=64, draw_bytes=1 << 20, task_blocks=4, gemv_rows=12),
        "bf16": Tuning(prefetch_bytes=2304, draw_bytes=64 << 10, task_blocks=16, gemv_rows=2),
    }

    def busy(round: int, place: int) -> float:
        return 1.0 + 0.03 * ((round * 7 + place * 5) % 3) if round % 4 else 4.0

    found = search(START, FakeMachine(slower_away_from(best), busy))
    assert {variant.weight_format: variant.tuning for variant, _ in found} == best
    for variant, trials in found:
        assert {trial.constant for trial in trials} == set(Tuning.model_fields)
        for trial in trials:
            won = getattr(variant.tuning, trial.constant) == trial.value
            assert (trial.speedup > tune_kernels.MARGIN) == won
            assert len(trial.samples) == 9


@pytest.mark.parametrize("gain", [1.0, 1.025])
def test_the_default_stays_unless_another_value_is_clearly_faster(gain):
    machine = FakeMachine(lambda variant, work: 100.0 if variant in START else 100.0 / gain)
    assert [variant for variant, _ in search(START, machine)] == START


def test_what_other_processes_did_to_the_default_does_not_speak_for_a_value():
    # The default is held up in most rounds, by chance: its undisturbed rounds are as fast as the others'.
    machine = FakeMachine(lambda variant, work: 100.0, lambda round, place: 3.0 if place == 0 and round < 6 else 1.0)
    found = search(START, machine)
    assert [variant for variant, _ in found] == START
    assert max(trial.speedup for trial in found[0][1]) <= 1.0


def test_too_few_rounds_decide_nothing():
    machine = FakeMachine(lambda variant, work: 100.0 if variant in START else 50.0, rounds=4)
    assert search(START, machine) == [(variant, ()) for variant in START]


def test_no_stage_begins_that_would_not_end_in_time():
    best = {"q4": OTHER, "bf16": OTHER}
    machine, now = FakeMachine(slower_away_from(best)), [0.0]

    def timer(variants: Sequence[Variant], works: Sequence[Work]) -> list[list[Mapping[Work, float]]]:
        now[0] += 7.0
        return machine(variants, works)

    found = search(START, timer, lambda: now[0])
    assert len(machine.stages) == 1
    assert found[0][0].tuning == START[0].tuning.model_copy(update={"prefetch_bytes": 64})


def test_variants_take_turns_and_only_whole_rounds_count(monkeypatch):
    timed: list[str] = []

    class Probe:
        def __init__(self, *rest: object) -> None:
            pass

        def run(self, timings, cpus, memory, seconds):
            timed.extend(timing.kernel.name for timing in timings)
            return [[8.0, 2.0, 4.0, 3.0]] * (len(timings) - 1)

    monkeypatch.setattr(tune_kernels, "KernelProbe", Probe)
    variants = [START[0], Variant("q4", OTHER)]
    works = [Work.DECODE, Work.PREFILL]
    rounds = tune_kernels._time_variants(Isa.AVX512, (0,), 64 << 20, variants, works)
    assert len(rounds) == tune_kernels._ROUNDS - 1
    assert rounds[0][1] == {Work.DECODE: pytest.approx(3.0), Work.PREFILL: pytest.approx(3.0)}
    first, second = timed[:6], timed[6:12]  # one case of decode and two of prefill, of two variants
    assert len(set(first)) == 2
    assert second == first[::-1]


def ask(attrs: Linear | MoeExperts, form: str, isa: Isa, *tunings: KernelTuning) -> KernelRequest:
    """A small linear op, or experts."""
    if isinstance(attrs, Linear):
        w = weight("w", (attrs.out_features, attrs.in_features), form, packing.PANELS)
        inputs = (activation("x", "T", attrs.in_features), w)
        outputs = (activation("y", "T", attrs.out_features),)
    else:
        e, k, hidden, inner = attrs.experts, attrs.top_k, attrs.hidden, attrs.intermediate
        ids = Value("i", TensorType(DType.I32, ("T", k)), ValueKind.ACT)
        up = weight("u", (e, 2 * inner, hidden), form, packing.PANELS_GLU)
        down = weight("d", (e, hidden, inner), form, packing.PANELS)
        inputs = (activation("x", "T", hidden), ids, activation("r", "T", k), up, down)
        outputs = (activation("y", "T", hidden),)
    return KernelRequest(Op("op", attrs, (), ()), inputs, outputs, isa, {"T": 64}, tunings)


LINEAR, EXPERTS = Linear(96, 40), MoeExperts(4, 2, 64, 48)


@pytest.mark.parametrize("attrs", [LINEAR, EXPERTS])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", list(Isa))
def test_code_differs_by_the_tuned_constants_only(attrs, form, isa):
    plain = CpuBackend().emit(ask(attrs, form, isa))
    default = KernelTuning(isa=isa.value, weight_format=form, constants=cpu_isa(isa).tuning(form))
    assert CpuBackend().emit(ask(attrs, form, isa, default)) == plain
    tuned = CpuBackend().emit(ask(attrs, form, isa, default.model_copy(update={"constants": OTHER})))
    assert tuned.workspace_bytes == plain.workspace_bytes
    lines = [kernel.source.replace(kernel.name, "kernel").splitlines() for kernel in (plain, tuned)]
    changed = [line[2:].strip() for line in difflib.ndiff(*lines) if line.startswith("+ ")]
    blocks = [6 if family == "amx_bf16" else 3 for family in cpu_isa(isa).gemms(form)]
    assert sorted(changed) == sorted(
        [
            "constexpr int kGemvRows = 1;",
            "constexpr std::int64_t kDrawBytes = 1048576;",
            "constexpr std::int64_t kPrefetch = 64;",
            *(f"static constexpr std::int64_t kTaskBlocks = {n};" for n in blocks),
        ]
    )


def test_a_tuning_serves_the_formats_of_its_family_on_its_instruction_set():
    def served(isa: Isa, tuned: KernelTuning) -> set[str]:
        emit = CpuBackend().emit
        return {form for form in FORMATS if emit(ask(LINEAR, form, isa, tuned)) != emit(ask(LINEAR, form, isa))}

    def tuning(isa: Isa, form: str) -> KernelTuning:
        return KernelTuning(isa=isa.value, weight_format=form, constants=OTHER)

    assert served(Isa.AVX2, tuning(Isa.AVX2, "q4")) == {"q8", "q6k", "q5k", "q4z", "q4k", "q4", "mxfp4"}
    assert served(Isa.AVX2, tuning(Isa.AVX2, "bf16")) == {"f32", "bf16", "fp8"}
    assert served(Isa.AVX512_BF16, tuning(Isa.AVX512_BF16, "bf16")) == {"bf16", "fp8"}
    assert served(Isa.AMX_BF16, tuning(Isa.AMX_BF16, "bf16")) == {"bf16", "fp8"}
    assert served(Isa.AVX2, tuning(Isa.AVX512, "q4")) == set()


OWN_LOOPS = [form for form in FORMATS if form not in ("q4z", "q5k")]  # which have q4k's


@pytest.mark.parametrize(
    ("form", "prefetch"),
    [
        pytest.param(form, prefetch, marks=() if form in ("q4", "bf16") else pytest.mark.exhaustive)
        for form, prefetch in zip(OWN_LOOPS, itertools.cycle([64, 1 << 16]), strict=False)
    ],
)
def test_constants_do_not_change_results(form, prefetch):
    # Sums are made in the same order whatever the prefetch, the draws and the tasks; rows are above both gemv_rows or
    # below, so that both kernels multiply in the same way.
    isa = isas_here()[-1]
    constants = Tuning(prefetch_bytes=prefetch, draw_bytes=4096, task_blocks=1, gemv_rows=12)
    tuned = KernelTuning(isa=isa.value, weight_format=form, constants=constants)
    rng = np.random.default_rng(5)
    w = weight("w", (40, 96), form, packing.PANELS)
    data, _ = packed(draw(rng, (40, 96)), w)
    kernels = [CompiledKernel(CpuBackend().emit(ask(LINEAR, form, isa, *t)), isa) for t in ((), (tuned,))]
    for rows in (1, 2, 13, 40):
        x = rng.standard_normal((rows, 96)).astype(np.float32)
        (plain,), (other,) = (kernel([x, data], [(rows, 40)], rows=rows, threads=2) for kernel in kernels)
        np.testing.assert_array_equal(plain, other)


def profile(**changes: object) -> HardwareProfile:
    return parse_profile(json.dumps(document(**changes)), "p.json")


def entry(**changes: object) -> dict:
    constants = {"prefetch_bytes": 64, "draw_bytes": 1 << 20, "task_blocks": 3, "gemv_rows": 1, **changes}
    return {"isa": "avx2", "weight_format": "bf16", "constants": constants}


def test_compile_and_curves_take_the_constants_of_the_profile(tmp_path):
    folder = tmp_path / "tiny"
    tiny_models.save_tiny("qwen3_moe", folder)
    tuned = profile(schema=[2, 1], tunings=[entry()])
    assert parse_profile(tuned.to_json(), "again") == tuned
    sources = []
    for machine in (profile(), tuned):  # the first is of schema 2.0: without tunings
        planned = plan_model(folder, hw_profile=machine, formats="bf16")
        sources.append({kernel.source for kernel in select_kernels(planned.plan, planned.target, Isa.AVX2).values()})
    for value, where in (("4096", 0), ("64", 1)):
        lines = {line for source in sources[where] for line in source.splitlines() if "kPrefetch =" in line}
        # The router is f32, of the same family on AVX2.
        assert lines == {f"constexpr std::int64_t kPrefetch = {value};"}
    curve = next(p for p in curve_plans(Isa.AVX2, Detail.QUICK, 64 << 20, tuned.tunings) if p.weight_format == "bf16")
    assert "kPrefetch = 64;" in curve.kernel.source


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"prefetch_bytes": 100},
            r"p\.json is not valid at tunings\.0\.constants\.prefetch_bytes: .*multiple of 64\.$",
        ),
        ({"prefetch_bytes": 0}, r"tunings\.0\.constants\.prefetch_bytes: .*greater than or equal to 64\.$"),
        ({"draw_bytes": 1 << 40}, r"tunings\.0\.constants\.draw_bytes: .*less than or equal to"),
        ({"task_blocks": 0}, r"tunings\.0\.constants\.task_blocks: .*greater than or equal to 1\.$"),
        ({"gemv_rows": 17}, r"tunings\.0\.constants\.gemv_rows: .*less than or equal to 16\.$"),
        ({"gemv_rows": "many"}, r"tunings\.0\.constants\.gemv_rows: .*valid integer"),
        ({"tile_rows": 4}, r"tunings\.0\.constants\.tile_rows: Extra inputs are not permitted\.$"),
    ],
)
def test_bad_constants_are_refused_with_their_place(change, sentence):
    with pytest.raises(HetcompError, match=sentence):
        profile(tunings=[entry(**change)])


def test_two_tunings_of_the_same_kernels_are_refused():
    with pytest.raises(HetcompError, match="two tunings are of the same instruction set and weight format"):
        profile(tunings=[entry(), entry()])
