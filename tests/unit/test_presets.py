"""Presets: every part loads, says where its figures come from, and goes together with others."""

from __future__ import annotations

import json

import pytest

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Source
from hetcomp.hardware.presets import gpu_names, machine_names
from hetcomp.hardware.profile import DATA_SHEET_READS, load_profile

# What every machine and every GPU has to name a source for.
MACHINE_FIGURES = ("cpu", "threads", "nodes.memory_bytes", "nodes.read_bandwidth", "caches", "rates", "barrier_us")
GPU_FIGURES = ("memory_bytes", "gb_per_s", "link_gb_per_s", "rates", "handshake_us", "launch_us")


def test_there_are_enough():
    assert len(machine_names()) >= 10 and len(gpu_names()) >= 8


@pytest.mark.parametrize("name", machine_names())
def test_machines(name):
    profile = load_profile(f"preset:{name}")
    assert profile.name == name and profile.origin and not profile.measured and not profile.gpus
    assert all(node.source is Source.DATA_SHEET for node in profile.nodes)
    assert all(rate.source is not Source.MEASURED for rate in profile.rates)
    for figure in MACHINE_FIGURES:
        assert any(path.startswith(figure) for path in profile.references), figure
    peak = max(point.gb_per_s for node in profile.nodes for point in node.read_bandwidth)
    assert profile.bandwidth() == pytest.approx(DATA_SHEET_READS * peak)
    assert 50 < peak < 700
    assert profile.threads == sum(node.cores for node in profile.nodes)


@pytest.mark.parametrize("name", gpu_names())
def test_gpus(name):
    profile = load_profile(f"preset:{name}+9950x-64gb")
    (gpu,) = profile.gpus
    assert gpu.source is Source.DATA_SHEET and all(rate.source is not Source.MEASURED for rate in gpu.rates)
    assert {"bf16", "f32"} <= {rate.weight_format for rate in gpu.rates}
    for figure in GPU_FIGURES:
        assert f"gpus.0.{figure}" in profile.references
    assert 20 < (gpu.memory_bytes >> 30) < 200 and 800 < (gpu.gb_per_s or 0) < 5000


def test_parts_go_together():
    profile = load_profile("preset:rtx4090+2x8480")
    assert [g.name for g in profile.gpus] == ["NVIDIA GeForce RTX 4090"] and len(profile.nodes) == 2
    assert [g.name[-4:] for g in load_profile("preset:2xrtx5090+9755-768gb").gpus] == ["5090", "5090"]
    assert "data sheet" in profile.caveat
    assert json.loads(profile.to_json())["references"]["gpus.0.gb_per_s"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rtx4009+2x8480", "did you mean rtx4090"),
        ("rtx4090", "names no machine"),
        ("2x8480+9355-384gb", "names 2x8480 and 9355-384gb"),
        ("9950x", "did you mean 9950x-64gb|did you mean 9950x-192gb"),
        ("99xrtx4090+2x8480", "no hardware preset '99xrtx4090'"),
        ("", "no hardware preset ''"),
    ],
)
def test_unknown_parts_are_answered_with_near_names(spec, words):
    with pytest.raises(HetcompError, match=words):
        load_profile(f"preset:{spec}")
