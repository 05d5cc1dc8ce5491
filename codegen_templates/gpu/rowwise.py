"""Norm, rotary embedding and the reading of rows: f32 rows in, f32 rows out (hetcomp/ir/ops.py).

``n_rows`` i32[1]: how many rows the step has; None where the grid has exactly as many.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import activate
from hetcomp.codegen_templates.gpu.weights import (
    element,
    elements_of_word,
    has_minima,
    has_scales,
    load_scales,
    load_words,
)


@triton.jit
def beyond(row, n_rows):
    """Whether the program's row is none of the step's."""
    if n_rows is None:
        return False
    else:
        return row >= tl.load(n_rows)


@triton.jit
def rms_norm(
    x,
    weight,
    gate,
    n_rows,
    y,
    rounded,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FUNCTION: tl.constexpr,
    RUNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """x f32[rows, GROUPS, WIDTH], weight f32[WIDTH] -> y of x's shape, f32 or bf16, and rounded, None or bf16. gate:
    None, or f32 of x's shape whose FUNCTION the result is multiplied by. Grid: (rows, blocks of RUNS groups)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    d = tl.arange(0, PADDED)
    mask = (run < GROUPS)[:, None] & (d < WIDTH)[None, :]
    at = row.to(tl.int64) * (GROUPS * WIDTH) + run[:, None] * WIDTH + d[None, :]
    numbers = tl.load(x + at, mask=mask, other=0.0)
    mean = tl.sum(numbers * numbers, axis=1) / WIDTH
    factor = 1.0 / tl.sqrt_rn(mean + EPS)
    scale = tl.load(weight + d, mask=d < WIDTH, other=0.0) + WEIGHT_OFFSET
    normed = numbers * factor[:, None] * scale[None, :]
    if gate is not None:
        normed *= activate(tl.load(gate + at, mask=mask, other=0.0), FUNCTION)
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=mask)
    if rounded is not None:
        tl.store(rounded + at, normed.to(tl.bfloat16), mask=mask)


@triton.jit
def add_rms_norm(
    a,
    b,
    weight,
    n_rows,
    total,
    y,
    rounded,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
):
    """a, b f32[rows, WIDTH], weight f32[WIDTH] -> total = a + b, and its rms_norm y f32 and rounded bf16, one of which
    may be None. Grid: (rows)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    d = tl.arange(0, PADDED)
    at = row.to(tl.int64) * WIDTH + d
    numbers = tl.load(a + at, mask=d < WIDTH, other=0.0) + tl.load(b + at, mask=d < WIDTH, other=0.0)
    tl.store(total + at, numbers, mask=d < WIDTH)
    factor = 1.0 / tl.sqrt_rn(tl.sum(numbers * numbers, axis=0) / WIDTH + EPS)
    scale = tl.load(weight + d, mask=d < WIDTH, other=0.0) + WEIGHT_OFFSET
    normed = numbers * factor * scale
    if y is not None:
        tl.store(y + at, normed, mask=d < WIDTH)
    if rounded is not None:
        tl.store(rounded + at, normed.to(tl.bfloat16), mask=d < WIDTH)


@triton.jit
def layer_norm(x, weight, bias, n_rows, y, WIDTH: tl.constexpr, EPS: tl.constexpr, PADDED: tl.constexpr):
    """x f32[rows, WIDTH], weight and bias f32[WIDTH] -> y f32[rows, WIDTH]. Grid: (rows)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    d = tl.arange(0, PADDED)
    mask = d < WIDTH
    at = row.to(tl.int64) * WIDTH + d
    numbers = tl.load(x + at, mask=mask, other=0.0)
    apart = tl.where(mask, numbers - tl.sum(numbers, axis=0) / WIDTH, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(apart * apart, axis=0) / WIDTH + EPS)
    scale = tl.load(weight + d, mask=mask, other=0.0)
    tl.store(y + at, apart * factor * scale + tl.load(bias + d, mask=mask, other=0.0), mask=mask)


@triton.jit
def rope_table(positions, inv_freq, n_rows, cos, sin, HALF: tl.constexpr, SCALING: tl.constexpr, PADDED: tl.constexpr):
    """positions i32[rows], inv_freq f32[HALF] -> cos, sin f32[rows, HALF]. Grid: (rows)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    i = tl.arange(0, PADDED)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + i, mask=i < HALF, other=0.0)
    tl.store(cos + row * HALF + i, tl.cos(angle) * SCALING, mask=i < HALF)
    tl.store(sin + row * HALF + i, tl.sin(angle) * SCALING, mask=i < HALF)


@triton.jit
def rotary_pairs(d, HALF: tl.constexpr, OFFSET: tl.constexpr, STYLE: tl.constexpr):
    """Of a head's elements ``d``: whether they are rotated, by which pair's angle, whether they are the second of their
    pair, and where the pair's first and second element are read."""
    i = d - OFFSET
    turned = (i >= 0) & (i < 2 * HALF)
    if STYLE == "interleaved":
        pair, second = i // 2, i % 2 == 1
    else:
        pair, second = i % HALF, i >= HALF
    if STYLE == "half":
        a, b = OFFSET + pair, OFFSET + HALF + pair
    else:
        a, b = OFFSET + 2 * pair, OFFSET + 2 * pair + 1
    return turned, pair, second, a, b


@triton.jit
def rope(
    x,
    cos,
    sin,
    n_rows,
    y,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    STYLE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """x f32[rows, HEADS, DIM], cos, sin f32[rows, HALF] -> y of x's shape, f32 or bf16. Every element reads its mate,
    so that x and y must not overlap. Grid: (rows, blocks of HEAD_TILE heads)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    h = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    d = tl.arange(0, PADDED)
    turned, pair, second, a, b = rotary_pairs(d, HALF, OFFSET, STYLE)
    heads = (row.to(tl.int64) * HEADS + h)[:, None] * DIM
    inside = (h < HEADS)[:, None]
    mask = inside & turned[None, :]
    first = tl.load(x + heads + a[None, :], mask=mask, other=0.0)
    mate = tl.load(x + heads + b[None, :], mask=mask, other=0.0)
    c = tl.load(cos + row * HALF + pair, mask=turned, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + pair, mask=turned, other=0.0)[None, :]
    rotated = tl.where(second[None, :], mate * c + first * s, first * c - mate * s)
    kept = tl.load(x + heads + d[None, :], mask=inside & (~turned & (d < DIM))[None, :], other=0.0)
    numbers = tl.where(turned[None, :], rotated, kept).to(y.dtype.element_ty)
    tl.store(y + heads + d[None, :], numbers, mask=inside & (d < DIM)[None, :])


@triton.jit
def embed(
    ids,
    table,
    n_rows,
    y,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    FORMAT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """ids i32[rows], table in panels -> y f32[rows, WIDTH]: one column of a panel a row. Grid: (rows, blocks of STEPS
    words)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    PER: tl.constexpr = elements_of_word(FORMAT)
    token = tl.load(ids + row) + tl.zeros((1,), tl.int32)
    # A table may have more than 2^31 bytes: its panel is found in 64 bits.
    panel, r = (token // 16).to(tl.int64), token % 16
    steps = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    o = tl.arange(0, PER)
    valid = (steps * PER < WIDTH)[:, None]
    words = load_words(table, panel, r, steps, valid, WIDTH, FORMAT, True)
    numbers = element(words, o[None, :], FORMAT)
    if has_scales(FORMAT):
        scales, minima = load_scales(table, panel, r, steps, valid, WIDTH, FORMAT, True)
        numbers *= scales
        if has_minima(FORMAT):
            numbers -= minima
    k = steps[:, None] * PER + o[None, :]
    tl.store(y + row.to(tl.int64) * WIDTH + k, numbers * SCALE, mask=k < WIDTH)


@triton.jit
def select_rows(x, rows, n_rows, y, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """x f32[T, WIDTH], rows i32[R] -> y f32[R, WIDTH]. Grid: (R, column blocks)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(rows + row).to(tl.int64)
    tl.store(y + row.to(tl.int64) * WIDTH + n, tl.load(x + source * WIDTH + n, mask=n < WIDTH), mask=n < WIDTH)
