"""The gated delta rule (hetcomp/ir/ops.py: GatedDelta): row by row in f32, or in chunks of rows on tensor cores.

Chunks are those of arXiv 2412.06464 (section 3.3) and 2406.06484: with G the sum of log decays from a chunk's first
row on, A[i, j] = beta_i k_i . k_j exp(G_i - G_j) below the diagonal and T = (I + A)^-1, a chunk's rows change the state
S in front of them to S exp(G_last) + sum of k_i exp(G_last - G_i) (x) v'_i, where v' = T (beta v) - w S and w = T (beta
exp(G) k).

Queries, keys and values are rounded to bf16 once, the former behind their norms, and are the same numbers wherever they
are multiplied: keys that differed between A and the update would not be those that the rule reads back. T is made and
multiplied as pairs of bf16 numbers (16 bits). Behind that w, S and v' are rounded to bf16 where they are operands; S
itself stays f32 from chunk to chunk. exp is taken of differences of G, which are not above 0, never of G and -G each.
"""

import triton
import triton.language as tl

# Rows of a chunk, and of the blocks on the diagonal of T that are solved row by row (8 are as fast: six products of
# blocks more).
CHUNK: tl.constexpr = tl.constexpr(64)
_BLOCK: tl.constexpr = tl.constexpr(16)
# exp of less is 0 in f32; sums of a chunk's stay small enough for their differences.
_LEAST_LOG: tl.constexpr = tl.constexpr(-128.0)


@triton.jit
def _log_decay(a, a_log, dt_bias):
    """-exp(a_log) * softplus(a + dt_bias)."""
    x = a + dt_bias
    # softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|): log(1 + e) = 2 artanh(e / (2 + e)), for small e exact to
    # the last places, where 1 + e would round them off. z^2 <= 1/9: the first power that is left out adds 2e-8.
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    z2 = z * z
    series = 1.0 / 13
    for power in tl.static_range(11, 0, -2):
        series = series * z2 + 1.0 / power
    return tl.maximum(-tl.exp(a_log) * (tl.maximum(x, 0.0) + 2.0 * z * series), _LEAST_LOG)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _is_one_slot(slots, n):
    """Whether the step's n > 0 rows are of one slot: rows of a slot are neighbours."""
    return tl.load(slots) == tl.load(slots + n - 1)


@triton.jit
def gated_delta_rows(
    qkv,
    a,
    b,
    a_log,
    dt_bias,
    state,
    positions,
    slots,
    n_rows,
    y,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    L2_EPS: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Row by row, for columns of the values that have nothing to do with each other: qkv f32[rows, 2 * K_HEADS * K_DIM
    + V_HEADS * V_DIM], a, b f32[rows, V_HEADS], a_log, dt_bias f32[V_HEADS], state f32[slots, V_HEADS, K_DIM, V_DIM] ->
    y f32[rows, V_HEADS, V_DIM]. Grid: (blocks of V_TILE columns, V_HEADS, blocks of ROW_TILE rows).

    A program goes over all rows of the slots whose first row is among its ROW_TILE. n_rows None: exactly ROWS rows.
    CHUNKS: it leaves steps of one slot to the chunks.
    """
    first = tl.program_id(2) * ROW_TILE
    n = first * 0 + ROWS
    if n_rows is not None:
        n = tl.load(n_rows)
        if first >= n:
            return
        if CHUNKS:
            if _is_one_slot(slots, n):
                return
    h = tl.program_id(1)
    k_head = h // (V_HEADS // K_HEADS)
    d, c = tl.arange(0, K_PADDED), tl.program_id(0) * V_TILE + tl.arange(0, V_TILE)
    inside = (d < K_DIM)[:, None] & (c < V_DIM)[None, :]
    rate, shift = tl.load(a_log + h), tl.load(dt_bias + h)
    for start in range(first, tl.minimum(first + ROW_TILE, n)):
        slot = tl.load(slots + start)
        before = tl.load(slots + start - 1, mask=start > 0, other=-1)
        if slot != before:
            at = state + (slot.to(tl.int64) * V_HEADS + h) * (K_DIM * V_DIM) + d[:, None] * V_DIM + c[None, :]
            s = tl.load(at, mask=inside, other=0.0)
            row = start
            while tl.load(slots + row, mask=row < n, other=-1) == slot:
                x = qkv + row.to(tl.int64) * (2 * K_HEADS * K_DIM + V_HEADS * V_DIM)
                q = tl.load(x + k_head * K_DIM + d, mask=d < K_DIM, other=0.0)
                k = tl.load(x + (K_HEADS + k_head) * K_DIM + d, mask=d < K_DIM, other=0.0)
                v = tl.load(x + 2 * K_HEADS * K_DIM + h * V_DIM + c, mask=c < V_DIM, other=0.0)
                decay = tl.exp(_log_decay(tl.load(a + row * V_HEADS + h), rate, shift))
                beta = _sigmoid(tl.load(b + row * V_HEADS + h))
                if L2_EPS > 0:
                    q = q / tl.sqrt_rn(tl.sum(q * q, axis=0) + L2_EPS)
                    k = k / tl.sqrt_rn(tl.sum(k * k, axis=0) + L2_EPS)
                s = tl.where(tl.load(positions + row) > 0, s * decay, 0.0)
                s += k[:, None] * (beta * (v - tl.sum(k[:, None] * s, axis=0)))[None, :]
                out = tl.sum((q * SCALE)[:, None] * s, axis=0)
                tl.store(y + (row.to(tl.int64) * V_HEADS + h) * V_DIM + c, out, mask=c < V_DIM)
                row += 1
            tl.store(at, s, mask=inside)


@triton.jit
def _normed(x, rows, mask, d, WIDTH: tl.constexpr, L2_EPS: tl.constexpr):
    """Rows of a head of queries or keys, each of length 1, as bf16."""
    numbers = tl.load(x + rows.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)
    if L2_EPS > 0:
        numbers = numbers / tl.sqrt_rn(tl.sum(numbers * numbers, axis=1) + L2_EPS)[:, None]
    return numbers.to(tl.bfloat16)


@triton.jit
def _split(x):
    """x f32 as the sum of two bf16 numbers, to 2^-17 of itself."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b):
    """a f32 @ b bf16."""
    high, low = _split(a)
    return tl.dot(high, b, tl.dot(low, b))


@triton.jit
def _wide_product(a, b):
    """a f32 @ b f32, without the product of what their first bf16 numbers leave."""
    high, low = _split(a)
    b_high, b_low = _split(b)
    return tl.dot(high, b_high, tl.dot(high, b_low, tl.dot(low, b_high)))


@triton.jit
def _join_blocks(lower, inverse, SIZE: tl.constexpr):
    """The inverses of blocks of 2 * SIZE on the diagonal from those of SIZE."""
    i = tl.arange(0, CHUNK)
    block = i // SIZE
    below = ((block // 2)[:, None] == (block // 2)[None, :]) & (block[:, None] != block[None, :])
    product = _wide_product(tl.where(below, lower, 0.0), inverse)
    return inverse - _wide_product(inverse, product)


@triton.jit
def _inverse(lower):
    """(I + lower)^-1 for ``lower`` f32[CHUNK, CHUNK], 0 on and above the diagonal.

    First blocks of _BLOCK rows on the diagonal, one row after the other; then twice as large ones of two: [[P, 0],
    [X, Q]]^-1 = [[P^-1, 0], [-Q^-1 X P^-1, Q^-1]]. Only inverses of parts of the matrix appear on the way, no powers of
    it, which are larger by orders of magnitude where keys are alike.
    """
    COUNT: tl.constexpr = CHUNK // _BLOCK
    block, r = tl.arange(0, COUNT), tl.arange(0, _BLOCK)
    on_diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    parts = tl.sum(tl.where(on_diagonal, tl.reshape(lower, (COUNT, _BLOCK, COUNT, _BLOCK)), 0.0), axis=2)
    solved = tl.where((r[:, None] == r[None, :])[None, :, :], 1.0, parts * 0.0)
    for step in range(_BLOCK - 1):
        of_step = tl.sum(tl.where((r == step)[None, None, :], parts, 0.0), axis=2)
        row = tl.sum(tl.where((r == step)[None, :, None], solved, 0.0), axis=1)
        solved -= of_step[:, :, None] * row[:, None, :]
    wide = tl.where(on_diagonal, solved[:, :, None, :], 0.0)
    inverse = tl.reshape(wide, (CHUNK, CHUNK))
    return _join_blocks(lower, _join_blocks(lower, inverse, _BLOCK), 2 * _BLOCK)


@triton.jit
def gated_delta_chunks(
    qkv,
    a,
    b,
    a_log,
    dt_bias,
    slots,
    n_rows,
    queries,
    keys,
    w,
    u,
    within,
    sums,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    L2_EPS: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TILE: tl.constexpr,
):
    """What a chunk is without the state in front of it, for steps of one slot: operands as of gated_delta_rows.

    For each chunk and head of keys: queries, keys bf16[CHUNK, K_PADDED]; for each chunk and head of values: w
    bf16[CHUNK, K_PADDED], u f32[CHUNK, V_PADDED] = T (beta v), within bf16[CHUNK, CHUNK] = q_i . k_j exp(G_i - G_j)
    SCALE on and below the diagonal, sums f32[CHUNK] = G. Rows beyond the step's are 0, the last sum repeated. Grid:
    (chunks, V_HEADS).
    """
    n = tl.load(n_rows)
    chunk, h = tl.program_id(0), tl.program_id(1)
    if chunk * CHUNK >= n:
        return
    if not _is_one_slot(slots, n):
        return
    WIDTH: tl.constexpr = 2 * K_HEADS * K_DIM + V_HEADS * V_DIM
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    i, d = tl.arange(0, CHUNK), tl.arange(0, K_PADDED)
    rows = chunk * CHUNK + i
    here = rows < n
    mask = here[:, None] & (d < K_DIM)[None, :]
    k_head = h // GROUP
    q = _normed(qkv + k_head * K_DIM, rows, mask, d, WIDTH, L2_EPS)
    k = _normed(qkv + (K_HEADS + k_head) * K_DIM, rows, mask, d, WIDTH, L2_EPS)
    at = chunk.to(tl.int64) * CHUNK
    if h % GROUP == 0:
        of_head = (at * K_HEADS + k_head * CHUNK) * K_PADDED + i[:, None] * K_PADDED + d[None, :]
        tl.store(queries + of_head, q)
        tl.store(keys + of_head, k)
    log_decay = _log_decay(
        tl.load(a + rows * V_HEADS + h, mask=here, other=0.0), tl.load(a_log + h), tl.load(dt_bias + h)
    )
    g = tl.cumsum(tl.where(here, log_decay, 0.0), axis=0)
    beta = tl.where(here, _sigmoid(tl.load(b + rows * V_HEADS + h, mask=here, other=0.0)), 0.0)
    head = at * V_HEADS + h * CHUNK
    tl.store(sums + head + i, g)
    lower = i[:, None] >= i[None, :]
    decay = tl.where(lower, tl.exp(tl.where(lower, g[:, None] - g[None, :], 0.0)), 0.0)
    scores = tl.dot(q, tl.trans(k)) * decay * SCALE
    tl.store(within + head * CHUNK + i[:, None] * CHUNK + i[None, :], scores.to(tl.bfloat16))
    products = tl.dot(k, tl.trans(k)) * decay * beta[:, None]
    inverse = _inverse(tl.where(i[:, None] > i[None, :], products, 0.0)) * beta[None, :]
    of_keys = _product(inverse * tl.exp(g)[None, :], k)
    tl.store(w + head * K_PADDED + i[:, None] * K_PADDED + d[None, :], of_keys.to(tl.bfloat16))
    for first in tl.static_range(0, V_PADDED, V_TILE):
        c = first + tl.arange(0, V_TILE)
        values = qkv + 2 * K_HEADS * K_DIM + h * V_DIM + rows.to(tl.int64)[:, None] * WIDTH + c[None, :]
        v = tl.load(values, mask=here[:, None] & (c < V_DIM)[None, :], other=0.0)
        of_values = _product(inverse, v.to(tl.bfloat16))
        tl.store(u + head * V_PADDED + i[:, None] * V_PADDED + c[None, :], of_values)


@triton.jit
def gated_delta_scan(
    queries,
    keys,
    w,
    u,
    within,
    sums,
    state,
    positions,
    slots,
    n_rows,
    y,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    V_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state through the chunks that gated_delta_chunks has made, one after the other, and what each row reads of
    it: state and y as of gated_delta_rows. Grid: (blocks of V_TILE columns, V_HEADS)."""
    n = tl.load(n_rows)
    if n == 0:
        return
    slot = tl.load(slots)
    if slot != tl.load(slots + n - 1):
        return
    h = tl.program_id(1)
    k_head = h // (V_HEADS // K_HEADS)
    i, d, c = tl.arange(0, CHUNK), tl.arange(0, K_PADDED), tl.program_id(0) * V_TILE + tl.arange(0, V_TILE)
    inside = (d < K_DIM)[:, None] & (c < V_DIM)[None, :]
    at = state + (slot.to(tl.int64) * V_HEADS + h) * (K_DIM * V_DIM) + d[:, None] * V_DIM + c[None, :]
    s = tl.where(tl.load(positions) > 0, tl.load(at, mask=inside, other=0.0), 0.0)
    of_chunk = i[:, None] * K_PADDED + d[None, :]
    first = slot.to(tl.int64) * 0
    for _ in tl.range(0, tl.cdiv(n, CHUNK), num_stages=STAGES):
        of_head = (first * K_HEADS + k_head * CHUNK) * K_PADDED
        head = first * V_HEADS + h * CHUNK
        narrow = s.to(tl.bfloat16)
        g = tl.load(sums + head + i)
        last = tl.load(sums + head + CHUNK - 1)
        new = tl.load(u + head * V_PADDED + i[:, None] * V_PADDED + c[None, :])
        new -= tl.dot(tl.load(w + head * K_PADDED + of_chunk), narrow)
        out = tl.dot(tl.load(queries + of_head + of_chunk), narrow) * (tl.exp(g) * SCALE)[:, None]
        scores = tl.load(within + head * CHUNK + i[:, None] * CHUNK + i[None, :])
        out = tl.dot(scores, new.to(tl.bfloat16), out)
        rows = first + i
        mask = (rows < n)[:, None] & (c < V_DIM)[None, :]
        tl.store(y + (rows[:, None] * V_HEADS + h) * V_DIM + c[None, :], out, mask=mask)
        k = tl.load(keys + of_head + of_chunk)
        s = tl.dot(tl.trans(k), (new * tl.exp(last - g)[:, None]).to(tl.bfloat16), s * tl.exp(last))
        first += CHUNK
    tl.store(at, s, mask=inside)
