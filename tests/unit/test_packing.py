"""Packed layouts against their definition, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType


def _weight(shape: tuple[int, ...], weight_format: str | None, layout: str) -> Value:
    return Value("w", TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn="m.w", format=weight_format)


def _unpack(data: np.ndarray, rows: int, columns: int, weight_format: str) -> np.ndarray:
    """The matrix of whole panels that the bytes hold, straight from the layout's definition; f32."""
    panels = -(-rows // 16)
    if weight_format == "f32":
        return data.view(np.float32).reshape(panels, columns, 16).transpose(0, 2, 1).reshape(panels * 16, columns)
    pairs = -(-columns // 2)
    bits = data.view(np.uint16).reshape(panels, pairs, 16, 2)
    return packing.to_f32(bits.transpose(0, 2, 1, 3).reshape(panels * 16, pairs * 2))


def _numbers(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "f16":
        return numbers.astype(np.float16)
    return packing.to_bf16_bits(numbers) if dtype == "bf16" else numbers


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    weight_format=st.sampled_from(["f32", "bf16"]),
    seed=st.integers(0, 99),
)
def test_panels_hold_the_matrix_and_zeros(rows, columns, dtype, weight_format, seed):
    value = _weight((rows, columns), weight_format, packing.PANELS)
    numbers = _numbers((rows, columns), dtype, seed)
    data, finite = packing.pack(numbers, value)
    assert finite
    assert data.size == packing.packed_bytes(value)
    assert data.size % 64 == 0
    want = packing.to_f32(numbers)
    if weight_format == "bf16":
        want = packing.to_f32(packing.to_bf16_bits(want))
    got = _unpack(data, rows, columns, weight_format)
    np.testing.assert_array_equal(got[:rows, :columns], want)
    assert not got[rows:].any()
    assert not got[:, columns:].any()


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 4),
    half=st.integers(1, 40),
    columns=st.integers(1, 20),
    weight_format=st.sampled_from(["f32", "bf16"]),
)
def test_gate_and_up_panels_alternate(experts, half, columns, weight_format):
    value = _weight((experts, 2 * half, columns), weight_format, packing.PANELS_GLU)
    numbers = packing.to_f32(_numbers((experts, 2 * half, columns), "bf16", half))
    data, _ = packing.pack(numbers, value)
    assert data.size == packing.packed_bytes(value)
    pairs = -(-half // 16)
    each = data.size // experts
    for e in range(experts):
        panels = _unpack(data[e * each : (e + 1) * each], 32 * pairs, columns, weight_format)
        panels = panels.reshape(pairs, 2, 16, -1)
        gate, up = panels[:, 0].reshape(16 * pairs, -1), panels[:, 1].reshape(16 * pairs, -1)
        np.testing.assert_array_equal(gate[:half, :columns], numbers[e, :half])
        np.testing.assert_array_equal(up[:half, :columns], numbers[e, half:])
        assert not gate[half:].any()
        assert not up[half:].any()


@pytest.mark.parametrize("layout", [packing.PANELS, packing.PANELS_GLU])
@pytest.mark.parametrize("weight_format", ["f32", "bf16"])
def test_experts_can_be_packed_one_at_a_time_into_a_given_buffer(layout, weight_format):
    value = _weight((3, 34, 21), weight_format, layout)
    numbers = _numbers((3, 34, 21), "f32", 0)
    whole, _ = packing.pack(numbers, value)
    out = np.full(packing.packed_bytes(value), 7, np.uint8)
    each = out.size // packing.matrices(value)
    for e in range(3):
        returned, finite = packing.pack(numbers[e], value, out[e * each : (e + 1) * each])
        assert finite
        assert np.shares_memory(returned, out)
    np.testing.assert_array_equal(out, whole)


def test_transposed_views_are_packed_like_copies():
    value = _weight((2, 34, 21), "bf16", packing.PANELS_GLU)
    stored = _numbers((2, 21, 34), "f32", 3)
    view, copy = stored.transpose(0, 2, 1), stored.transpose(0, 2, 1).copy()
    np.testing.assert_array_equal(packing.pack(view, value)[0], packing.pack(copy, value)[0])


def test_row_major_constants_are_f32_padded_to_64_bytes():
    value = _weight((3, 7), None, packing.ROW_MAJOR)
    numbers = _numbers((3, 7), "bf16", 0)
    data, finite = packing.pack(numbers, value)
    assert finite
    assert data.size == packing.packed_bytes(value) == 128
    np.testing.assert_array_equal(data[:84].view(np.float32).reshape(3, 7), packing.to_f32(numbers))
    assert not data[84:].any()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_to_nearest_even(bits):
    number = np.array([bits], np.uint32).view(np.float32)
    got = packing.to_f32(packing.to_bf16_bits(number))[0]
    if np.isnan(number[0]):
        assert np.isnan(got)
        return
    # The two bf16 numbers around it, and the tie rule, in exact integer arithmetic on the magnitude.
    low, rest = (bits & 0x7FFFFFFF) >> 16, bits & 0xFFFF
    up = rest > 0x8000 or (rest == 0x8000 and low & 1)
    want = np.array([((low + int(up)) << 16) | (bits & 0x80000000)], np.uint32).view(np.float32)[0]
    assert got == want


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight_format", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_numbers_that_are_not_finite_are_reported(bad, weight_format, dtype):
    value = _weight((40, 50), weight_format, packing.PANELS)
    numbers = _numbers((40, 50), dtype, 0)
    assert packing.pack(numbers, value)[1]
    numbers[37, 49] = packing.to_bf16_bits(np.float32([bad]))[0] if dtype == "bf16" else bad
    assert not packing.pack(numbers, value)[1]


def test_bad_requests_name_the_weight_and_what_was_expected():
    with pytest.raises(HetcompError, match="format 'q5' cannot be packed for the CPU; expected one of f32, bf16"):
        packing.pack(np.zeros((4, 4), np.float32), _weight((4, 4), "q5", packing.PANELS))
    with pytest.raises(HetcompError, match=r"m\.w has shape \[4, 5\], expected \[4, 4\]"):
        packing.pack(np.zeros((4, 5), np.float32), _weight((4, 4), "f32", packing.PANELS))
    with pytest.raises(HetcompError, match=r"m\.w has layout panels16 but no format"):
        packing.packed_bytes(_weight((4, 4), None, packing.PANELS))
    with pytest.raises(HetcompError, match=r"m\.w of shape \[5, 4\] does not fit layout panels16_glu"):
        packing.packed_bytes(_weight((5, 4), "f32", packing.PANELS_GLU))
    with pytest.raises(HetcompError, match="buffer of 1024 contiguous bytes"):
        packing.pack(np.zeros((4, 16), np.float32), _weight((4, 16), "f32", packing.PANELS), np.zeros(9, np.uint8))
    with pytest.raises(HetcompError, match="dtype int8 cannot be packed"):
        packing.pack(np.zeros((4, 4), np.int8), _weight((4, 4), "f32", packing.PANELS))
