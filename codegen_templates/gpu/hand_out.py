"""Copies what the CPU needs of a step into memory that it reads."""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.rowwise import beyond


@triton.jit
def hand_out(
    x,
    ids,
    weights,
    n_rows,
    wanted,
    x_out,
    ids_out,
    weights_out,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x f32[rows, WIDTH] and, where given, ids i32[rows, TOP_K] and weights f32[rows, TOP_K] to their places. x stays
    where ``wanted`` is given and zero. Grid: (rows, column blocks of x)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    width = WIDTH
    if wanted is not None:
        width = tl.where(tl.load(wanted) != 0, WIDTH, 0)
    tl.store(x_out + at, tl.load(x + at, mask=n < width), mask=n < width)
    if ids is not None:
        if tl.program_id(1) == 0:
            k = tl.arange(0, TOP_K_PADDED)
            choice = row.to(tl.int64) * TOP_K + k
            tl.store(ids_out + choice, tl.load(ids + choice, mask=k < TOP_K), mask=k < TOP_K)
            tl.store(weights_out + choice, tl.load(weights + choice, mask=k < TOP_K), mask=k < TOP_K)


@triton.jit
def add_parts(a, b, there, part, n_rows, total, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """total = a + b (where given) + there (where part is not zero), f32[rows, WIDTH]. Grid: (rows, column blocks)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    sums = tl.load(a + at, mask=n < WIDTH)
    if b is not None:
        sums += tl.load(b + at, mask=n < WIDTH)
    width = tl.where(tl.load(part) != 0, WIDTH, 0)
    sums += tl.load(there + at, mask=n < width, other=0.0)
    tl.store(total + at, sums, mask=n < WIDTH)
