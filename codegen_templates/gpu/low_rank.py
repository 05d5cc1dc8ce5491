"""What LoRA adapters add to products: h = scale a x of each row whose adapter changes the weight, then b h.

``of_row`` i32[rows]: the slot of a row's adapter, -1: none. ``table`` i64[slots, 4], of one weight: where a and b of a
slot's pair begin among ``pairs``, in elements, its rank (0: the adapter leaves the weight alone), and the bits of its
scale. a: [matrices][rank][K, padded to 16], b: [matrices][panels][rank][16], as hetcomp/adapters/packed_pairs.py writes
them. RANK: a power of two that no rank exceeds; of h only as many numbers are written and read as the pair has ranks.
All sums are f32.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.gemm import row_tile

_WORDS: tl.constexpr = tl.constexpr(4)  # of a pair in the table
_RANKS: tl.constexpr = tl.constexpr(16)  # of h and b that a tile of rows multiplies at a time: more have no registers


@triton.jit
def _rank(table, slot, here):
    """Of the pair in a slot; 0 where not ``here``."""
    return tl.load(table + slot * _WORDS + 2, mask=here, other=0).to(tl.int32)


@triton.jit
def _scale(table, slot):
    return tl.load(table + slot * _WORDS + 3).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def expand_panel(h, of_row, table, pairs, row, here, matrix, panel, PANELS, RANK: tl.constexpr):
    """b h of a row for one panel of a matrix: f32[16]; 0 where not ``here``. h: where that of the product begins."""
    slot = tl.load(of_row + row)
    here = here & (slot >= 0)
    rank = _rank(table, slot, here)
    b = tl.load(table + slot * _WORDS + 1, mask=here, other=0)
    r, n = tl.arange(0, RANK), tl.arange(0, 16)
    valid = r < rank
    at = b + (matrix.to(tl.int64) * PANELS + panel) * (rank * 16) + (r * 16)[:, None] + n[None, :]
    numbers = tl.load(pairs + at, mask=valid[:, None], other=0.0).to(tl.float32)
    return tl.sum(numbers * tl.load(h + r, mask=valid, other=0.0)[:, None], axis=0)


@triton.jit
def shrink_gemv(
    x,
    norm,
    of_row,
    ids,
    resident,
    pairs,
    table,
    table_1,
    table_2,
    table_3,
    h,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    X_HEADS: tl.constexpr,
    X_GAP: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x f32[rows, X_HEADS, K] (behind each head X_GAP elements that are not read) -> h f32[weights, rows, HEADS, RANK].
    Grid: (RANK * weights, HEADS, rows).

    A head has a matrix of its own, and a row of x unless X_HEADS is 1. ids: None, or i32[rows, HEADS]: which matrix (a
    chosen expert); those for which ``resident``, if it is given, has -1 are left out. norm: None, or f32[K], the weight
    of an rms_norm of x that is done on the way. table_1 to table_3: None, or of further weights.
    """
    r, weight = tl.program_id(0) % RANK, tl.program_id(0) // RANK
    head, row = tl.program_id(1), tl.program_id(2)
    its_table = table
    if table_1 is not None:
        if weight == 1:
            its_table = table_1
    if table_2 is not None:
        if weight == 2:
            its_table = table_2
    if table_3 is not None:
        if weight == 3:
            its_table = table_3
    slot = tl.load(of_row + row)
    rank = _rank(its_table, slot, slot >= 0)
    if r >= rank:
        return
    matrix = head
    if ids is not None:
        matrix = tl.load(ids + row * HEADS + head)
        if resident is not None:
            if tl.load(resident + matrix) < 0:
                return
    PADDED: tl.constexpr = (K + 15) // 16 * 16
    a = pairs + tl.load(its_table + slot * _WORDS) + (matrix.to(tl.int64) * rank + r) * PADDED
    its_x = x + (row * X_HEADS + head % X_HEADS) * (K + X_GAP)
    sums = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.static_range(0, K, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        numbers = tl.load(its_x + k, mask=k < K, other=0.0)
        factors = tl.load(a + k, mask=k < K, other=0.0).to(tl.float32)
        if norm is not None:
            squares += numbers * numbers
            factors *= tl.load(norm + k, mask=k < K, other=0.0) + WEIGHT_OFFSET
        sums += numbers * factors
    total = tl.sum(sums, axis=0) * _scale(its_table, slot)
    if norm is not None:
        total *= 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / K + EPS)
    tl.store(h + ((weight * tl.num_programs(2) + row) * HEADS + head) * RANK + r, total)


@triton.jit
def shrink_tile(
    x,
    offsets,
    mine,
    pairs,
    table,
    matrix,
    K: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    K_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [M, RANK] of the rows of x, f32 or bf16, that begin at ``offsets`` and have the slots ``mine`` (-1: nothing);
    of one matrix. Products are those of bf16 numbers, of f32 ones where the pairs are f32."""
    PADDED: tl.constexpr = (K + 15) // 16 * 16
    r = tl.arange(0, RANK)
    sums = tl.zeros((mine.shape[0], RANK), tl.float32)
    for slot in tl.range(0, SLOTS, num_stages=1):
        rank = _rank(table, slot, tl.max((mine == slot).to(tl.int32), axis=0) != 0)
        if rank > 0:
            a = pairs + tl.load(table + slot * _WORDS) + matrix.to(tl.int64) * (rank * PADDED)
            part = tl.zeros((mine.shape[0], RANK), tl.float32)
            for first in tl.range(0, K, K_TILE, num_stages=STAGES):
                k = first + tl.arange(0, K_TILE)
                rows = row_tile(x, offsets, mine == slot, k, K, True)
                valid = (k < K)[:, None] & (r < rank)[None, :]
                columns = tl.load(a + k[:, None] + (r * PADDED)[None, :], mask=valid, other=0.0)
                if pairs.dtype.element_ty == tl.float32:
                    part = tl.dot(rows.to(tl.float32), columns, part, input_precision="tf32x3")
                else:
                    part = tl.dot(rows.to(tl.bfloat16), columns, part)
            sums += part * _scale(table, slot)
    return sums


@triton.jit
def expand_tile(
    h,
    sums,
    mine,
    pairs,
    table,
    matrix,
    n,
    first_panel,
    STRIDE: tl.constexpr,
    PANELS: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """sums [M, columns] + b h for rows of h that begin at ``h`` (pointers [M]) and have the slots ``mine``. n: the
    columns, below N; a panel of 16 of them is ``STRIDE`` panels behind the one before, from ``first_panel`` on, of a
    matrix of PANELS."""
    panels = first_panel + n // 16 * STRIDE
    for slot in tl.range(0, SLOTS, num_stages=1):
        rank = _rank(table, slot, tl.max((mine == slot).to(tl.int32), axis=0) != 0)
        if rank > 0:
            b = pairs + tl.load(table + slot * _WORDS + 1) + matrix.to(tl.int64) * (PANELS * 16 * rank)
            for first in tl.range(0, rank, _RANKS, num_stages=1):
                r = first + tl.arange(0, _RANKS)
                at = panels[None, :] * (rank * 16) + (r * 16)[:, None] + (n % 16)[None, :]
                valid = (r < rank)[:, None] & (n < N)[None, :]
                columns = tl.load(b + at, mask=valid, other=0.0).to(tl.float32)
                mask = (mine == slot)[:, None] & (r < rank)[None, :]
                rows = tl.load(h[:, None] + r[None, :], mask=mask, other=0.0)
                sums = tl.dot(rows, columns, sums, input_precision="tf32x3")
    return sums


@triton.jit
def shrink_gemm(
    x,
    of_row,
    pairs,
    table,
    h,
    n_rows,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    M_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x f32 or bf16[rows, HEADS, K] -> h f32[rows, HEADS, RANK] for n_rows[0] rows. Grid: (row tiles, HEADS)."""
    rows, head = tl.load(n_rows), tl.program_id(1)
    if tl.program_id(0) * M_TILE >= rows:
        return
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    mine = tl.load(of_row + m, mask=m < rows, other=-1)
    offsets = m.to(tl.int64) * (HEADS * K) + head * K
    sums = shrink_tile(x, offsets, mine, pairs, table, head, K, RANK, SLOTS, K_TILE, STAGES)
    at = (m * HEADS + head)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(h + at, sums, mask=(mine >= 0)[:, None])


@triton.jit
def expand_gemm(
    h,
    of_row,
    pairs,
    table,
    y,
    n_rows,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
):
    """y f32[rows, HEADS, N] += b h, of the h of shrink_gemm. Grid: (row tiles, column tiles, HEADS)."""
    rows, head = tl.load(n_rows), tl.program_id(2)
    if tl.program_id(0) * M_TILE >= rows:
        return
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    mine = tl.load(of_row + m, mask=m < rows, other=-1)
    if tl.max(mine, axis=0) < 0:
        return
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    its_h = h + (m * HEADS + head) * RANK
    at = (m.to(tl.int64) * HEADS + head)[:, None] * N + n[None, :]
    mask = (mine >= 0)[:, None] & (n < N)[None, :]
    sums = tl.load(y + at, mask=mask, other=0.0)
    sums = expand_tile(its_h, sums, mine, pairs, table, head, n, 0, 1, (N + 15) // 16, N, SLOTS)
    tl.store(y + at, sums, mask=mask)
