"""Profiles: files, presets, errors that name the place, and the figures that the passes read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hetcomp.errors import HetcompError
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


def test_compilers_run_on_this_machine_whatever_the_profile_says(monkeypatch):
    profile = HardwareProfile.model_validate_json(json.dumps(document()))
    for here, expected in ((64, 8), (3, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, here=here: set(range(here)))
        assert profile.compile_threads() == expected
    small = document()
    for node in small["nodes"]:
        node["available_bytes"] = GIB
    assert HardwareProfile.model_validate_json(json.dumps(small)).compile_threads() == 2
