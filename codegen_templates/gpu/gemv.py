"""Products of a few rows with packed weights: every weight is read once, products and sums are f32.

A program multiplies one or two panels. Its lanes share the panel's steps and add up in a fixed order, so that the
result depends on nothing but the operands.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.weights import (
    element,
    elements_of_word,
    has_scales,
    load_scales,
    load_words,
    padded_steps,
)


@triton.jit
def _load_turn(w, panels, rows, first, K: tl.constexpr, FORMAT: tl.constexpr, STEPS: tl.constexpr):
    """Words and scales (0 if the format has none) of the steps from ``first`` on; zeros beyond the last."""
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    MASKED: tl.constexpr = ALL % STEPS != 0
    steps = first + tl.arange(0, STEPS)
    valid = (steps < ALL)[:, None] & (rows >= 0)[None, :]
    words = load_words(w, panels, rows, steps, valid, K, FORMAT, MASKED)
    if has_scales(FORMAT):
        return words, load_scales(w, panels, rows, steps, valid, K, FORMAT, MASKED)
    else:
        return words, 0.0


@triton.jit
def _multiply_turn(
    x,
    words,
    scales,
    sums,
    first,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """sums of each row plus the products of a turn's words; a word is taken apart once for all rows."""
    PER: tl.constexpr = elements_of_word(FORMAT)
    k = (first + tl.arange(0, STEPS)) * PER
    if has_scales(FORMAT):
        parts = (tl.zeros((STEPS, words.shape[1]), tl.float32),) * ROWS
    else:
        parts = sums
    for o in tl.static_range(PER):
        number = element(words, o, FORMAT)
        added = ()
        for m in tl.static_range(ROWS):
            if K % (STEPS * PER) == 0:
                column = tl.load(x + m * X_ROW + k + o)
            else:
                column = tl.load(x + m * X_ROW + k + o, mask=k + o < K, other=0.0)
            added = added + (parts[m] + number * column[:, None],)
        parts = added
    if has_scales(FORMAT):
        added = ()
        for m in tl.static_range(ROWS):
            added = added + (sums[m] + parts[m] * scales,)
        parts = added
    return parts


@triton.jit
def panel_products(
    x,
    w,
    panels,
    rows,
    X_ROW: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """y[m][c] = sum over k of x[m, k] * w[c, k] for ROWS rows of x: a tuple of f32 [columns].

    x: f32 rows X_ROW elements apart. w, panels, rows i32[columns]: see weights.load_words. STEPS: steps of a turn,
    fewer than a block's threads: then Triton loads a turn's activations where they are used, without shared memory. The
    weights of a turn are loaded while those of the turn before are multiplied.
    """
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    LAST: tl.constexpr = (ALL - 1) // STEPS * STEPS
    sums = (tl.zeros((STEPS, rows.shape[0]), tl.float32),) * ROWS
    words, scales = _load_turn(w, panels, rows, 0, K, FORMAT, STEPS)
    for first in tl.range(0, LAST, STEPS, num_stages=1):
        next_words, next_scales = _load_turn(w, panels, rows, first + STEPS, K, FORMAT, STEPS)
        sums = _multiply_turn(x, words, scales, sums, first, X_ROW, K, FORMAT, ROWS, STEPS)
        words, scales = next_words, next_scales
    sums = _multiply_turn(x, words, scales, sums, LAST, X_ROW, K, FORMAT, ROWS, STEPS)
    totals = ()
    for m in tl.static_range(ROWS):
        totals = totals + (tl.sum(sums[m], axis=0),)
    return totals


@triton.jit
def linear_gemv(
    x,
    w,
    bias,
    y,
    K: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """linear and head_linear for exactly ROWS rows: x f32[ROWS, HEADS, K], w HEADS matrices [N, K] of MATRIX words,
    bias f32[N] or None -> y f32[ROWS, HEADS, N]. Grid: (panels, HEADS)."""
    panel, head = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, 16)
    n = panel * 16 + r
    totals = panel_products(
        x + head * K, w + head.to(tl.int64) * MATRIX, panel + r * 0, r, HEADS * K, K, FORMAT, ROWS, STEPS
    )
    for m in tl.static_range(ROWS):
        total = totals[m]
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0.0)
        tl.store(y + m * (HEADS * N) + head * N + n, total, mask=n < N)
