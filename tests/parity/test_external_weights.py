"""Artifacts that refer to the files they were compiled from, beside those that have a copy: the same logits, bit for
bit, with and without Python, on the CPU and with a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import hetcomp
from hetcomp.artifact.inspection import inspect_artifact
from tests.parity.test_gpu_families import compile_tiny
from tests.reference import gguf_models, tiny_models
from tests.reference.emulated_gpu import emulated_gpu

CONTEXT = 64


def run_alone(artifact: Path) -> str:
    """What the artifact's own program generates."""
    command = [artifact / "bin" / "hetcomp-run", artifact, "--ids", "5,6,7", "-n", "8", "--ignore-eos"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_gguf_file_without_a_copy(tmp_path):
    model = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("mixtral"), lambda name: Type.Q4_0)
    logits, texts, bytes_of = {}, {}, {}
    for weights in ("packed", "external"):
        path = tmp_path / f"{weights}.hetc"
        logits[weights] = hetcomp.compile(model, context_length=CONTEXT, out=path, weights=weights)(range(5, 30))
        texts[weights] = run_alone(path)
        bytes_of[weights] = sum(file.stat().st_size for file in path.glob("weights-*"))
    np.testing.assert_array_equal(logits["external"], logits["packed"])
    assert texts["external"] == texts["packed"]
    found = inspect_artifact(tmp_path / "external.hetc")
    assert (found.packed, bytes_of["external"]) == (64, 4096 + 64)  # rope's frequencies
    assert bytes_of["packed"] - bytes_of["external"] == found.repacked + found.mapped
    assert found.reasons == {"computed when compiling": 64}
    assert f"needs {model} " in found.in_words()


@pytest.mark.slow
def test_on_a_gpu(tmp_path):
    """Whose weights are made by the same code; experts are the CPU's."""
    tiny_models.save_tiny("qwen3_moe", tmp_path / "hf")
    logits = {}
    with emulated_gpu(compute_capability=89):
        for weights in ("packed", "external"):
            exe = compile_tiny(tmp_path, "experts", weights=weights)
            logits[weights] = exe(range(5, 12))
            found = inspect_artifact(tmp_path / "tiny.hetc")
            exe.runtime.close()
    np.testing.assert_array_equal(logits["external"], logits["packed"])
    assert found.repacked > 50 * found.packed
    program = (tmp_path / "tiny.hetc" / "gpu" / "program-0.json").read_text()
    assert '"stored":' in program
