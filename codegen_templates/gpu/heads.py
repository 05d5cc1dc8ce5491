"""What is done to heads between their projections and attention: norm, rotary embedding, cache."""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.cache import cache_row, to_cache
from hetcomp.codegen_templates.gpu.gemv import norm_factors
from hetcomp.codegen_templates.gpu.rowwise import beyond, rotary_pairs


@triton.jit
def _turned_head(
    x,
    norm,
    cos,
    sin,
    head,
    d,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    STYLE: tl.constexpr,
    WHOLE: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """Elements ``d`` [PADDED] of the heads ``head`` [heads] of the row x f32[HEADS, DIM], normed, and rotated by cos,
    sin f32[HALF]: [heads, PADDED]. norm: None, or the weight of an rms_norm of each head, f32[DIM], or of the WHOLE
    row, f32[HEADS * DIM]."""
    turned, pair, second, a, b = rotary_pairs(d, HALF, OFFSET, STYLE)
    there = (head < HEADS)[:, None]
    mask = there & turned[None, :]
    inside = there & (~turned & (d < DIM))[None, :]
    start = head[:, None] * DIM
    its = x + start
    first = tl.load(its + a[None, :], mask=mask, other=0.0)
    mate = tl.load(its + b[None, :], mask=mask, other=0.0)
    kept = tl.load(its + d[None, :], mask=inside, other=0.0)
    if norm is not None:
        if WHOLE:
            factor = norm_factors(x, HEADS * DIM, HEADS * DIM, EPS, 1)[0]
            weight = norm + start
        else:
            numbers = tl.load(its + d[None, :], mask=there & (d < DIM)[None, :], other=0.0)
            factor = (1.0 / tl.sqrt_rn(tl.sum(numbers * numbers, axis=1) / DIM + EPS))[:, None]
            weight = norm + start * 0
        first = first * factor * (tl.load(weight + a[None, :], mask=mask, other=0.0) + WEIGHT_OFFSET)
        mate = mate * factor * (tl.load(weight + b[None, :], mask=mask, other=0.0) + WEIGHT_OFFSET)
        kept = kept * factor * (tl.load(weight + d[None, :], mask=inside, other=0.0) + WEIGHT_OFFSET)
    c = tl.load(cos + pair, mask=turned, other=0.0)[None, :]
    s = tl.load(sin + pair, mask=turned, other=0.0)[None, :]
    return tl.where(turned[None, :], tl.where(second[None, :], mate * c + first * s, first * c - mate * s), kept)


@triton.jit
def heads_to_cache(
    q,
    k,
    v,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    n_rows,
    y,
    k_cache,
    v_cache,
    slot_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    STYLE: tl.constexpr,
    WHOLE: tl.constexpr,
    Q_EPS: tl.constexpr,
    Q_WEIGHT_OFFSET: tl.constexpr,
    K_EPS: tl.constexpr,
    K_WEIGHT_OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q f32[rows, HEADS, DIM] normed and rotated -> y of its shape, f32 or bf16; k f32[rows, KV_HEADS, DIM] normed and
    rotated, and v f32[rows, KV_HEADS, V_DIM], to their caches at slots and positions i32[rows]. Norms: see
    _turned_head; cos, sin f32[rows, HALF]. Grid: (rows, blocks of HEAD_TILE heads of q, then of k, then of v)."""
    row, block = tl.program_id(0), tl.program_id(1)
    if beyond(row, n_rows):
        return
    Q_BLOCKS: tl.constexpr = (HEADS + HEAD_TILE - 1) // HEAD_TILE
    KV_BLOCKS: tl.constexpr = (KV_HEADS + HEAD_TILE - 1) // HEAD_TILE
    d = tl.arange(0, PADDED)
    h = tl.arange(0, HEAD_TILE)
    wide = row.to(tl.int64)
    its_cos, its_sin = cos + row * HALF, sin + row * HALF
    if block < Q_BLOCKS:
        head = block * HEAD_TILE + h
        numbers = _turned_head(
            q + wide * (HEADS * DIM), q_norm, its_cos, its_sin, head, d,
            HEADS, DIM, HALF, OFFSET, STYLE, WHOLE, Q_EPS, Q_WEIGHT_OFFSET,
        )  # fmt: skip
        mask = (head < HEADS)[:, None] & (d < DIM)[None, :]
        at = (wide * HEADS + head)[:, None] * DIM + d[None, :]
        tl.store(y + at, numbers.to(y.dtype.element_ty), mask=mask)
    else:
        position = tl.load(positions + row)
        slot = tl.load(slots + row)
        if block < Q_BLOCKS + KV_BLOCKS:
            head = (block - Q_BLOCKS) * HEAD_TILE + h
            numbers = _turned_head(
                k + wide * (KV_HEADS * DIM), k_norm, its_cos, its_sin, head, d,
                KV_HEADS, DIM, HALF, OFFSET, STYLE, WHOLE, K_EPS, K_WEIGHT_OFFSET,
            )  # fmt: skip
            at = cache_row(slot, head, position, slot_blocks, BLOCK, DIM)[:, None] + d[None, :]
            mask = (head < KV_HEADS)[:, None] & (d < DIM)[None, :]
            tl.store(k_cache + at, to_cache(numbers, k_cache.dtype.element_ty), mask=mask)
        else:
            head = (block - (Q_BLOCKS + KV_BLOCKS)) * HEAD_TILE + h
            mask = (head < KV_HEADS)[:, None] & (d < V_DIM)[None, :]
            numbers = tl.load(v + (wide * KV_HEADS + head)[:, None] * V_DIM + d[None, :], mask=mask)
            at = cache_row(slot, head, position, slot_blocks, BLOCK, V_DIM)[:, None] + d[None, :]
            tl.store(v_cache + at, to_cache(numbers, v_cache.dtype.element_ty), mask=mask)


@triton.jit
def latents_to_cache(
    q,
    kv,
    norm,
    cos,
    sin,
    positions,
    slots,
    y,
    cache,
    slot_blocks,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    OFFSET: tl.constexpr,
    STYLE: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """MLA: the last DIM elements of q f32[rows, HEADS, NOPE + DIM], rotated, to the last of y f32[rows, HEADS, RANK +
    DIM]. kv f32[rows, RANK + DIM] to the cache at slots and positions i32[rows]: the rms_norm of its first RANK
    elements, the others rotated. cos, sin f32[rows, HALF]. Grid: (rows, HEADS + 1)."""
    row, head = tl.program_id(0), tl.program_id(1)
    d, one = tl.arange(0, PADDED), tl.arange(0, 1)
    its_cos, its_sin = cos + row * HALF, sin + row * HALF
    if head < HEADS:
        numbers = _turned_head(
            q + (row * HEADS + head) * (NOPE + DIM) + NOPE, None, its_cos, its_sin, one, d,
            1, DIM, HALF, OFFSET, STYLE, False, 0.0, 0.0,
        )  # fmt: skip
        its_y = y + (row * HEADS + head) * (RANK + DIM) + RANK
        tl.store(its_y + d[None, :], numbers, mask=(d < DIM)[None, :])
    else:
        position = tl.load(positions + row)
        target = cache + cache_row(tl.load(slots + row), 0, position, slot_blocks, BLOCK, RANK + DIM)
        c = tl.arange(0, RANK_PADDED)
        latent = tl.load(kv + row * (RANK + DIM) + c, mask=c < RANK, other=0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(latent * latent, axis=0) / RANK + EPS)
        normed = latent * factor * (tl.load(norm + c, mask=c < RANK, other=0.0) + WEIGHT_OFFSET)
        tl.store(target + c, to_cache(normed, cache.dtype.element_ty), mask=c < RANK)
        numbers = _turned_head(
            kv + row * (RANK + DIM) + RANK, None, its_cos, its_sin, one, d,
            1, DIM, HALF, OFFSET, STYLE, False, 0.0, 0.0,
        )  # fmt: skip
        tl.store(target + (RANK + d)[None, :], to_cache(numbers, cache.dtype.element_ty), mask=(d < DIM)[None, :])
