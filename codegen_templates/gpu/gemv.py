"""Products of a few rows with packed weights: every weight is read once, products and sums are f32.

A program multiplies one or two panels. Its lanes share the panel's steps and add up in a fixed order, so that the
result depends on nothing but the operands.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import glu
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

_SQUARES: tl.constexpr = tl.constexpr(1024)  # elements of a row that a block squares at a time


@triton.jit
def _load_turn(w, panels, rows, first, K: tl.constexpr, FORMAT: tl.constexpr, STEPS: tl.constexpr):
    """Words, scales and minima (0 if the format has none) of the steps from ``first`` on; zeros beyond the last."""
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    MASKED: tl.constexpr = ALL % STEPS != 0
    steps = first + tl.arange(0, STEPS)
    valid = (steps < ALL)[:, None] & (rows >= 0)[None, :]
    words = load_words(w, panels, rows, steps, valid, K, FORMAT, MASKED)
    if has_scales(FORMAT):
        scales, minima = load_scales(w, panels, rows, steps, valid, K, FORMAT, MASKED)
        return words, scales, minima
    else:
        return words, 0.0, 0.0


@triton.jit
def _load_columns(x, k, K: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(x + k, mask=k < K, other=0.0)
    else:
        return tl.load(x + k)


@triton.jit
def ordered_columns(order, k, valid, K: tl.constexpr):
    """Columns of the activations that columns ``k`` of a weight meet, whose order lies at ``order``; K where k is not
    ``valid``."""
    return tl.load(order + k, mask=valid, other=K)


@triton.jit
def norm_factors(x, X_ROW: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr):
    """1 / sqrt(mean(x^2) + EPS) of ROWS rows of K elements, X_ROW apart: a tuple of f32."""
    factors = ()
    for m in tl.static_range(ROWS):
        squares = tl.zeros((_SQUARES,), tl.float32)
        for first in tl.static_range(0, K, _SQUARES):
            k = first + tl.arange(0, _SQUARES)
            numbers = tl.load(x + m * X_ROW + k, mask=k < K, other=0.0)
            squares += numbers * numbers
        factors = factors + (1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / K + EPS),)
    return factors


@triton.jit
def _multiply_turn(
    x,
    norm,
    words,
    scales,
    minima,
    order,
    sums,
    first,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """sums of each row plus the products of a turn's words; a word is taken apart once for all rows."""
    PER: tl.constexpr = elements_of_word(FORMAT)
    MASKED: tl.constexpr = K % (STEPS * PER) != 0
    k = (first + tl.arange(0, STEPS)) * PER
    if has_scales(FORMAT):
        parts = (tl.zeros((STEPS, words.shape[1]), tl.float32),) * ROWS
    else:
        parts = sums
    if has_minima(FORMAT):
        columns = (tl.zeros((STEPS,), tl.float32),) * ROWS
    for o in tl.static_range(PER):
        number = element(words, o, FORMAT)
        at = k + o
        if order is not None:
            at = ordered_columns(order, at, at < K, K)
        if norm is not None:
            weight = _load_columns(norm, at, K, MASKED) + WEIGHT_OFFSET
        added = ()
        added_columns = ()
        for m in tl.static_range(ROWS):
            column = _load_columns(x + m * X_ROW, at, K, MASKED)
            if norm is not None:
                column *= weight
            added = added + (parts[m] + number * column[:, None],)
            if has_minima(FORMAT):
                added_columns = added_columns + (columns[m] + column,)
        parts = added
        if has_minima(FORMAT):
            columns = added_columns
    if has_scales(FORMAT):
        added = ()
        for m in tl.static_range(ROWS):
            if has_minima(FORMAT):
                added = added + (sums[m] + parts[m] * scales - minima * columns[m][:, None],)
            else:
                added = added + (sums[m] + parts[m] * scales,)
        parts = added
    return parts


@triton.jit
def panel_products(
    x,
    norm,
    w,
    order,
    panels,
    rows,
    part,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y[m][c] = sum over k of x[m, k] * w[c, k] for ROWS rows of x: a tuple of f32 [columns].

    x: f32 rows X_ROW elements apart. norm: None, or f32[K], the weight of an rms_norm of x that is done on the way: its
    sum of squares is that of the row and its factor that of the whole product. w, panels, rows i32[columns]: see
    weights.load_words. order: None, or i32[K]: the column of x (and norm) that each column of w meets. STEPS: steps of
    a turn, fewer than a block's threads: then Triton loads a turn's activations where they are used, without shared
    memory. The weights of a turn are loaded while those of the turn before are multiplied. part: which of PARTS equal
    parts of k is summed; more than one have whole turns.
    """
    COUNT: tl.constexpr = padded_steps(K, FORMAT) // PARTS
    LAST: tl.constexpr = (COUNT - 1) // STEPS * STEPS
    begin = part * COUNT
    sums = (tl.zeros((STEPS, rows.shape[0]), tl.float32),) * ROWS
    words, scales, minima = _load_turn(w, panels, rows, begin, K, FORMAT, STEPS)
    # Before the loop, the weights are on their way meanwhile; but many rows' factors have no registers during it.
    if norm is not None and ROWS <= 4:
        factors = norm_factors(x, X_ROW, K, EPS, ROWS)
    for first in tl.range(0, LAST, STEPS, num_stages=1):
        next_words, next_scales, next_minima = _load_turn(w, panels, rows, begin + first + STEPS, K, FORMAT, STEPS)
        sums = _multiply_turn(
            x, norm, words, scales, minima, order, sums, begin + first, X_ROW, K, WEIGHT_OFFSET, FORMAT, ROWS, STEPS
        )
        words, scales, minima = next_words, next_scales, next_minima
    sums = _multiply_turn(
        x, norm, words, scales, minima, order, sums, begin + LAST, X_ROW, K, WEIGHT_OFFSET, FORMAT, ROWS, STEPS
    )
    if norm is not None and ROWS > 4:
        factors = norm_factors(x, X_ROW, K, EPS, ROWS)
    totals = ()
    for m in tl.static_range(ROWS):
        total = tl.sum(sums[m], axis=0)
        if norm is not None:
            total *= factors[m]
        totals = totals + (total,)
    return totals


@triton.jit
def linear_gemv(
    x,
    norm,
    w,
    bias,
    added,
    added_1,
    y,
    w_1,
    bias_1,
    y_1,
    w_2,
    bias_2,
    y_2,
    w_3,
    bias_3,
    y_3,
    normed,
    low_rank,
    of_row,
    pairs,
    table,
    table_1,
    table_2,
    table_3,
    K: tl.constexpr,
    N: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    N_3: tl.constexpr,
    HEADS: tl.constexpr,
    X_GAP: tl.constexpr,
    Y_GAP: tl.constexpr,
    MATRIX: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    NORMED: tl.constexpr,
    FORMAT: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """linear and head_linear for exactly ROWS rows: x f32[ROWS, HEADS, K], w HEADS matrices [N, K] of MATRIX words,
    bias f32[N] or None -> y f32[ROWS, HEADS, N]. Behind each head x has X_GAP elements that are not read, y Y_GAP that
    are not written. With more than one of PARTS, y is f32[PARTS, ROWS, N], the sums of parts of k, to be added up by
    who reads it; HEADS is 1 then. Grid: (panels of all matrices, HEADS, PARTS).

    norm: None or the weight of x's rms_norm (panel_products). w_1 to w_3: None, or further matrices [N_1, K] .. to
    multiply the same x with, with a bias if the first has one; HEADS is 1 then. added, added_1: None, or f32 of y's
    shape to be added to it. normed: None, or where the norm's result f32[ROWS, K] is wanted, NORMED columns a program.
    low_rank: None, or the h f32[matrices, ROWS, HEADS, RANK] of pairs that are added (low_rank.py), whose tables are
    those of the matrices. ACT_ORDER: columns of a matrix have an order of their own, which lies behind it; HEADS is 1.
    """
    panel, head, part = tl.program_id(0), tl.program_id(1), 0
    adds = panel >= 0
    if PARTS > 1:
        part = tl.program_id(2)
        adds = part == 0
    matrix, its_bias, its_y, width, its_table, its_h = w, bias, y, panel * 0 + N, table, low_rank
    if w_1 is not None:
        BEFORE_1: tl.constexpr = (N + 15) // 16
        if panel >= BEFORE_1:
            matrix, its_bias, its_y, width, panel = w_1, bias_1, y_1, panel * 0 + N_1, panel - BEFORE_1
            if low_rank is not None:
                its_table, its_h = table_1, low_rank + ROWS * HEADS * RANK
    if w_2 is not None:
        BEFORE_2: tl.constexpr = (N + 15) // 16 + (N_1 + 15) // 16
        if tl.program_id(0) >= BEFORE_2:
            matrix, its_bias, its_y, width = w_2, bias_2, y_2, panel * 0 + N_2
            panel = tl.program_id(0) - BEFORE_2
            if low_rank is not None:
                its_table, its_h = table_2, low_rank + 2 * ROWS * HEADS * RANK
    if w_3 is not None:
        BEFORE_3: tl.constexpr = (N + 15) // 16 + (N_1 + 15) // 16 + (N_2 + 15) // 16
        if tl.program_id(0) >= BEFORE_3:
            matrix, its_bias, its_y, width = w_3, bias_3, y_3, panel * 0 + N_3
            panel = tl.program_id(0) - BEFORE_3
            if low_rank is not None:
                its_table, its_h = table_3, low_rank + 3 * ROWS * HEADS * RANK
    r = tl.arange(0, 16)
    n = panel * 16 + r
    order = None
    if ACT_ORDER:
        order = matrix + matrix_words(width, K, FORMAT)
    totals = panel_products(
        x + head * (K + X_GAP), norm, matrix + head.to(tl.int64) * MATRIX, order, panel + r * 0, r, part,
        HEADS * (K + X_GAP), K, EPS, WEIGHT_OFFSET, FORMAT, PARTS, ROWS, STEPS,
    )  # fmt: skip
    for m in tl.static_range(ROWS):
        total = totals[m]
        at = ((part * ROWS + m) * HEADS + head) * (width + Y_GAP) + n
        if bias is not None:
            of_bias = width if PARTS == 1 else tl.where(part == 0, width, 0)
            total += tl.load(its_bias + n, mask=n < of_bias, other=0.0)
        if added is not None:
            total += tl.load(added + at, mask=n < width, other=0.0)
        if added_1 is not None:
            total += tl.load(added_1 + at, mask=n < width, other=0.0)
        if low_rank is not None:
            h = its_h + (m * HEADS + head) * RANK
            total += expand_panel(h, of_row, its_table, pairs, m, adds, head, panel, (width + 15) // 16, RANK)
        tl.store(its_y + at, total, mask=n < width)
    if normed is not None:
        k = tl.program_id(0) * NORMED + tl.arange(0, NORMED)
        weight = tl.load(norm + k, mask=k < K, other=0.0) + WEIGHT_OFFSET
        factors = norm_factors(x, K, K, EPS, ROWS)
        for m in tl.static_range(ROWS):
            numbers = tl.load(x + m * K + k, mask=k < K, other=0.0)
            tl.store(normed + m * K + k, numbers * factors[m] * weight, mask=k < K)


@triton.jit
def glu_gemv(
    x,
    norm,
    gate,
    up,
    gate_bias,
    up_bias,
    y,
    low_rank,
    of_row,
    pairs,
    table,
    table_1,
    K: tl.constexpr,
    N: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    FORMAT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Two linears of the same x and their glu for exactly ROWS rows: x f32[ROWS, K], norm as in panel_products, gate
    and up [N, K], biases f32[N] or None -> y f32[ROWS, N]. low_rank: as in linear_gemv, of gate and up. Grid: (panels).
    """
    c = tl.arange(0, 32)
    # Pointers are multiples of 16 bytes; only with that said are words loaded in whole vectors.
    WORD: tl.constexpr = gate.dtype.element_ty.primitive_bitwidth // 8
    apart = tl.multiple_of((up.to(tl.int64) - gate.to(tl.int64)) // WORD, 16 // WORD)
    matrices = (gate + (c // 16) * apart)[None, :]
    totals = panel_products(
        x, norm, matrices, None, tl.program_id(0) + c * 0, c % 16, 0, K, K, EPS, WEIGHT_OFFSET, FORMAT, 1, ROWS, STEPS
    )
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    for m in tl.static_range(ROWS):
        a, b = tl.split(tl.permute(tl.reshape(totals[m], (2, 16)), (1, 0)))
        if gate_bias is not None:
            a += tl.load(gate_bias + n, mask=n < N, other=0.0)
            b += tl.load(up_bias + n, mask=n < N, other=0.0)
        if low_rank is not None:
            panel = tl.program_id(0)
            head, adds = panel * 0, panel >= 0
            h, up_h = low_rank + m * RANK, low_rank + (ROWS + m) * RANK
            a += expand_panel(h, of_row, table, pairs, m, adds, head, panel, (N + 15) // 16, RANK)
            b += expand_panel(up_h, of_row, table_1, pairs, m, adds, head, panel, (N + 15) // 16, RANK)
        tl.store(y + m * N + n, glu(a, b, FUNCTION, ALPHA, LIMIT), mask=n < N)
