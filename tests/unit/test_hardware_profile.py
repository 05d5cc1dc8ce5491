"""Profiles: files, presets, errors that name the place, and the figures that the passes read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hetcomp.errors import HetcompError
from hetcomp.hardware import measure
from hetcomp.hardware.detect import Machine, NodeFacts
from hetcomp.hardware.figures import Cache, Source
from hetcomp.hardware.profile import HardwareProfile, load_profile, parse_profile

GIB = 1 << 30


def document(**changes: object) -> dict:
    node = {
        "id": 0,
        "cores": 4,
        "memory_bytes": 8 * GIB,
        "available_bytes": 6 * GIB,
        "read_bandwidth": [{"threads": 1, "gb_per_s": 10.0}, {"threads": 4, "gb_per_s": 30.0}],
        "source": "measured",
    }
    rate = {"isa": "avx2", "gflops_per_core": 50.0, "bandwidth_fraction": 0.9, "source": "measured"}
    return {
        "schema": [2, 0],
        "name": "test",
        "cpu": "a CPU",
        "isas": ["avx2"],
        "threads": 4,
        "logical_cpus": 8,
        "nodes": [node, {**node, "id": 1, "read_bandwidth": [{"threads": 4, "gb_per_s": 20.0}]}],
        "rates": [{**rate, "weight_format": form} for form in ("f32", "bf16")],
        "barrier_us": 1.0,
        **changes,
    }


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_is_read_and_written_back(tmp_path):
    profile = load_profile(write(tmp_path / "p.json", document(threads=8)))
    assert parse_profile(profile.to_json(), "again") == profile
    assert profile.available_bytes() == 12 * GIB
    assert profile.measured


def test_bandwidth_is_that_of_the_lanes_threads(tmp_path):
    profile = load_profile(write(tmp_path / "p.json", document(threads=8)))
    assert [profile.bandwidth(0), profile.bandwidth(1), profile.bandwidth()] == [30.0, 20.0, 30.0]
    assert profile.gflops("bf16") == 4 * 50.0
    # A quota of two threads leaves one a node: the first point of node 0, a quarter of node 1's only point.
    narrow = load_profile(write(tmp_path / "p.json", document(threads=2)))
    assert [narrow.bandwidth(0), narrow.bandwidth(1)] == [10.0, 5.0]
    assert narrow.gflops("f32") == 50.0


def test_a_rate_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(HetcompError, match="no kernel rate for format q5"):
        load_profile(write(tmp_path / "p.json", document())).gflops("q5")


def test_the_hash_names_the_machine_and_not_the_minute():
    profile = HardwareProfile.model_validate_json(json.dumps(document()))
    other = document()
    other["nodes"][0]["available_bytes"] = GIB
    assert HardwareProfile.model_validate_json(json.dumps(other)).sha256() == profile.sha256()
    other["nodes"][0]["cores"] = 3
    assert HardwareProfile.model_validate_json(json.dumps(other)).sha256() != profile.sha256()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (
            {"nodes": [{**document()["nodes"][0], "read_bandwidth": [{"threads": 1, "gb_per_s": -1}]}]},
            "nodes.0.read_bandwidth.0.gb_per_s",
        ),
        ({"rates": []}, "rates"),
        ({"threads": "many"}, "threads"),
        ({"colour": "red"}, "colour"),
        ({"nodes": [document()["nodes"][0]] * 2}, "two NUMA nodes have the same id"),
        ({"rates": [{**document()["rates"][0], "source": "guess"}]}, "rates.0.source"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(tmp_path, change, place):
    spec = write(tmp_path / "p.json", document(**change))
    with pytest.raises(HetcompError) as caught:
        load_profile(spec)
    assert spec in str(caught.value)
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema"),
        (document(schema=[1, 0]), r"schema \[1, 0\], this hetcomp reads 2.x"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, content, words):
    with pytest.raises(HetcompError, match=words):
        load_profile(write(tmp_path / "p.json", content))


def test_unknown_files_and_presets_are_answered_with_the_list(tmp_path):
    for spec in ("preset:nothing", str(tmp_path / "absent.json")):
        with pytest.raises(HetcompError, match=r"9354-384gb|preset:rtx4090"):
            load_profile(spec)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """This machine, measured into a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETCOMP_CACHE", str(folder))
        yield load_profile("auto"), folder


@pytest.mark.slow
def test_this_machine_is_measured(measured):
    profile, _ = measured
    assert profile.measured
    assert profile.measured_at
    assert {(r.isa, r.weight_format) for r in profile.rates} >= {("avx2", "f32"), ("avx2", "bf16")}
    # Wide limits: a figure outside of them is a wrong unit or an optimised-away loop, not a slow machine.
    assert 0.1 < profile.bandwidth() < 2000
    assert all(0.1 < rate.gflops_per_core < 1000 for rate in profile.rates)
    assert 0 < profile.barrier_us < 10_000
    assert 0 < profile.available_bytes() <= sum(node.memory_bytes for node in profile.nodes)
    assert profile.threads <= len(os.sched_getaffinity(0))


@pytest.mark.slow
def test_the_second_time_comes_from_the_cache(measured, monkeypatch):
    profile, folder = measured
    monkeypatch.setattr(measure, "measure", lambda machine: pytest.fail("measured again"))
    assert load_profile("auto").sha256() == profile.sha256()
    kept = list(folder.iterdir())
    assert [path.name.startswith("profile-") for path in kept] == [True]


@pytest.mark.slow
def test_figures_of_a_busy_machine_and_damaged_files_are_measured_again(measured, monkeypatch):
    profile, folder = measured
    (cached,) = folder.iterdir()
    monkeypatch.setattr(measure, "measure", lambda machine: profile.model_copy(update={"name": "again"}))
    busy = profile.model_copy(update={"origin": f"{measure._BUSY} (load 9.0)"})
    cached.write_text(busy.to_json())
    assert load_profile("auto").name == profile.name  # still fresh enough
    long_ago = time.time() - 3600
    os.utime(cached, (long_ago, long_ago))
    assert load_profile("auto").name == "again"
    cached.write_text("{")
    assert load_profile("auto").name == "again"


def machine(**changes: object) -> Machine:
    facts: dict = dict(
        cpu="a CPU",
        isas=("avx2", "avx512"),
        nodes=(NodeFacts(0, (0, 1, 2, 3), (0, 1, 2, 3), 8 * GIB, 4 * GIB),),
        caches=(Cache(level=3, type="unified", bytes=64 << 20, instances=4),),
        threads=4,
        logical_cpus=4,
        quota=None,
        memory_limit=None,
        huge_pages="madvise",
    )
    return Machine(**{**facts, **changes})


def test_without_a_probe_the_figures_are_estimates_and_say_why(monkeypatch):
    def refuse():
        raise HetcompError("No usable C++ compiler: none.")

    monkeypatch.setattr(measure, "find_cxx", refuse)
    profile = measure.measure(machine())
    assert not profile.measured
    assert {rate.source for rate in profile.rates} == {Source.ESTIMATE}
    assert profile.nodes[0].source is Source.ESTIMATE
    assert "No usable C++ compiler" in profile.origin


def test_a_cpu_without_instruction_sets_is_not_measured():
    assert "none of the instruction sets" in measure.measure(machine(isas=())).origin


def test_the_buffer_is_larger_than_the_caches_but_leaves_the_memory_alone():
    roomy = machine(nodes=(NodeFacts(0, (0,), (0,), 64 * GIB, 60 * GIB),))
    assert measure.buffer_mebibytes(roomy, roomy.nodes[0]) == 4 * 4 * 64
    assert measure.buffer_mebibytes(machine(), machine().nodes[0]) == 4 * 1024 // 8


def test_a_faster_gemv_raises_the_bandwidth_and_no_fraction_exceeds_one(monkeypatch):
    runs = {
        "avx2": measure.ProbeResult(((1, 8.0), (4, 20.0)), 2.0, {"f32": (50.0, 15.0), "bf16": (40.0, 12.0)}),
        "avx512": measure.ProbeResult(((1, 9.0), (4, 18.0)), 1.0, {"f32": (90.0, 24.0), "bf16": (80.0, 18.0)}),
    }
    monkeypatch.setattr(measure, "_probe", lambda machine: {0: runs})
    profile = measure.measure(machine())
    assert [(p.threads, p.gb_per_s) for p in profile.nodes[0].read_bandwidth] == [(1, 9.0), (4, 24.0)]
    fractions = {(r.isa, r.weight_format): r.bandwidth_fraction for r in profile.rates}
    assert fractions == pytest.approx(
        {("avx2", "f32"): 0.625, ("avx2", "bf16"): 0.5, ("avx512", "f32"): 1.0, ("avx512", "bf16"): 0.75}
    )
    assert profile.barrier_us == 2.0


def test_compilers_run_on_this_machine_whatever_the_profile_says(monkeypatch):
    profile = HardwareProfile.model_validate_json(json.dumps(document()))
    for here, expected in ((64, 8), (3, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, here=here: set(range(here)))
        assert profile.compile_threads() == expected
    small = document()
    for node in small["nodes"]:
        node["available_bytes"] = GIB
    assert HardwareProfile.model_validate_json(json.dumps(small)).compile_threads() == 2
