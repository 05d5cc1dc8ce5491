"""The emulated GPU under the runtime: a hybrid artifact written by hand against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.ir import ops
from hetcomp.runtime import Runtime, RuntimeRefusal
from hetcomp.runtime_abi import Status
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.hybrid_artifact import VOCAB, HybridModel, write_hybrid_artifact
from tests.reference.kernel_harness import activation
from tests.reference.triton_harness import emit, request
from tests.reference.ttir_interpreter import run_kernel

MODEL = HybridModel()
ROW = activation("row", "T", 8)
# f32 sums of 24 products of numbers around 1, against float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "hybrid.hetc"
    with emulated_gpu():
        write_hybrid_artifact(folder, MODEL, batches=(1, 4))
    return folder


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 3, 6, 13])
def test_logits_of_all_positions(artifact, n, threads):
    ids = np.random.default_rng(n).integers(3, VOCAB, n)
    with emulated_gpu() as gpu:
        logits = Runtime.load(artifact, threads=threads).forward(ids)
        assert gpu.launches["rms_norm_1x24"] >= -(-n // 6)
    np.testing.assert_allclose(logits, MODEL.logits(ids.tolist()), **TOLERANCE)


def test_a_batch_that_fills_its_graph_in_part(artifact):
    with emulated_gpu():
        runtime = Runtime.load(artifact, threads=1)
        sessions = [runtime.session() for _ in range(3)]
        sessions[1].prefill([5, 6, 7])
        logits = runtime.decode(sessions, [10, 11, 12])
        np.testing.assert_allclose(logits, MODEL.logits([10, 11, 12]), **TOLERANCE)


def test_a_kernel_that_fails_is_a_failed_step_with_its_reason(artifact, monkeypatch):
    def leave_memory(*_: object, **__: object) -> None:
        raise IndexError("outside")

    with pytest.raises(IndexError, match="outside") as found, emulated_gpu():
        runtime = Runtime.load(artifact, threads=1)
        monkeypatch.setattr("tests.reference.emulated_gpu.run_kernel", leave_memory)
        with pytest.raises(RuntimeRefusal, match="failed in a step"):
            runtime.forward([3])
    assert "in embed_f32_24" in found.value.__notes__[0]


def test_a_kernel_may_only_touch_its_memory():
    launch = emit(request(ops.Add(), [ROW, ROW], [ROW], {"T": 1}, 1)).launches[0]
    memory = np.ones((len(launch.kernel.arguments), 8), np.float32)
    values = {name: a.ctypes.data for (name, _), a in zip(launch.kernel.arguments, memory, strict=True)}
    areas = [range(a.ctypes.data, a.ctypes.data + a.nbytes) for a in memory]
    run_kernel(launch.kernel, (1, 1, 1), values, areas)
    with pytest.raises(IndexError, match="writes outside of its memory, 32 bytes into 32 bytes"):
        run_kernel(launch.kernel, (1, 1, 1), values, areas[:-1])
    with pytest.raises(IndexError, match="reads outside of its memory, 28 bytes into 28 bytes"):
        run_kernel(launch.kernel, (1, 1, 1), values, [range(a.start, a.stop - 4) for a in areas])


def test_outside_there_is_no_gpu(artifact):
    with emulated_gpu():
        pass
    with pytest.raises(RuntimeRefusal, match="no GPU") as refused:
        Runtime.load(artifact)
    assert refused.value.status is Status.MISSING_ISA
