"""rms_norm, rope_table and rope of the TVM backend against numpy and transformers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.types import DType
from tests.reference.tvm_harness import BACKEND, machine_isas, request, run, value
from tests.sampled_cases import draws

pytestmark = pytest.mark.spread("isa")
ISAS = machine_isas()
FEW = settings(max_examples=draws(8), deadline=None, derandomize=True)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("groups", "width", "offset"),
    [(1, 1, 0.0), (3, 7, 1.0), (1, 33, 0.0), (2, 128, 1.0), (1, 256, 0.0), (1, 1000, 0.0)],
)
@FEW
@given(rows=st.integers(1, 70), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_rms_norm(isa: Isa, groups: int, width: int, offset: float, rows: int, threads: int, seed: int):
    x, w = _random(rows, groups * width, seed=seed), _random(width, seed=seed + 1)
    attrs = ops.RmsNorm(width, 1e-5, groups, offset)
    kernel = BACKEND.emit(
        request(
            attrs,
            [value("x", ("T", groups * width)), value("w", (width,))],
            [value("y", ("T", groups * width))],
            isa,
        )
    )
    (got,) = run(kernel, isa, [x, w], [(x.shape, np.float32)], rows, threads)
    x64 = x.astype(np.float64).reshape(rows, groups, width)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * (w.astype(np.float64) + offset)
    np.testing.assert_allclose(got, want.reshape(x.shape), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 7, 33, 256, 1000])
@FEW
@given(rows=st.integers(1, 70), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_layer_norm(isa: Isa, width: int, rows: int, threads: int, seed: int):
    """Far from zero, where the mean of squares less the square of the mean would be wrong."""
    x, w, b = _random(rows, width, seed=seed) + 1000, _random(width, seed=seed + 1), _random(width, seed=seed + 2)
    ins = [value("x", ("T", width)), value("w", (width,)), value("b", (width,))]
    kernel = BACKEND.emit(request(ops.LayerNorm(width, 1e-5), ins, [value("y", ("T", width))], isa))
    (got,) = run(kernel, isa, [x, w, b], [(x.shape, np.float32)], rows, threads)
    apart = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    want = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5) * w + b
    # The mean of numbers around 1000 is off by a few of their 6e-5, times the weight; the mean of squares less the
    # square of the mean would be off by 0.06.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_rms_norm_of_huge_and_zero_rows(isa: Isa):
    """1e18 squared overflows no f32 sum of 64; a row of zeros stays zero, not NaN."""
    x = np.stack([np.full(64, 1e18), np.zeros(64), np.full(64, 1e-30)]).astype(np.float32)
    kernel = BACKEND.emit(
        request(
            ops.RmsNorm(64, 1e-6),
            [value("x", ("T", 64)), value("w", (64,))],
            [value("y", ("T", 64))],
            isa,
        )
    )
    (got,) = run(kernel, isa, [x, np.ones(64, np.float32)], [(x.shape, np.float32)], 3)
    np.testing.assert_allclose(got[0], 1.0, rtol=1e-6)
    assert (got[1] == 0).all()
    np.testing.assert_allclose(got[2], 1e-27, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scaling", [1.0, 1.3465])
def test_rope_table_is_accurate_up_to_a_million_positions(isa: Isa, scaling: float):
    half = 24
    inv_freq = (1.0 / 1e6 ** (np.arange(half) / half)).astype(np.float32)
    positions = np.array([0, 1, 2, 4095, 131071, 999_999, 1_000_000], np.int32)
    kernel = BACKEND.emit(
        request(
            ops.RopeTable(2 * half, scaling),
            [value("p", ("T",), DType.I32), value("f", (half,))],
            [value("c", ("T", half)), value("s", ("T", half))],
            isa,
        )
    )
    shape = (len(positions), half)
    cos, sin = run(kernel, isa, [positions, inv_freq], [(shape, np.float32)] * 2, len(positions), 2)
    angle = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angle) * scaling, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angle) * scaling, atol=2e-7)


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, attrs: ops.Rope) -> np.ndarray:
    """The docstring of ops.Rope, pair by pair."""
    half, y = attrs.rotary_dim // 2, x.copy()
    for i in range(half):
        if attrs.style == "half":
            a, b = attrs.offset + i, attrs.offset + half + i
        else:
            a, b = attrs.offset + 2 * i, attrs.offset + 2 * i + 1
        to_a, to_b = (a, b) if attrs.style != "interleaved_to_half" else (attrs.offset + i, attrs.offset + half + i)
        c, s = cos[:, None, i], sin[:, None, i]
        y[:, :, to_a] = x[:, :, a] * c - x[:, :, b] * s
        y[:, :, to_b] = x[:, :, b] * c + x[:, :, a] * s
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize(
    ("heads", "half", "margins"), [(5, 32, (0, 0)), (1, 21, (3, 5)), (4, 2, (16, 0)), (3, 16, (0, 8))]
)
@FEW
@given(rows=st.integers(1, 50), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_rope(
    isa: Isa, style: str, heads: int, half: int, margins: tuple[int, int], rows: int, threads: int, seed: int
):
    head_dim = margins[0] + 2 * half + margins[1]
    attrs = ops.Rope(heads, head_dim, 2 * half, margins[0], style)  # type: ignore[arg-type]
    x, cos, sin = (
        _random(rows, heads, head_dim, seed=seed),
        _random(rows, half, seed=1),
        _random(rows, half, seed=2),
    )
    ins = [value("x", ("T", heads, head_dim)), value("c", ("T", half)), value("s", ("T", half))]
    kernel = BACKEND.emit(request(attrs, ins, [value("y", ("T", heads, head_dim))], isa))
    (got,) = run(kernel, isa, [x, cos, sin], [(x.shape, np.float32)], rows, threads)
    np.testing.assert_allclose(got, _rope(x, cos, sin, attrs), rtol=1e-5, atol=1e-6)


def test_rope_outside_of_the_head_is_refused():
    ins = [value("x", ("T", 2, 16)), value("c", ("T", 8)), value("s", ("T", 8))]
    with pytest.raises(HetcompError, match="rotates 16 elements from 4 on of heads of 16"):
        BACKEND.emit(request(ops.Rope(2, 16, 16, 4), ins, [value("y", ("T", 2, 16))], ISAS[0]))
