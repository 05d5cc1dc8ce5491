"""bench, explain and calibration through the command line on a compiled model. Nothing here asserts a speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetcomp.bench import read_record
from hetcomp.calibrate import calibrated
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import load_profile
from hetcomp.ir.serialise import from_json, plan_hash
from tests.e2e.command_line import listing, refusal, run
from tests.reference.optimisation import optimised

SHORT = ("--prompt", "8,4096", "--context", "16", "--tokens", "4", "--rounds", "2")  # the context is 64


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """This machine, measured, with -O1: the kernels that are timed take a minute and a half to compile with -O3."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch, optimised("-O1"):
        patch.setenv("HETCOMP_CACHE", str(folder / "cache"))
        profile = load_profile("auto")
    assert profile.measured
    (folder / "machine.json").write_text(profile.to_json())
    return folder / "machine.json"


@pytest.fixture(scope="module")
def stored(tiny_artifact: Path, machine: Path, tmp_path_factory) -> Path:
    """A record of the tiny model."""
    path = tmp_path_factory.mktemp("record") / "tiny.bench.json"
    outcome = run("bench", tiny_artifact, *SHORT, "--hw", machine, "--out", path)
    assert outcome.code == 0, outcome.err
    assert "prefill 8" in outcome.out and "decode at 18" in outcome.out
    assert "note: prefill 4096 does not fit into the context of 64" in outcome.out
    return path


def test_bench_stores_a_valid_record(stored, tiny_artifact, machine):
    record = read_record(stored)
    plan = from_json((tiny_artifact / "plan.json").read_text())
    assert record.plan_sha256 == plan_hash(plan)
    assert record.profile_sha256 == load_profile(str(machine)).sha256()
    assert [case.name for case in record.cases] == ["prefill 8", "decode at 18"]
    assert len(record.read_gb_per_s) == 2 and all(reading > 0 for reading in record.read_gb_per_s)
    roles = {op.role or op.kind for t in plan.templates for op in t.ops}
    for case in record.cases:
        assert roles == {role.role for role in case.roles if role.kind}
        assert sum(role.measured_ms for role in case.roles) == pytest.approx(case.measured_ms, rel=0.01)
        assert case.predicted_ms > 0 and all(ms > 0 for ms in case.samples_ms)


def test_the_record_lies_beside_the_artifact_and_json_is_the_record(artifact, machine):
    outcome = run("bench", artifact, *SHORT, "--hw", machine, "--json")
    assert outcome.code == 0, outcome.err
    path = artifact.parent / "tiny.bench.json"
    assert json.loads(outcome.out) == json.loads(path.read_text())
    assert listing(artifact.parent).count("tiny.bench.json") == 1
    assert not [name for name in listing(artifact.parent) if name.startswith(".")]
    explained = run("explain", artifact, "--hw", machine)
    assert explained.code == 0 and "held by" in explained.out and "DRAM:" in explained.out


def test_explain_reads_the_record(stored, tiny_artifact, machine):
    outcome = run("explain", tiny_artifact, "--record", stored, "--hw", machine, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {e["case"] for e in found} == {"prefill 8", "decode at 18"}
    assert {"moe.experts", "lm_head"} <= {e["role"] for e in found}
    assert all(e["held_by"] and e["memory"] >= 0 and 0 <= e["share"] <= 1 for e in found)


def test_explain_measures_where_there_is_no_record(artifact, machine):
    before = listing(artifact.parent)
    outcome = run("explain", artifact, "--hw", machine)
    assert outcome.code == 0, outcome.err
    assert "decode at" in outcome.out and listing(artifact.parent) == before


def test_calibration_takes_the_record_or_says_why_not(stored, machine):
    profile = load_profile(str(machine))
    try:
        fitted = calibrated(profile, read_record(stored))
    except HetcompError as error:  # a machine as busy as this may be
        assert "Run hetcomp profile again" in str(error)
    else:
        assert fitted.calibrations and all(c.factor > 0 for c in fitted.calibrations)


def test_what_is_no_artifact_is_refused(tmp_path):
    for command in ("bench", "explain"):
        assert "is not a hetcomp artifact" in refusal(command, tmp_path)


def test_a_record_of_another_artifact_is_refused(stored, tiny_artifact, machine, tmp_path):
    document = json.loads(stored.read_text())
    document["plan_sha256"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    assert "of another compile" in refusal("explain", tiny_artifact, "--record", other, "--hw", machine)


def test_a_damaged_or_absent_record_is_refused(stored, tiny_artifact, machine, tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text(stored.read_text()[:-100])
    assert "is not valid JSON" in refusal("explain", tiny_artifact, "--record", damaged, "--hw", machine)
    absent = tmp_path / "absent.json"
    assert "There is no bench record" in refusal("explain", tiny_artifact, "--record", absent, "--hw", machine)


def test_lengths_that_cannot_be_measured_are_refused(tiny_artifact, machine, tmp_path):
    hw = ("--hw", machine, "--out", tmp_path / "x.json")
    long = refusal("bench", tiny_artifact, "--prompt", "65", "--context", "64", *hw)
    assert "None of the wanted lengths fits into the artifact's context of 64" in long
    assert "is not a list of lengths" in refusal("bench", tiny_artifact, "--prompt", "8,x", *hw)
    assert listing(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tiny_artifact, machine, tmp_path):
    for target in (tmp_path, tmp_path / "absent" / "x.json"):
        assert "cannot be written" in refusal("bench", tiny_artifact, *SHORT, "--hw", machine, "--out", target)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(
        "bench", tiny_artifact, *SHORT, "--hw", machine, "--out", tmp_path / "file" / "x.json"
    )


def test_a_text_that_cannot_be_read_is_refused(tiny_artifact, machine, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    out = ("--hw", machine, "--out", tmp_path / "x.json")
    for name in ("absent", "binary"):
        assert "cannot be read" in refusal("bench", tiny_artifact, *SHORT, "--text", tmp_path / name, *out)
