"""Routed experts for many tokens: entries (token, choice) sorted by expert, then GEMMs over the runs of an expert.

Row tiles never span two experts. Every entry's result has a place of its own and a token's are added up in the order of
its choices, so that sums do not depend on which program comes first. ``resident``: see experts_decode.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import glu
from hetcomp.codegen_templates.gpu.gemm import in_order, multiply_add, row_tile, weight_tile
from hetcomp.codegen_templates.gpu.low_rank import expand_tile, shrink_tile
from hetcomp.codegen_templates.gpu.weights import elements_of_word, padded_steps


@triton.jit
def _experts_of(ids, resident, entries, count):
    mask = entries < count
    experts = tl.load(ids + entries, mask=mask, other=-1)
    if resident is not None:
        experts = tl.load(resident + experts, mask=mask, other=-1)
    return experts


@triton.jit
def experts_sort(
    ids, resident, n_rows, starts, order, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ENTRIES: tl.constexpr
):
    """ids i32[rows, TOP_K] -> order i32[rows * TOP_K]: the entries by expert, then by number; starts i32[EXPERTS + 1]:
    where an expert's run begins. Grid: (EXPERTS), a program an expert; ENTRIES: entries of a turn."""
    expert = tl.program_id(0)
    count = tl.load(n_rows) * TOP_K
    lower = tl.zeros((ENTRIES,), tl.int32)
    for first in tl.range(0, count, ENTRIES):
        experts = _experts_of(ids, resident, first + tl.arange(0, ENTRIES), count)
        lower += ((experts >= 0) & (experts < expert)).to(tl.int32)
    start = tl.sum(lower, axis=0)
    place = start
    for first in tl.range(0, count, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        mine = (_experts_of(ids, resident, entries, count) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, axis=0) - 1, entries, mask=mine != 0)
        place += tl.sum(mine, axis=0)
    tl.store(starts + expert, start)
    if expert == EXPERTS - 1:
        tl.store(starts + EXPERTS, place)


@triton.jit
def _run_of_tile(starts, tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, M_TILE: tl.constexpr):
    """Expert of row tile ``tile`` and where in the order the tile begins and its expert's run ends; begin = end = 0 if
    there are not so many tiles."""
    e = tl.arange(0, EXPERTS_PADDED)
    begins = tl.load(starts + e, mask=e < EXPERTS, other=0)
    ends = tl.load(starts + e + 1, mask=e < EXPERTS, other=0)
    tiles = (ends - begins + M_TILE - 1) // M_TILE
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile).to(tl.int32), axis=0)
    mine = e == expert
    begin = tl.sum(tl.where(mine, begins + (tile - (behind - tiles)) * M_TILE, 0), axis=0)
    return expert, begin, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def experts_in_order(
    x,
    starts,
    order,
    ids,
    resident,
    w,
    y,
    K: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x bf16[rows, K] of the entries in their order or, BY_TOKEN, of the tokens -> y bf16[entries in order, K]: each
    with its columns in the order that lies ORDER words behind the start of its expert's matrix. Grid: (entries, column
    blocks)."""
    place = tl.program_id(0)
    if place >= tl.load(starts + EXPERTS):
        return
    entry = tl.load(order + place)
    expert = tl.load(ids + entry)
    if resident is not None:
        expert = tl.load(resident + expert)
    row = place
    if BY_TOKEN:
        row = entry // TOP_K
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = tl.load(w + expert.to(tl.int64) * MATRIX + ORDER + n, mask=n < K, other=0)
    numbers = tl.load(x + row.to(tl.int64) * K + columns, mask=n < K)
    tl.store(y + place.to(tl.int64) * K + n, numbers, mask=n < K)


@triton.jit
def experts_gate_up_gemm(
    x,
    starts,
    order,
    w,
    bias,
    h,
    low_rank,
    of_row,
    ids,
    pairs,
    table,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    BY_ENTRY: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x bf16 or f32[rows, HIDDEN] (BY_ENTRY: [entries in order, HIDDEN]), the order of experts_sort, w in layout
    panels16_glu, bias f32[EXPERTS, 2 * INTERMEDIATE] or None -> h[entries in order, INTERMEDIATE], bf16 (what the down
    product rounds it to; f32 beside f32 weights). Panels of gate and up take turns: a tile of 2 * N_TILE columns has
    both. low_rank: None, or the h of experts_shrink, of pairs that are added. Grid: (row tiles, column tiles)."""
    expert, begin, end = _run_of_tile(starts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, M_TILE)
    if begin >= end:
        return
    place = begin + tl.arange(0, M_TILE)
    valid = place < end
    token = tl.load(order + place, mask=valid, other=0) // TOP_K
    PER: tl.constexpr = elements_of_word(FORMAT)
    ALL: tl.constexpr = padded_steps(HIDDEN, FORMAT)
    PANELS: tl.constexpr = (INTERMEDIATE + 15) // 16 * 2
    MASKED: tl.constexpr = ALL % STEPS != 0 or ALL * PER != HIDDEN
    matrix = w + expert.to(tl.int64) * MATRIX
    if BY_ENTRY:
        offsets = place.to(tl.int64) * HIDDEN
    else:
        offsets = token.to(tl.int64) * HIDDEN
    panel = tl.program_id(1) * (N_TILE // 8)
    sums = tl.zeros((M_TILE, 2 * N_TILE), tl.float32)
    for first in tl.range(0, ALL, STEPS, num_stages=STAGES):
        k = first * PER + tl.arange(0, STEPS * PER)
        a = row_tile(x, offsets, valid, k, HIDDEN, MASKED)
        b = weight_tile(matrix, panel, first, 2 * N_TILE, STEPS, PANELS, HIDDEN, FORMAT)
        sums = multiply_add(a, b, sums, FORMAT)
    both = tl.permute(tl.reshape(in_order(sums), (M_TILE, N_TILE // 16, 2, 16)), (0, 1, 3, 2))
    gates, ups = tl.split(tl.reshape(both, (M_TILE, N_TILE, 2)))
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    inside = n < INTERMEDIATE
    if bias is not None:
        row = bias + expert * (2 * INTERMEDIATE) + n
        gates += tl.load(row, mask=inside, other=0.0)[None, :]
        ups += tl.load(row + INTERMEDIATE, mask=inside, other=0.0)[None, :]
    if low_rank is not None:
        of_all = tl.load(ids + tl.load(order + begin))
        mine = tl.load(of_row + token, mask=valid, other=-1)
        its_h = low_rank + place * RANK
        gates = expand_tile(its_h, gates, mine, pairs, table, of_all, n, 0, 2, PANELS, INTERMEDIATE, SLOTS)
        ups = expand_tile(its_h, ups, mine, pairs, table, of_all, n, 1, 2, PANELS, INTERMEDIATE, SLOTS)
    hidden = glu(gates, ups, FUNCTION, ALPHA, LIMIT)
    at = place.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
    tl.store(h + at, hidden.to(h.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def experts_down_gemm(
    h,
    starts,
    order,
    weights,
    w,
    bias,
    out,
    low_rank,
    of_row,
    ids,
    pairs,
    table,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of experts_gate_up_gemm, weights f32[entries], bias f32[EXPERTS, HIDDEN] or None -> out[entries, HIDDEN], each
    entry's result times its weight, bf16 (f32 beside f32 weights). low_rank: as above. Grid: (row tiles, column tiles).
    """
    expert, begin, end = _run_of_tile(starts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, M_TILE)
    if begin >= end:
        return
    place = begin + tl.arange(0, M_TILE)
    valid = place < end
    entry = tl.load(order + place, mask=valid, other=0)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    PER: tl.constexpr = elements_of_word(FORMAT)
    ALL: tl.constexpr = padded_steps(INTERMEDIATE, FORMAT)
    MASKED: tl.constexpr = ALL % STEPS != 0 or ALL * PER != INTERMEDIATE
    PANELS: tl.constexpr = (HIDDEN + 15) // 16
    matrix = w + expert.to(tl.int64) * MATRIX
    offsets = place.to(tl.int64) * INTERMEDIATE
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for first in tl.range(0, ALL, STEPS, num_stages=STAGES):
        k = first * PER + tl.arange(0, STEPS * PER)
        a = row_tile(h, offsets, valid, k, INTERMEDIATE, MASKED)
        b = weight_tile(matrix, tl.program_id(1) * (N_TILE // 16), first, N_TILE, STEPS, PANELS, INTERMEDIATE, FORMAT)
        sums = multiply_add(a, b, sums, FORMAT)
    sums = in_order(sums)
    if bias is not None:
        sums += tl.load(bias + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0)[None, :]
    if low_rank is not None:
        of_all = tl.load(ids + tl.load(order + begin))
        mine = tl.load(of_row + entry // TOP_K, mask=valid, other=-1)
        its_h = low_rank + place * RANK
        sums = expand_tile(its_h, sums, mine, pairs, table, of_all, n, 0, 1, PANELS, HIDDEN, SLOTS)
    sums *= tl.load(weights + entry, mask=valid, other=0.0)[:, None]
    at = entry.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=valid[:, None] & (n < HIDDEN)[None, :])


@triton.jit
def experts_shrink(
    x,
    starts,
    order,
    ids,
    of_row,
    pairs,
    table,
    h,
    K: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    M_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[rows, K], f32 or bf16, of the entries in their order or, BY_TOKEN, of the tokens, ids i32[rows, TOP_K] -> h f32
    [entries in order, RANK] of the pairs of all experts (low_rank.py). Grid: (row tiles)."""
    _, begin, end = _run_of_tile(starts, tl.program_id(0), EXPERTS, EXPERTS_PADDED, M_TILE)
    if begin >= end:
        return
    place = begin + tl.arange(0, M_TILE)
    valid = place < end
    token = tl.load(order + place, mask=valid, other=0) // TOP_K
    of_all = tl.load(ids + tl.load(order + begin))
    mine = tl.load(of_row + token, mask=valid, other=-1)
    if BY_TOKEN:
        offsets = token.to(tl.int64) * K
    else:
        offsets = place.to(tl.int64) * K
    sums = shrink_tile(x, offsets, mine, pairs, table, of_all, K, RANK, SLOTS, K_TILE, STAGES)
    tl.store(h + place[:, None] * RANK + tl.arange(0, RANK)[None, :], sums, mask=(mine >= 0)[:, None])


@triton.jit
def experts_combine(out, ids, resident, n_rows, y, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """y[t] = sum over k of out[t * TOP_K + k], of the experts that are here. Grid: (rows, column blocks)."""
    token = tl.program_id(0)
    if token >= tl.load(n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        entry = token * TOP_K + choice
        width = HIDDEN
        if resident is not None:
            width = tl.where(tl.load(resident + tl.load(ids + entry)) >= 0, HIDDEN, 0)
        sums += tl.load(out + entry.to(tl.int64) * HIDDEN + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * HIDDEN + n, sums, mask=n < HIDDEN)
