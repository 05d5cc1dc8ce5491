"""Sampled tokens with candidates from the GPU are those of an artifact that fetches all logits."""

from __future__ import annotations

import pytest

from hetcomp.backends.gpu import lower_step
from hetcomp.executable import Executable
from tests.parity.test_gpu_families import compile_tiny
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.tiny_models import save_tiny, token_ids

SAMPLINGS = (
    {"temperature": 0.2, "top_k": 3},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.5},
)


def tokens(exe: Executable, ids: list[int]) -> list[list[int]]:
    return [
        [t.id for t in exe.runtime.generate(ids, max_new_tokens=6, seed=seed, ignore_eos=True, **sampling)]
        for seed, sampling in enumerate(SAMPLINGS)
    ]


@pytest.mark.slow
def test_candidates_change_no_token(tmp_path, monkeypatch):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    ids = token_ids(model, 5)[0].tolist()
    with emulated_gpu(compute_capability=89) as gpu:
        exe = compile_tiny(tmp_path, "gpu", max_batch=1)
        want = tokens(exe, ids)
        exe.runtime.close()
        assert not any(stem.startswith("candidate") for stem in gpu.launches)
        monkeypatch.setattr(lower_step, "CANDIDATES_FROM", 64)
        exe = compile_tiny(tmp_path, "gpu", max_batch=1)
        assert tokens(exe, ids) == want
        exe.runtime.close()
        assert any(stem.startswith("gather_candidates") for stem in gpu.launches)
    assert len({tuple(row) for row in want}) > 1
