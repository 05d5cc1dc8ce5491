"""Routed experts for a few tokens: one GEMV a chosen expert, every weight of it read once.

An expert's weights may lie elsewhere: ``resident`` i32[experts] then says where an expert's matrices lie among those
that are here, -1 if they do not; such experts add nothing. Without it all experts are here.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import glu
from hetcomp.codegen_templates.gpu.gemv import ordered_columns, panel_products
from hetcomp.codegen_templates.gpu.low_rank import expand_panel
from hetcomp.codegen_templates.gpu.weights import (
    element,
    elements_of_word,
    has_minima,
    has_scales,
    load_scales,
    load_words,
    matrix_words,
    padded_steps,
)


@triton.jit
def expert_of(ids, resident, entry):
    """Which matrices the entry's expert has, -1: none here."""
    expert = tl.load(ids + entry)
    if resident is not None:
        expert = tl.load(resident + expert)
    return expert


@triton.jit
def experts_gate_up_gemv(
    x,
    norm,
    ids,
    resident,
    w,
    bias,
    h,
    low_rank,
    of_row,
    pairs,
    table,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    RANK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x f32[T, HIDDEN], norm as in panel_products, ids i32[T, TOP_K], w matrices of MATRIX words in layout
    panels16_glu, bias f32[experts, 2 * INTERMEDIATE] or None -> h f32[T, TOP_K, INTERMEDIATE]. low_rank: None, or the h
    f32[T, TOP_K, RANK] of pairs that are added (low_rank.py), one for each of all experts. ACT_ORDER: behind each
    matrix lies an order of its columns. Grid: (pairs of panels, TOP_K, T)."""
    pair, entry = tl.program_id(0), tl.program_id(2) * TOP_K + tl.program_id(1)
    expert = expert_of(ids, resident, entry)
    if expert < 0:
        return
    c = tl.arange(0, 32)
    matrix = w + expert.to(tl.int64) * MATRIX
    order = None
    if ACT_ORDER:
        order = matrix + 2 * matrix_words(INTERMEDIATE, HIDDEN, FORMAT)
    totals = panel_products(
        x + tl.program_id(2) * HIDDEN,
        norm,
        matrix,
        order,
        pair * 2 + c // 16,
        c % 16,
        0,
        HIDDEN,
        HIDDEN,
        EPS,
        WEIGHT_OFFSET,
        FORMAT,
        1,
        1,
        STEPS,
    )
    gate, up = tl.split(tl.permute(tl.reshape(totals[0], (2, 16)), (1, 0)))
    n = pair * 16 + tl.arange(0, 16)
    if bias is not None:
        gate += tl.load(bias + expert * (2 * INTERMEDIATE) + n, mask=n < INTERMEDIATE, other=0.0)
        up += tl.load(bias + expert * (2 * INTERMEDIATE) + INTERMEDIATE + n, mask=n < INTERMEDIATE, other=0.0)
    if low_rank is not None:
        token, of_all, its_h = tl.program_id(2), tl.load(ids + entry), low_rank + entry * RANK
        PANELS: tl.constexpr = (INTERMEDIATE + 15) // 16 * 2
        gate += expand_panel(its_h, of_row, table, pairs, token, pair >= 0, of_all, 2 * pair, PANELS, RANK)
        up += expand_panel(its_h, of_row, table, pairs, token, pair >= 0, of_all, 2 * pair + 1, PANELS, RANK)
    tl.store(h + entry * INTERMEDIATE + n, glu(gate, up, FUNCTION, ALPHA, LIMIT), mask=n < INTERMEDIATE)


@triton.jit
def _load_turn(
    w,
    ids,
    weights,
    resident,
    token,
    panels,
    rows,
    first,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Words of the steps from ``first`` on, where a token's chosen experts' panels lie behind each other; what their
    products must be multiplied by and what is subtracted from each weight then; and whether there is such a step, or
    (ACT_ORDER) of which matrices, -1: there is none."""
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    s = first + tl.arange(0, STEPS)
    entry, steps = token * TOP_K + s // ALL, s % ALL
    inside = s < TOP_K * ALL
    expert = tl.load(ids + entry, mask=inside, other=-1)
    if resident is not None:
        expert = tl.load(resident + expert, mask=inside, other=-1)
    here = expert >= 0
    which = here
    if ACT_ORDER:
        which = expert
    factor = tl.load(weights + entry, mask=here, other=0.0)[:, None]
    valid = here[:, None] & (rows >= 0)[None, :]
    matrices = w + (expert.to(tl.int64) * MATRIX)[:, None]
    words = load_words(matrices, panels, rows, steps, valid, K, FORMAT, True)
    if has_scales(FORMAT):
        scales, minima = load_scales(matrices, panels, rows, steps, valid, K, FORMAT, True)
        return words, scales * factor, minima * factor if has_minima(FORMAT) else 0.0, which
    else:
        return words, factor + tl.zeros((STEPS, rows.shape[0]), tl.float32), 0.0, which


@triton.jit
def _multiply_turn(
    h,
    w,
    words,
    factors,
    minima,
    which,
    sums,
    token,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    STEPS: tl.constexpr,
):
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    PER: tl.constexpr = elements_of_word(FORMAT)
    s = first + tl.arange(0, STEPS)
    k = s % ALL * PER
    its = h + (token * TOP_K + s // ALL) * K
    parts = tl.zeros((STEPS, words.shape[1]), tl.float32)
    columns = tl.zeros((STEPS,), tl.float32)
    here = which
    if ACT_ORDER:
        here = which >= 0
        order = w + which.to(tl.int64) * MATRIX + matrix_words(N, K, FORMAT)
    for o in tl.static_range(PER):
        if ACT_ORDER:
            at = ordered_columns(order, k + o, here & (k + o < K), K)
            column = tl.load(its + at, mask=at < K, other=0.0)
        else:
            column = tl.load(its + k + o, mask=here & (k + o < K), other=0.0)
        parts += element(words, o, FORMAT) * column[:, None]
        columns += column
    if has_minima(FORMAT):
        return sums + parts * factors - minima * columns[:, None]
    else:
        return sums + parts * factors


@triton.jit
def experts_down_gemv(
    h,
    ids,
    weights,
    resident,
    w,
    bias,
    added,
    added_1,
    y,
    low_rank,
    of_row,
    pairs,
    table,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    RANK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """h f32[T, TOP_K, INTERMEDIATE], ids i32 and weights f32[T, TOP_K], w matrices of MATRIX words, bias f32[experts,
    HIDDEN] or None -> y f32[T, HIDDEN]; then added and added_1, None or f32 of y's shape. low_rank: as above. Grid:
    (panels, T).

    A token's experts are one long product: a few panels fill no GPU unless all of a panel's experts are read at once.
    STEPS: as in gemv.panel_products, of all experts.
    """
    panel, token = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, 16)
    n = panel * 16 + r
    panels = panel + r * 0
    TOTAL: tl.constexpr = TOP_K * padded_steps(INTERMEDIATE, FORMAT)
    LAST: tl.constexpr = (TOTAL - 1) // STEPS * STEPS
    sums = tl.zeros((STEPS, 16), tl.float32)
    words, factors, minima, which = _load_turn(
        w, ids, weights, resident, token, panels, r, 0, INTERMEDIATE, TOP_K, MATRIX, FORMAT, ACT_ORDER, STEPS
    )
    for first in tl.range(0, LAST, STEPS, num_stages=1):
        next_words, next_factors, next_minima, next_which = _load_turn(
            w, ids, weights, resident, token, panels, r, first + STEPS,
            INTERMEDIATE, TOP_K, MATRIX, FORMAT, ACT_ORDER, STEPS,
        )  # fmt: skip
        sums = _multiply_turn(
            h, w, words, factors, minima, which, sums, token, first,
            HIDDEN, INTERMEDIATE, TOP_K, MATRIX, FORMAT, ACT_ORDER, STEPS,
        )  # fmt: skip
        words, factors, minima, which = next_words, next_factors, next_minima, next_which
    sums = _multiply_turn(
        h, w, words, factors, minima, which, sums, token, LAST,
        HIDDEN, INTERMEDIATE, TOP_K, MATRIX, FORMAT, ACT_ORDER, STEPS,
    )  # fmt: skip
    total = tl.sum(sums, axis=0)
    at = token * HIDDEN + n
    if bias is not None:
        for choice in tl.static_range(TOP_K):
            expert = expert_of(ids, resident, token * TOP_K + choice)
            if expert >= 0:
                row = tl.load(bias + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0)
                total += tl.load(weights + token * TOP_K + choice) * row
    if low_rank is not None:
        for choice in tl.static_range(TOP_K):
            entry = token * TOP_K + choice
            its_h, of_all = low_rank + entry * RANK, tl.load(ids + entry)
            adds = expert_of(ids, resident, entry) >= 0
            more = expand_panel(its_h, of_row, table, pairs, token, adds, of_all, panel, (HIDDEN + 15) // 16, RANK)
            total += tl.load(weights + entry) * more
    if added is not None:
        total += tl.load(added + at, mask=n < HIDDEN, other=0.0)
    if added_1 is not None:
        total += tl.load(added_1 + at, mask=n < HIDDEN, other=0.0)
    tl.store(y + at, total, mask=n < HIDDEN)
