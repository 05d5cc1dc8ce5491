"""Calibration from a run whose times are the predictions times known factors: predictions then agree with it."""

from __future__ import annotations

import pytest

from hetcomp.bench import BenchRecord, CaseResult, RoleTime, role_terms
from hetcomp.calibrate import calibrated
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Calibration
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.passes.phases import Phase
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.prediction import predict
from tests.reference.plan_builder import context, profile, tiny_plan

FACTORS = {
    "linear": 1.3,
    "moe_experts": 0.7,
    "attention_decode": 1.5,
    "attention_prefill": 2.5,
    "elementwise": 3.0,
}
STEPS = (Phase("decode", 1, 1, 20), Phase("decode", 1, 1, 60), Phase("prefill", 16, 1, 16))


def machine(**changes: object) -> HardwareProfile:
    """Without barriers: they are in the roles' times and no kernel's factor changes them."""
    return profile().model_copy(update={"barrier_us": 0.0, **changes})


def synthetic(plan: Plan, on: HardwareProfile, factors: dict[str, float] = FACTORS, noise: float = 1.0) -> BenchRecord:
    """A run on a machine that is ``factors`` slower than ``on``; the first of three rounds by ``noise`` more."""
    cases = []
    for step in STEPS:
        timeline, terms = predict(plan, on, step), role_terms(plan, step)
        roles = []
        for role, us in timeline.roles:
            kind, term = terms[role]
            ms = us / 1e3 * factors[term]
            entry = {"role": role, "kind": kind, "term": term, "predicted_ms": us / 1e3}
            roles.append(RoleTime(**entry, measured_ms=ms * noise, samples_ms=(ms * noise, ms, ms)))
        total = sum(r.typical_ms for r in roles)
        cases.append(
            CaseResult(
                phase="decode" if step.name == "decode" else "prefill",
                tokens=step.tokens,
                position=step.position,
                predicted_ms=timeline.total_us / 1e3,
                measured_ms=total,
                samples_ms=(total,),
                roles=tuple(roles),
            )
        )
    return BenchRecord(
        model="m",
        plan_sha256="p",
        profile_name=on.name,
        profile_sha256=on.sha256(),
        cpu=on.cpu,
        isa="avx512",
        threads=on.threads,
        measured_at="2026-11-24",
        load_before=0.0,
        cases=tuple(cases),
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return run_pipeline(tiny_plan(), context())


def test_the_factors_are_recovered_and_predictions_then_agree(plan):
    record = synthetic(plan, machine())
    fitted = calibrated(machine(), record)
    assert {c.term: c.factor for c in fitted.calibrations} == pytest.approx(FACTORS)
    for step, case in zip(STEPS, record.cases, strict=True):
        assert predict(plan, fitted, step).total_us / 1e3 == pytest.approx(case.measured_ms)
        measured = {role.role: role.measured_ms * 1e3 for role in case.roles}
        assert dict(predict(plan, fitted, step).roles) == pytest.approx(measured)


def test_a_second_run_corrects_what_the_first_left(plan):
    once = calibrated(machine(), synthetic(plan, machine()))
    twice = calibrated(once, synthetic(plan, once, dict.fromkeys(FACTORS, 1.1)))
    for term, factor in FACTORS.items():
        assert twice.calibration(term) == pytest.approx(factor * 1.1)


def test_one_interrupted_round_moves_nothing(plan):
    fitted = calibrated(machine(), synthetic(plan, machine(), noise=30.0))
    assert {c.term: c.factor for c in fitted.calibrations} == pytest.approx(FACTORS)


def test_corrections_that_add_up_to_nonsense_are_refused(plan):
    earlier = Calibration(term="moe_experts", factor=0.06, run="r", measured_at="2026-11-23")
    on = machine(calibrations=(earlier,))
    with pytest.raises(HetcompError, match=r"With earlier calibrations moe_experts would be corrected by 0\.04 times"):
        calibrated(on, synthetic(plan, on))


def test_other_calibrations_are_kept_and_the_profile_is_not_changed(plan):
    barrier = Calibration(term="barrier", factor=2.0, run="r", measured_at="2026-11-23")
    on = machine(calibrations=(barrier,))
    fitted = calibrated(on, synthetic(plan, on))
    assert fitted.calibration("barrier") == 2.0 and on.calibrations == (barrier,)
    assert {c.run for c in fitted.calibrations if c.term != "barrier"} == {"p"}
