"""Products of many rows with packed weights on tensor cores.

Weights are taken out of their panels into tiles of bf16 (rounded once: number and scale in one) and multiplied with
activations rounded to bf16, sums are f32. Weights stored as f32 stay f32 and are multiplied in three TF32 products,
which is about as exact as f32: a router's choice must not depend on how many rows a step has.

A tile of weights is made for Hopper's tensor cores, which read it from shared memory: k is the fast axis there, a
thread has the elements of its words (tl.join keeps them in its registers) and stores vectors of 16 bytes, and columns
that are stored together lie two apart, so that the vectors fall in different banks (in_order undoes that).
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.weights import elements_of_word, load_panels, padded_steps, scaled_element


@triton.jit
def _pair(words, a: tl.constexpr, b: tl.constexpr, scales, minima, FORMAT: tl.constexpr):
    return tl.join(
        scaled_element(words, a, scales, minima, FORMAT).to(tl.bfloat16),
        scaled_element(words, b, scales, minima, FORMAT).to(tl.bfloat16),
    )


@triton.jit
def weight_rows(w, panels, steps, mask, K: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Numbers [panels, 16, steps * PER] of whole panels, k in order: bf16, f32 if the weights are. Operands as those of
    weights.load_panels."""
    words, scales, minima = load_panels(w, panels, steps, mask, K, FORMAT, MASKED)
    words, scales = tl.permute(words, (0, 2, 1)), tl.permute(scales, (0, 2, 1))
    minima = tl.permute(minima, (0, 2, 1))
    PER: tl.constexpr = elements_of_word(FORMAT)
    if PER == 1:
        numbers = words.to(tl.float32, bitcast=True)
    elif PER == 2:
        numbers = _pair(words, 0, 1, scales, minima, FORMAT)
    elif PER == 4:
        numbers = tl.join(_pair(words, 0, 2, scales, minima, FORMAT), _pair(words, 1, 3, scales, minima, FORMAT))
    else:
        even = tl.join(_pair(words, 0, 4, scales, minima, FORMAT), _pair(words, 2, 6, scales, minima, FORMAT))
        odd = tl.join(_pair(words, 1, 5, scales, minima, FORMAT), _pair(words, 3, 7, scales, minima, FORMAT))
        numbers = tl.join(even, odd)
    return tl.reshape(numbers, (panels.shape[0], 16, steps.shape[0] * PER))


@triton.jit
def weight_tile(
    w,
    first_panel,
    first,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Numbers [STEPS * PER, COLUMNS] of a matrix of N panels: those from ``first_panel`` on, steps from ``first`` on; 0
    where there is none. Columns within a panel are in an order of their own: see in_order."""
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    P: tl.constexpr = COLUMNS // 16
    MASKED: tl.constexpr = ALL % STEPS != 0 or N % P != 0
    panels, steps = first_panel + tl.arange(0, P), first + tl.arange(0, STEPS)
    mask = (panels < N)[:, None, None] & (steps < ALL)[None, :, None]
    numbers = weight_rows(w, panels, steps, mask, K, FORMAT, MASKED)
    WIDTH: tl.constexpr = STEPS * elements_of_word(FORMAT)
    spread = tl.permute(tl.reshape(numbers, (P, 4, 2, 2, WIDTH)), (0, 2, 1, 3, 4))
    return tl.trans(tl.reshape(spread, (COLUMNS, WIDTH)))


@triton.jit
def in_order(sums):
    """Columns of a product with a weight_tile as they are in the matrix."""
    M: tl.constexpr = sums.shape[0]
    N: tl.constexpr = sums.shape[1]
    return tl.reshape(tl.permute(tl.reshape(sums, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))


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
    PARTS: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """linear and head_linear for n_rows[0] rows: x bf16 or f32[rows, HEADS, K], w HEADS matrices [N, K] of MATRIX
    words, bias f32[N] or None -> y f32[rows, HEADS, N]. PARTS > 1: y f32[PARTS, HEADS, rows of the grid, N], the
    products with a part of k each, for add_parts.

    Grid: (row tiles, column tiles, HEADS * PARTS): programs that share weights run side by side.
    """
    rows = tl.load(n_rows)
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    if tl.program_id(0) * M_TILE >= rows:
        return
    head, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    PER: tl.constexpr = elements_of_word(FORMAT)
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    TURNS: tl.constexpr = (ALL + STEPS * PARTS - 1) // (STEPS * PARTS) * STEPS
    MASKED: tl.constexpr = ALL % STEPS != 0 or ALL * PER != K
    matrix = w + head.to(tl.int64) * MATRIX
    offsets = m.to(tl.int64) * (HEADS * K) + head * K
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    begin, end = 0, ALL
    if PARTS > 1:
        begin = part * TURNS
        end = tl.minimum(begin + TURNS, ALL)
    for first in tl.range(begin, end, STEPS, num_stages=STAGES):
        k = first * PER + tl.arange(0, STEPS * PER)
        b = weight_tile(matrix, tl.program_id(1) * (N_TILE // 16), first, N_TILE, STEPS, (N + 15) // 16, K, FORMAT)
        a = row_tile(x, offsets, m < rows, k, K, MASKED)
        sums = multiply_add(a, b, sums, FORMAT)
    sums = in_order(sums)
    mask = (m < rows)[:, None] & (n < N)[None, :]
    if PARTS > 1:
        at = ((part * HEADS + head) * tl.num_programs(0) * M_TILE + m).to(tl.int64) * N
        tl.store(y + at[:, None] + n[None, :], sums, mask=mask)
    else:
        if bias is not None:
            sums += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
        at = m.to(tl.int64)[:, None] * (HEADS * N) + (head * N + n)[None, :]
        tl.store(y + at, sums, mask=mask)


@triton.jit
def add_parts(
    parts,
    bias,
    y,
    n_rows,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    M_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What linear_gemm left in PARTS parts, in their order -> its y. Grid: (rows, column blocks, HEADS)."""
    row, head = tl.program_id(0), tl.program_id(2)
    if row >= tl.load(n_rows):
        return
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    height = tl.cdiv(tl.num_programs(0), M_TILE) * M_TILE
    sums = tl.zeros((COLUMNS,), tl.float32)
    for part in tl.static_range(PARTS):
        at = ((part * HEADS + head) * height + row).to(tl.int64) * N
        sums += tl.load(parts + at + n, mask=n < N, other=0.0)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0)
    tl.store(y + (row.to(tl.int64) * HEADS + head) * N + n, sums, mask=n < N)


@triton.jit
def unpack(w, out, K: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """A matrix [N, K] in panels -> out bf16[N, K]. Grid: (blocks of STEPS, blocks of COLUMNS)."""
    PER: tl.constexpr = elements_of_word(FORMAT)
    ALL: tl.constexpr = padded_steps(K, FORMAT)
    ALL_PANELS: tl.constexpr = (N + 15) // 16
    P: tl.constexpr = COLUMNS // 16
    steps = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    panels = tl.program_id(1) * P + tl.arange(0, P)
    mask = (panels < ALL_PANELS)[:, None, None] & (steps < ALL)[None, :, None]
    numbers = weight_rows(w, panels, steps, mask, K, FORMAT, ALL % STEPS != 0 or ALL_PANELS % P != 0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(0) * (STEPS * PER) + tl.arange(0, STEPS * PER)
    tile = tl.reshape(numbers, (COLUMNS, STEPS * PER))
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], tile, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def unpacked_gemm(
    x,
    w,
    bias,
    y,
    n_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A linear for n_rows[0] rows with the matrix of unpack: x bf16[rows, K], w bf16[N, K], bias f32[N] or None -> y
    f32[rows, N]. Grid: (row tiles, column tiles)."""
    rows = tl.load(n_rows)
    if tl.program_id(0) * M_TILE >= rows:
        return
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    # Rows and columns that are none repeat the last one: no masks in the loop.
    from_x = tl.minimum(m, rows - 1).to(tl.int64) * K
    from_w = tl.minimum(n, N - 1) * K if N % N_TILE != 0 else n * K
    sums = tl.zeros((M_TILE, N_TILE), tl.float32)
    for first in tl.range(0, K, K_TILE, num_stages=STAGES):
        k = first + tl.arange(0, K_TILE)
        if K % K_TILE != 0:
            a = tl.load(x + from_x[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
            b = tl.load(w + from_w[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        else:
            a = tl.load(x + from_x[:, None] + k[None, :])
            b = tl.load(w + from_w[None, :] + k[:, None])
        sums = tl.dot(a, b, sums)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, sums, mask=(m < rows)[:, None] & (n < N)[None, :])
