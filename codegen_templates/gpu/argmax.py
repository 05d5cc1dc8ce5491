"""The most likely token of each row of logits, for greedy decoding: f32 rows in, one i32 a row out.

``n_rows`` i32[1]: how many rows the step has; None where the grid has exactly as many.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.rowwise import beyond


@triton.jit
def store_block(x, n, at, largest, first, WIDTH: tl.constexpr):
    """Columns n of a row and their logits x (-inf beyond the row): the largest, NaN if any is, and the first column
    that has it, stored at ``at``."""
    nan = tl.max((x != x).to(tl.int32), axis=0)
    most = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    column = tl.min(tl.where((x == most) & (n < WIDTH), n, WIDTH), axis=0)
    tl.store(largest + at, tl.where(nan > 0, float("nan"), most))
    tl.store(first + at, column)
    return most


@triton.jit
def store_row(largest, first, row, best, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """What store_block has stored of a row's blocks -> best: the first column of the largest logit, -1 where a logit
    is NaN or the largest is not finite. Returns the largest of each block, the row's, and whether it is good."""
    b = tl.arange(0, PADDED)
    x = tl.load(largest + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
    column = tl.load(first + row * BLOCKS + b, mask=b < BLOCKS, other=2147483647)
    nan = tl.max((x != x).to(tl.int32), axis=0)
    most = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    found = tl.min(tl.where(x == most, column, 2147483647), axis=0)
    finite = (nan == 0) & (most < float("inf")) & (most > float("-inf"))
    tl.store(best + row, tl.where(finite, found, -1))
    return x, most, finite


@triton.jit
def argmax_blocks(logits, n_rows, largest, first, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """logits f32[rows, WIDTH] -> largest f32[rows, BLOCKS], first i32[rows, BLOCKS]: of COLUMNS columns each, the
    largest (NaN if any is) and the first column that has it. Grid: (rows, BLOCKS)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    block = tl.program_id(1)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits + row.to(tl.int64) * WIDTH + n, mask=n < WIDTH, other=float("-inf"))
    store_block(x, n, row * BLOCKS + block, largest, first, WIDTH)


@triton.jit
def argmax_rows(largest, first, n_rows, best, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """largest, first of argmax_blocks -> best i32[rows] as store_row. Grid: (rows)."""
    row = tl.program_id(0)
    if beyond(row, n_rows):
        return
    store_row(largest, first, row, best, BLOCKS, PADDED)
