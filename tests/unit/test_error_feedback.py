"""Error feedback: what a group of columns is off, the columns after it make good."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.backends import error_feedback, packing
from hetcomp.backends.error_feedback import pack_with_feedback
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType


def _weight(shape: tuple[int, ...], form: str, layout: str) -> Value:
    return Value("w", TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn="m.w", format=form)


def _numbers(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)


def _correlated(columns: int) -> np.ndarray:
    """Second moments of activations that a few common causes drive."""
    rng = np.random.default_rng(4)
    causes = rng.standard_normal((columns, columns // 4))
    return (causes @ causes.T / (columns // 4) + 0.1 * np.eye(columns)).astype(np.float32)


def _output_error(numbers: np.ndarray, got: np.ndarray, moments: np.ndarray) -> float:
    """Mean squared error of the products, tr(D C D^T)."""
    errors = numbers.astype(np.float64) - got
    return float(((errors @ moments) * errors).sum())


@pytest.mark.parametrize("form", error_feedback.FORMATS)
@pytest.mark.parametrize("layout", [packing.PANELS, packing.PANELS_GLU])
@pytest.mark.parametrize("shape", [(64, 128), (34, 70), (2, 33)])
def test_products_come_out_better(form, layout, shape):
    value, numbers, moments = _weight(shape, form, layout), _numbers(*shape), _correlated(shape[1])
    data, finite = pack_with_feedback(numbers, value, moments)
    assert finite and data.size == packing.packed_bytes(value)
    plain, _ = packing.pack(numbers, value)
    got, without = packing.unpack(data, value), packing.unpack(plain, value)
    # Every number stays near its own: none is at the place of another.
    assert np.corrcoef(got.ravel(), numbers.ravel())[0, 1] > 0.9
    gain = _output_error(numbers, got, moments) / _output_error(numbers, without, moments)
    # The causes span a quarter of the columns, so that most of an error can be made good, but not the last group's.
    assert gain <= (0.75 if shape[1] > 64 else 1.0)


@pytest.mark.parametrize("form", error_feedback.FORMATS)
def test_uncorrelated_columns_are_packed_as_ever(form):
    value, numbers = _weight((48, 96), form, packing.PANELS), _numbers(48, 96)
    data, _ = pack_with_feedback(numbers, value, 4 * np.eye(96, dtype=np.float32))
    plain, _ = packing.pack(numbers, value)
    assert (data == plain).mean() > 0.99  # ties apart


def test_rows_are_packed_in_blocks(monkeypatch):
    value, numbers, moments = _weight((70, 64), "q4", packing.PANELS), _numbers(70, 64), _correlated(64)
    whole, _ = pack_with_feedback(numbers, value, moments)
    monkeypatch.setattr(error_feedback, "_ROWS", 32)
    np.testing.assert_array_equal(pack_with_feedback(numbers, value, moments)[0], whole)


def test_moments_of_no_activations_are_refused():
    value, numbers = _weight((16, 64), "q4", packing.PANELS), _numbers(16, 64)
    moments = np.ones((64, 64), np.float32) - 0.5 * np.eye(64, dtype=np.float32)
    with pytest.raises(HetcompError, match=r"second moments of m\.w are not those of activations"):
        pack_with_feedback(numbers, value, moments)


def test_numbers_too_large_for_a_scale_are_told():
    value = _weight((16, 64), "q4", packing.PANELS)
    assert not pack_with_feedback(_numbers(16, 64) * 1e7, value, np.eye(64, dtype=np.float32))[1]
