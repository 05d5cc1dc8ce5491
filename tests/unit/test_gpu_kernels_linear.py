"""GPU kernels of linear, head_linear and embed, interpreted, against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from hetcomp.backends import packing
from hetcomp.ir.layouts import with_act_order
from hetcomp.ir.ops import Embed, HeadLinear, Linear
from hetcomp.ir.plan import Value
from hetcomp.ir.types import DType, TensorType
from tests.reference.kernel_harness import activation, weight
from tests.reference.kernel_numbers import (
    Doubles,
    Floats,
    column_orders,
    dot_error,
    draw,
    packed,
    packed_extremes,
    terms,
)
from tests.reference.triton_harness import request, run

DIMS = {"T": 150, "R": 150, "slots": 1, "context": 16}
# Rows, and whether the kernel is for exactly so many: GEMV up to 8 rows, GEMM with the number in memory.
ROWS = [(1, True), (3, True), (8, True), (9, True), (0, False), (1, False), (37, False)]


def multiplied(numbers: Floats, weight_format: str, rows: int, exact: bool) -> Doubles:
    """Activations or weights as the kernel multiplies them: bf16 in a GEMM, but beside f32 weights."""
    if (exact and rows <= 8) or weight_format == "f32":
        return numbers.astype(np.float64)
    return packing.to_f32(packing.to_bf16_bits(numbers)).astype(np.float64)


def _check_linear(
    weight_format: str,
    out: int,
    k: int,
    bias: bool,
    rows: int,
    exact: bool,
    tokens: int = 150,
    narrow: bool = False,
    weights: Callable[[np.random.Generator, Value], tuple[npt.NDArray[np.uint8], Floats]] | None = None,
) -> None:
    """tokens: most rows that a step may have. narrow: activations are bf16 already. weights: draws them, packed and as
    numbers."""
    rng = np.random.default_rng(rows)
    x, b = draw(rng, (rows, k)), draw(rng, (out,))
    bits = packing.to_bf16_bits(x)
    value = weight("w", (out, k), weight_format, packing.PANELS)
    data, w = weights(rng, value) if weights else packed(draw(rng, (out, k)), value)
    its_type = TensorType(DType.BF16 if narrow else DType.F32, ("T", k))
    operands = [replace(activation("x", "T", k), type=its_type), value, *([activation("b", out)] if bias else [])]
    dims = {**DIMS, "T": tokens}
    asked = request(Linear(k, out, bias), operands, [activation("y", "T", out)], dims, rows if exact else None)
    arrays = [bits if narrow else x, data, *([b] if bias else [])]
    grid_rows = rows if exact else max(rows, 70)  # programs beyond the step's rows do nothing
    (y,) = run(asked, arrays, [((rows, out), np.float32)], rows=rows, grid_rows=grid_rows)
    x64, w64 = (multiplied(n, weight_format, rows, exact) for n in (x, w))
    added = terms(data, value) if exact and rows <= 8 else np.abs(w64)
    magnitude = np.abs(x64) @ added.T + np.abs(b)
    assert (np.abs(y - (x64 @ w64.T + b * bias)) <= dot_error(k, magnitude)).all()


@pytest.mark.parametrize(("rows", "exact"), ROWS)
@pytest.mark.parametrize("weight_format", packing.FORMATS)
def test_linear(weight_format, rows, exact):
    _check_linear(weight_format, 80, 300, True, rows, exact)


@pytest.mark.parametrize("weight_format", packing.TAKEN_OVER)
def test_products_with_unit_vectors_are_the_weights(weight_format):
    """Bit for bit: in a GEMV the format's numbers, in a GEMM those rounded to bf16."""
    out, k = 37, 300
    value, unit = weight("w", (out, k), weight_format, packing.PANELS), np.eye(k, dtype=np.float32)
    data, w = packed(draw(np.random.default_rng(0), (out, k)), value)
    operands, outputs = [activation("x", "T", k), value], [activation("y", "T", out)]
    for columns, exact in (([0, 5, 15, 31, 32, 255, 256, 299], True), (range(k), False)):
        rows = len(columns)
        asked = request(Linear(k, out), operands, outputs, {**DIMS, "T": k}, rows if exact else None)
        (y,) = run(asked, [unit[columns], data], [((rows, out), np.float32)], rows=rows)
        want = w.T[columns] if exact else packing.to_f32(packing.to_bf16_bits(w.T[columns]))
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("rows", "exact"), [(2, True), (20, False)])
@pytest.mark.parametrize("weight_format", ["q4", "q8", "fp8", "mxfp4", *packing.TAKEN_OVER])
def test_linear_takes_codes_that_only_checkpoints_have(weight_format, rows, exact):
    _check_linear(weight_format, 80, 300, True, rows, exact, weights=packed_extremes)


@pytest.mark.parametrize(("rows", "exact"), [(2, True), (20, False)])
@pytest.mark.parametrize("weight_format", packing.FORMATS)
@pytest.mark.parametrize(("out", "k"), [(1, 1), (17, 33), (130, 129), (64, 256)])
def test_linear_of_odd_and_even_sizes(weight_format, out, k, rows, exact):
    _check_linear(weight_format, out, k, False, rows, exact)


@pytest.mark.parametrize(
    ("weight_format", "rows", "tokens"), [("q4", 2, 2), ("q4z", 3, 3), ("q8", 20, 150), ("q4", 20, 1024)]
)
def test_linear_whose_columns_have_an_order_of_their_own(weight_format, rows, tokens):
    """Bit for bit what the kernel without an order makes of activations in that order: a GEMV, tiles of packed weights,
    weights that are unpacked once."""
    out, k = 50, 288
    rng = np.random.default_rng(rows)
    x, b = draw(rng, (rows, k)), draw(rng, (out,))
    value = weight("w", (out, k), weight_format, with_act_order(packing.PANELS))
    data, _ = packed(draw(rng, (out, k)), value)
    orders = column_orders(data, value)
    assert orders is not None
    in_order = np.ascontiguousarray(x[:, orders[0]])
    results = []
    for layout, its_x, its_data in ((value.type.layout, x, data), (packing.PANELS, in_order, data[: -4 * k])):
        operands = [activation("x", "T", k), weight("w", (out, k), weight_format, layout), activation("b", out)]
        exact = rows if tokens == rows else None
        asked = request(Linear(k, out, True), operands, [activation("y", "T", out)], {**DIMS, "T": tokens}, exact)
        results += run(asked, [its_x, its_data, b], [((rows, out), np.float32)], rows=rows, grid_rows=rows)
    np.testing.assert_array_equal(*results)


def test_linear_of_many_rows():
    """Tiles of 128 rows."""
    _check_linear("q4", 48, 96, False, 150, False)


@pytest.mark.parametrize(("weight_format", "k"), [("q4", 1100), ("f32", 700)])
@pytest.mark.parametrize(("rows", "bias"), [(40, True), (130, False)])
def test_linear_in_parts_of_k(weight_format, k, rows, bias):
    _check_linear(weight_format, 40, k, bias, rows, False)


@pytest.mark.parametrize("weight_format", [*(f for f in packing.FORMATS if f != "f32"), "q4k"])
@pytest.mark.parametrize(("out", "k", "rows", "bias"), [(70, 130, 140, True), (128, 192, 3, False), (40, 64, 0, False)])
def test_linear_whose_weights_are_unpacked_once(weight_format, out, k, rows, bias):
    _check_linear(weight_format, out, k, bias, rows, False, tokens=1024)


@pytest.mark.parametrize("tokens", [150, 1024])
def test_linear_of_rounded_activations(tokens):
    _check_linear("q4", 48, 96, False, 20, False, tokens, narrow=True)


@pytest.mark.parametrize(("rows", "exact"), [(2, True), (11, False)])
@pytest.mark.parametrize("weight_format", packing.FORMATS)
def test_head_linear(weight_format, rows, exact):
    heads, k, out = 3, 21, 37
    rng = np.random.default_rng(rows)
    x = draw(rng, (rows, heads, k))
    value = weight("w", (heads, out, k), weight_format, packing.PANELS)
    data, w = packed(draw(rng, (heads, out, k)), value)
    operands = [activation("x", "T", heads, k), value]
    outputs = [activation("y", "T", heads, out)]
    asked = request(HeadLinear(heads, k, out), operands, outputs, DIMS, rows if exact else None)
    (y,) = run(asked, [x, data], [((rows, heads, out), np.float32)], rows=rows)
    x64, w64 = (multiplied(n, weight_format, rows, exact) for n in (x, w))
    want = np.einsum("thk,hnk->thn", x64, w64)
    magnitude = np.einsum("thk,hnk->thn", np.abs(x64), np.abs(w64))
    assert (np.abs(y - want) <= dot_error(k, magnitude)).all()


@pytest.mark.parametrize(
    ("weight_format", "width", "rows"),
    [
        *((f, k, rows) for f in packing.FORMATS for k in (1, 301) for rows in ((2, True), (0, False), (5, False))),
        *((f, 301, (5, False)) for f in packing.TAKEN_OVER),
    ],
)
def test_embed(weight_format, width, rows):
    vocab, scale = 50, 1.5
    count, exact = rows
    rng = np.random.default_rng(count)
    value = weight("w", (vocab, width), weight_format, packing.PANELS)
    data, table = packed(draw(rng, (vocab, width)), value)
    ids = rng.integers(0, vocab, count).astype(np.int32)
    operands = [activation("ids", "T"), value]
    asked = request(Embed(vocab, width, scale), operands, [activation("y", "T", width)], DIMS, count if exact else None)
    (y,) = run(asked, [ids, data], [((count, width), np.float32)], rows=count, grid_rows=count if exact else 7)
    np.testing.assert_array_equal(y, table[ids] * np.float32(scale))


def test_not_finite_activations_stay_in_their_row():
    rng = np.random.default_rng(0)
    value = weight("w", (80, 300), "q4", packing.PANELS)
    data, _ = packed(draw(rng, (80, 300)), value)
    for rows, bad in ((2, np.nan), (30, np.inf)):
        x = draw(rng, (rows, 300))
        x[1, 5] = bad
        asked = request(Linear(300, 80), [activation("x", "T", 300), value], [activation("y", "T", 80)], DIMS, rows)
        (y,) = run(asked, [x, data], [((rows, 80), np.float32)], rows=rows)
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(np.delete(y, 1, axis=0)).all()
