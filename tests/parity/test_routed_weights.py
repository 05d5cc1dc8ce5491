"""Random weights that route as a trace does, on the CPU and beside an emulated GPU, whose routers nobody can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_artifact import build, followed_trace, write_weights_of
from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.plan_wishes import PlanWishes
from hetcomp.record_routing import record_text
from hetcomp.replay_routing import replayed_routing, routing_of
from tests.parity.test_expert_cache import machine
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import save_tiny

ROUTING = "zipf:1,markov:0.5"


def routed(folder: Path, profile: HardwareProfile, routing: str | None = ROUTING, **wishes: object) -> Executable:
    """Of a model with odd sizes whose output layer is its own: 60 wide, 32 tokens of the trace."""
    (folder / "machine.json").write_text(profile.to_json())
    out = build(
        str(folder / "hf"),
        folder / "tiny.hetc",
        formats="q8",
        isa=("avx2",),
        context=40,
        batch=1,
        hw_profile=str(folder / "machine.json"),
        wishes=PlanWishes(**wishes),  # type: ignore[arg-type]
        routing=routing,
    )
    return Executable(out)


@pytest.mark.slow
def test_the_cpus_routers_follow_the_trace_and_so_does_what_is_generated(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=True)
    exe = routed(tmp_path, avx2_machine(1), vram=0)
    wanted = routing_of(ROUTING, exe.plan).experts[:32]
    made = record_text(exe, list(range(32)), "ids").experts
    np.testing.assert_array_equal(np.sort(made, axis=2), np.sort(wanted, axis=2))
    tokens = [token.id for token in exe.runtime.generate([29], max_new_tokens=5, ignore_eos=True)]
    assert tokens == [30, 31, 0, 1, 2]


@pytest.mark.slow
def test_beside_a_gpu_its_routing_can_be_replayed(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=True)
    with emulated_gpu(compute_capability=89):
        exe = routed(tmp_path, machine(), pins=("*=gpu:0",), expert_cache="lru")
        files = sorted(exe.path.glob("*weights*"))
        kept = [file.read_bytes() for file in files]
        trace = routing_of(str(followed_trace(exe.path)), exe.plan)
        with replayed_routing(exe, trace) as replayed:
            assert replayed.ids == tuple(i % 32 for i in range(40)) and "100.0%" in replayed.note
        exe.runtime.close()
        write_weights_of(exe.path, ROUTING)
        assert files and kept == [file.read_bytes() for file in files]


@pytest.mark.slow
def test_even_weights_use_all_experts_and_wander_through_the_vocabulary(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=True)
    exe = routed(tmp_path, avx2_machine(1), "even", vram=0)
    made = record_text(exe, list(range(32)), "ids")
    assert all(len(np.unique(made.experts[:, layer])) == made.n_experts for layer in range(made.experts.shape[1]))
    tokens = [token.id for token in exe.runtime.generate([29], max_new_tokens=5, ignore_eos=True)]
    assert tokens == [30, 31, 32, 33, 34]


@pytest.mark.slow
def test_a_tied_output_layer_is_refused(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    with pytest.raises(HetcompError, match="ties its output layer"):
        routed(tmp_path, avx2_machine(1), vram=0)
