"""Copies what the CPU needs of a step into memory that it reads."""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.flags import await_flag, raise_flag
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
def ask(
    x,
    ids,
    weights,
    x_out,
    ids_out,
    weights_out,
    asks,
    NUMBERS: tl.constexpr,
    CHOICES: tl.constexpr,
    CHOICES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x f32[NUMBERS], ids i32[CHOICES] and weights f32[CHOICES] of a step's rows to their places; then raises the flag
    ``asks``. One program."""
    k = tl.arange(0, CHOICES_PADDED)
    tl.store(ids_out + k, tl.load(ids + k, mask=k < CHOICES), mask=k < CHOICES)
    tl.store(weights_out + k, tl.load(weights + k, mask=k < CHOICES), mask=k < CHOICES)
    for first in range(0, NUMBERS, BLOCK):
        n = first + tl.arange(0, BLOCK)
        tl.store(x_out + n, tl.load(x + n, mask=n < NUMBERS), mask=n < NUMBERS)
    raise_flag(asks)


@triton.jit
def add_missing(
    here,
    there,
    ids,
    places,
    onto,
    answers,
    before,
    total,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """total = onto (where given) + here, and of rows with a choice that is not among ``places`` (i32 of each expert,
    -1: not) + there, when the flag ``answers`` is raised; f32[rows, WIDTH]. Grid: (rows, column blocks), and one more
    column block where the flag ``before`` is given, which it awaits."""
    row = tl.program_id(0).to(tl.int64)
    if before is not None:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            if row == 0:
                await_flag(before)
            return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row * WIDTH + n
    sums = tl.load(here + at, mask=n < WIDTH)
    k = tl.arange(0, TOP_K_PADDED)
    chosen = tl.load(ids + row * TOP_K + k, mask=k < TOP_K, other=0)
    missing = tl.min(tl.load(places + chosen, mask=k < TOP_K, other=0), 0) < 0
    if missing:
        await_flag(answers)
        sums += tl.load(there + at, mask=n < WIDTH)
    if onto is not None:
        sums += tl.load(onto + at, mask=n < WIDTH)
    tl.store(total + at, sums, mask=n < WIDTH)


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
