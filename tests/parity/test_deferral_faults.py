"""Deferral in a step that fails: what a layer left is not added to a later step."""

from __future__ import annotations

import numpy as np
import pytest

import tests.reference.emulated_gpu as emulation
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.runtime import RuntimeRefusal
from tests.parity.test_deferral import CASES
from tests.parity.test_families import TOLERANCE, relative_error
from tests.reference.deferral_reference import deferred_logits
from tests.reference.tiny_models import save_tiny, token_ids


@pytest.mark.slow
def test_a_step_that_fails_leaves_nothing_for_the_next(tmp_path, monkeypatch):
    """The GPU fails when it hands out the input of the layer behind one that has deferred."""
    case = CASES[0]
    model = save_tiny(case.family, tmp_path / "hf")
    ids = token_ids(model, 7, seed=5)
    real, handed = emulation.run_kernel, []

    def fail_at_the_second(kernel: GpuKernel, *args: object, **options: object) -> None:
        if kernel.stem.startswith("hand_out"):
            handed.append(kernel.stem)
        if len(handed) == 2:
            raise RuntimeError("a fault")
        real(kernel, *args, **options)

    with pytest.raises(RuntimeError, match="a fault"), emulation.emulated_gpu(compute_capability=89):
        exe = case.compile(tmp_path)
        session = exe.runtime.session()
        session.prefill(ids[0, :5].tolist())
        with monkeypatch.context() as patch:
            patch.setattr(emulation, "run_kernel", fail_at_the_second)
            with pytest.raises(RuntimeRefusal):
                exe.runtime.decode([session], [7])
        assert len(handed) == 2
        rows = np.stack([exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 5:]])
        assert relative_error(rows, deferred_logits(model, ids, exe.plan, range(5, ids.shape[1]))[5:]) < TOLERANCE
