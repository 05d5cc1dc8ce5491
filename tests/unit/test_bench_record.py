"""Bench records and what calibration makes of them."""

from __future__ import annotations

import json

import pytest

from hetcomp.bench import BenchRecord, CaseResult, RoleTime, read_record
from hetcomp.calibrate import calibrated
from hetcomp.cli.bench_command import verdict
from hetcomp.errors import HetcompError
from tests.reference.plan_builder import profile

FACTORS = {"linear": 1.2, "moe_experts": 0.8, "elementwise": 2.0}


def record(factors=FACTORS, **changes: object) -> BenchRecord:
    machine = profile()
    cases = []
    for number, scale in enumerate((1.0, 7.0)):
        predicted = {"linear": 4.0 * scale, "moe_experts": 10.0 * scale, "elementwise": 0.5 * scale}
        roles = tuple(
            RoleTime(role=f"r.{t}", term=t, predicted_ms=ms, measured_ms=ms * factors[t]) for t, ms in predicted.items()
        )
        total = sum(r.measured_ms for r in roles)
        cases.append(
            CaseResult(
                phase="prefill" if number else "decode",
                tokens=64 if number else 1,
                position=64,
                predicted_ms=sum(predicted.values()),
                measured_ms=total,
                samples_ms=(total,),
                roles=roles,
            )
        )
    fields = {
        "model": "m",
        "plan_sha256": "p",
        "profile_name": "hand",
        "profile_sha256": machine.sha256(),
        "cpu": machine.cpu,
        "isa": "avx512",
        "threads": machine.threads,
        "measured_at": "2026-11-24",
        "load_before": 0.0,
        "cases": cases,
    }
    return BenchRecord.model_validate({**fields, **changes})


def test_calibration_recovers_the_factors():
    machine = calibrated(profile(), record())
    for term, factor in FACTORS.items():
        assert machine.calibration(term) == pytest.approx(factor)
    assert machine.calibration("attention_decode") == 1.0


def test_calibrations_multiply_and_replace():
    once = calibrated(profile(), record())
    twice = calibrated(once, record(profile_sha256=once.sha256()))
    assert twice.calibration("linear") == pytest.approx(1.2**2)
    assert len(twice.calibrations) == len(once.calibrations)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu": "another"}, "calibrate on the machine that the profile describes"),
        ({"threads": 99}, "with 99 threads"),
        ({"profile_sha256": "0"}, "was predicted with another profile"),
        ({"factors": {**FACTORS, "linear": 9.0}}, "linear takes 9.00 times"),
    ],
)
def test_records_of_something_else_are_refused(changes, words):
    with pytest.raises(HetcompError, match=words):
        calibrated(profile(), record(**changes))


def test_the_verdict_names_the_term_that_was_wrong(tmp_path):
    far = record({**FACTORS, "moe_experts": 1.9})
    lines = verdict(far, tmp_path / "m.bench.json")
    assert "mostly r.moe_experts (moe_experts)" in lines[0] and "--calibrate" in lines[-2]
    near = record({"linear": 1.0, "moe_experts": 1.05, "elementwise": 1.0})
    assert len(verdict(near, tmp_path / "m.bench.json")) == 1


def test_records_come_back_as_they_were(tmp_path):
    path = tmp_path / "m.bench.json"
    path.write_text(record().to_json())
    assert read_record(path) == record()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(schema=[2, 0]), r"has schema \[2, 0\]"),
        (lambda d: d["cases"][0].update(tokens="x"), "not valid at cases.0.tokens"),
        (lambda d: d.update(colour="red"), "not valid at colour"),
    ],
)
def test_damaged_records_are_refused_with_their_place(tmp_path, edit, words):
    path = tmp_path / "m.bench.json"
    document = json.loads(record().to_json())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(HetcompError, match=words):
        read_record(path)


def test_absent_and_broken_records_are_refused(tmp_path):
    with pytest.raises(HetcompError, match="run hetcomp bench"):
        read_record(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(HetcompError, match="not valid JSON"):
        read_record(tmp_path / "broken.json")
