"""Elementwise ops over f32 rows: a program takes COLUMNS elements of one row. Grid: (rows, column blocks)."""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu import functions
from hetcomp.codegen_templates.gpu.rowwise import beyond


@triton.jit
def glu(
    gate,
    up,
    n_rows,
    y,
    WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y f32 or bf16."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    a, b = tl.load(gate + at, mask=n < WIDTH, other=0.0), tl.load(up + at, mask=n < WIDTH, other=0.0)
    tl.store(y + at, functions.glu(a, b, FUNCTION, ALPHA, LIMIT).to(y.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def activation(x, n_rows, y, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    tl.store(y + at, functions.activate(tl.load(x + at, mask=n < WIDTH, other=0.0), FUNCTION), mask=n < WIDTH)


@triton.jit
def add(a, b, n_rows, y, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    total = tl.load(a + at, mask=n < WIDTH, other=0.0) + tl.load(b + at, mask=n < WIDTH, other=0.0)
    tl.store(y + at, total, mask=n < WIDTH)


@triton.jit
def mul(a, b, n_rows, y, WIDTH: tl.constexpr, B_WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """b f32[rows, B_WIDTH]; B_WIDTH is WIDTH or 1."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    factor = tl.load(b + row.to(tl.int64) * B_WIDTH + n % B_WIDTH, mask=n < WIDTH, other=0.0)
    tl.store(y + at, tl.load(a + at, mask=n < WIDTH, other=0.0) * factor, mask=n < WIDTH)


@triton.jit
def scale(x, n_rows, y, WIDTH: tl.constexpr, FACTOR: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    tl.store(y + at, tl.load(x + at, mask=n < WIDTH, other=0.0) * FACTOR, mask=n < WIDTH)


@triton.jit
def copy_columns(
    x,
    n_rows,
    y,
    RUNS: tl.constexpr,
    X_RUNS: tl.constexpr,
    X_WIDTH: tl.constexpr,
    Y_WIDTH: tl.constexpr,
    X_FIRST: tl.constexpr,
    Y_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[row, run, Y_FIRST + c] = x[row, run, X_FIRST + c] for c < WIDTH (slice, concat): x f32[rows, X_RUNS, X_WIDTH],
    y f32[rows, RUNS, Y_WIDTH]; X_RUNS is RUNS, or 1 and repeated. Grid: (rows, blocks of RUNS * WIDTH)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    run, c = n // WIDTH, n % WIDTH
    wide = row.to(tl.int64)
    source = (wide * X_RUNS + run % X_RUNS) * X_WIDTH + X_FIRST + c
    target = (wide * RUNS + run) * Y_WIDTH + Y_FIRST + c
    tl.store(y + target, tl.load(x + source, mask=n < RUNS * WIDTH), mask=n < RUNS * WIDTH)


@triton.jit
def round_rows(x, n_rows, y, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """y bf16[rows, WIDTH]."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * WIDTH + n
    tl.store(y + at, tl.load(x + at, mask=n < WIDTH).to(tl.bfloat16), mask=n < WIDTH)


@triton.jit
def rows_in_order(x, order, n_rows, y, WIDTH: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """x f32 or bf16[rows, WIDTH] -> y bf16[rows, WIDTH] with columns in the order i32[WIDTH] that lies WORDS words
    behind ``order``. Grid: (rows, column blocks)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = tl.load(order + WORDS + n, mask=n < WIDTH, other=0)
    at = row.to(tl.int64) * WIDTH
    tl.store(y + at + n, tl.load(x + at + columns, mask=n < WIDTH).to(tl.bfloat16), mask=n < WIDTH)
