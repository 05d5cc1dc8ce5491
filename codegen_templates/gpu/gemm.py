"""Products of many rows with packed weights on tensor cores.

Weights are taken out of their panels into tiles of bf16 (rounded once: number and scale in one) and multiplied with
activations rounded to bf16, sums are f32. Weights stored as f32 stay f32 and are multiplied in three TF32 products,
which is about as exact as f32: a router's choice must not depend on how many rows a step has.
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
def weight_tile(w, panels, rows, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Numbers [steps * PER, columns] of a tile, k in order; operands as those of weights.load_words. bf16; f32 if the
    weights are."""
    PER: tl.constexpr = elements_of_word(FORMAT)
    words = load_words(w, panels, rows, steps, mask, K, FORMAT, MASKED)
    if FORMAT == "f32":
        return element(words, 0, FORMAT)
    else:
        o = tl.arange(0, PER)
        numbers = element(words[:, None, :], o[None, :, None], FORMAT)
        if has_scales(FORMAT):
            numbers *= load_scales(w, panels, rows, steps, mask, K, FORMAT, MASKED)[:, None, :]
        return tl.reshape(numbers.to(tl.bfloat16), (steps.shape[0] * PER, rows.shape[0]))


@triton.jit
def multiply_add(a, b, sums, FORMAT: tl.constexpr):
    """sums + a @ b for a tile of activations [M, k] (f32 or bf16) and one of weights (:func:`weight_tile`)."""
    if FORMAT == "f32":
        return tl.dot(a.to(tl.float32), b, sums, input_precision="tf32x3")
    else:
        return tl.dot(a.to(tl.bfloat16), b, sums)


@triton.jit
def row_tile(x, offsets, valid, k, K: tl.constexpr, MASKED: tl.constexpr):
    """Activations [rows, k] at ``offsets`` + k, 0 where a row is not ``valid`` or k not below K."""
    mask = valid[:, None]
    if MASKED:
        mask = mask & (k < K)[None, :]
    return tl.load(x + offsets[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
def linear_gemm(
    x,
    w,
    bias,
    y,
    n_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    MATRIX: tl.constexpr,
    FORMAT: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """linear and head_linear for n_rows[0] rows: x f32[rows, HEADS, K], w HEADS matrices [N, K] of MATRIX words, bias
    f32[N] or None -> y f32[rows, HEADS, N].

    Grid: (row tiles, column tiles, HEADS): programs that share weights run side by side.
    """
    rows = tl.load(n_rows)
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    if tl.program_id(0) * M_TILE >= rows:
        return
    head = tl.program_id(2)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    PER: tl.constexpr = elements_of_word(FORMAT)
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    MASKED: tl.constexpr = ALL % STEPS != 0 or N % N_TILE != 0
    MASKED_X: tl.constexpr = ALL % STEPS != 0 or ALL * PER != K
    matrix = w + head.to(tl.int64) * MATRIX
    offsets = m.to(tl.int64) * (HEADS * K) + head * K
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for first in tl.range(0, ALL, STEPS, num_stages=STAGES):
        steps = first + tl.arange(0, STEPS)
        k = first * PER + tl.arange(0, STEPS * PER)
        mask = (steps < ALL)[:, None] & (n < (N + 15) // 16 * 16)[None, :]
        b = weight_tile(matrix, n // 16, n % 16, steps, mask, K, FORMAT, MASKED)
        a = row_tile(x, offsets, m < rows, k, K, MASKED_X)
        sums = multiply_add(a, b, sums, FORMAT)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * (HEADS * N) + (head * N + n)[None, :]
    tl.store(y + at, sums, mask=(m < rows)[:, None] & (n < N)[None, :])
