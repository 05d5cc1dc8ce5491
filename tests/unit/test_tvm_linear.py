"""linear of the TVM backend: the second opinion on f32 weights, in the packed layout [out / 16][in][16]."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from tests.reference.tvm_harness import BACKEND, machine_isas, request, run, value

ISAS = machine_isas()


def packed(weight: np.ndarray) -> np.ndarray:
    """Rows padded with NaN, which must not be seen in any output."""
    out, k = weight.shape
    whole = np.full((-(-out // 16) * 16, k), np.nan, np.float32)
    whole[:out] = weight
    return whole.reshape(-1, 16, k).transpose(0, 2, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "out", "bias"), [(70, 50, True), (64, 48, False), (1, 5, True), (33, 17, False)])
def test_linear(k: int, out: int, bias: bool, isa: Isa):
    rng = np.random.default_rng(k)
    for rows, threads in ((1, 3), (9, 2)):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        w = rng.standard_normal((out, k)).astype(np.float32)
        b = rng.standard_normal(out).astype(np.float32)
        ins = [value("x", ("T", k)), value("w", (out, k), format="f32")]
        arrays = [x, packed(w)]
        if bias:
            ins.append(value("b", (out,)))
            arrays.append(b)
        kernel = BACKEND.emit(request(ops.Linear(k, out, bias), ins, [value("y", ("T", out))], isa))
        (got,) = run(kernel, isa, arrays, [((rows, out), np.float32)], rows, threads)
        want = x.astype(np.float64) @ w.T.astype(np.float64) + (b if bias else 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_only_f32_weights_are_taken_and_with_the_lowest_score():
    def ask(format: str):
        ins = [value("x", ("T", 32)), value("w", (16, 32), format=format)]
        return request(ops.Linear(32, 16), ins, [value("y", ("T", 16))], ISAS[0])

    assert BACKEND.score(ask("f32")) == 1
    assert BACKEND.score(ask("bf16")) == 0
    with pytest.raises(HetcompError, match="bf16 weights"):
        BACKEND.emit(ask("bf16"))
