"""What is done to heads between their projections and attention: norm, rotary embedding, cache."""

import triton
import triton.language as tl

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
    """Elements ``d`` of a head of the row x f32[HEADS, DIM], normed, and rotated by cos, sin f32[HALF]. norm: None,
    or the weight of an rms_norm of each head, f32[DIM], or of the WHOLE row, f32[HEADS * DIM]."""
    turned, pair, second, a, b = rotary_pairs(d, HALF, OFFSET, STYLE)
    inside = ~turned & (d < DIM)
    its = x + head * DIM
    first = tl.load(its + a, mask=turned, other=0.0)
    mate = tl.load(its + b, mask=turned, other=0.0)
    kept = tl.load(its + d, mask=inside, other=0.0)
    if norm is not None:
        if WHOLE:
            factor = norm_factors(x, HEADS * DIM, HEADS * DIM, EPS, 1)[0]
            weight = norm + head * DIM
        else:
            numbers = tl.load(its + d, mask=d < DIM, other=0.0)
            factor = 1.0 / tl.sqrt_rn(tl.sum(numbers * numbers, axis=0) / DIM + EPS)
            weight = norm
        first = first * factor * (tl.load(weight + a, mask=turned, other=0.0) + WEIGHT_OFFSET)
        mate = mate * factor * (tl.load(weight + b, mask=turned, other=0.0) + WEIGHT_OFFSET)
        kept = kept * factor * (tl.load(weight + d, mask=inside, other=0.0) + WEIGHT_OFFSET)
    c = tl.load(cos + pair, mask=turned, other=0.0)
    s = tl.load(sin + pair, mask=turned, other=0.0)
    return tl.where(turned, tl.where(second, mate * c + first * s, first * c - mate * s), kept)


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
    context,
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
):
    """q f32[rows, HEADS, DIM] normed and rotated -> y of its shape; k f32[rows, KV_HEADS, DIM] normed and rotated, and
    v f32[rows, KV_HEADS, V_DIM], to their caches at slots and positions i32[rows]. Norms: see _turned_head; cos, sin
    f32[rows, HALF]. Grid: (rows, HEADS + 2 * KV_HEADS)."""
    row, head = tl.program_id(0), tl.program_id(1)
    if beyond(row, n_rows):
        return
    d = tl.arange(0, PADDED)
    wide = row.to(tl.int64)
    its_cos, its_sin = cos + row * HALF, sin + row * HALF
    if head < HEADS:
        numbers = _turned_head(
            q + wide * (HEADS * DIM), q_norm, its_cos, its_sin, head, d,
            HEADS, DIM, HALF, OFFSET, STYLE, WHOLE, Q_EPS, Q_WEIGHT_OFFSET,
        )  # fmt: skip
        tl.store(y + (wide * HEADS + head) * DIM + d, numbers, mask=d < DIM)
    else:
        position = tl.load(positions + row)
        slot = tl.load(slots + row)
        if head < HEADS + KV_HEADS:
            numbers = _turned_head(
                k + wide * (KV_HEADS * DIM), k_norm, its_cos, its_sin, head - HEADS, d,
                KV_HEADS, DIM, HALF, OFFSET, STYLE, WHOLE, K_EPS, K_WEIGHT_OFFSET,
            )  # fmt: skip
            at = (slot * KV_HEADS + head - HEADS).to(tl.int64) * context + position
            tl.store(k_cache + at * DIM + d, numbers.to(k_cache.dtype.element_ty), mask=d < DIM)
        else:
            of_v = head - (HEADS + KV_HEADS)
            numbers = tl.load(v + (wide * KV_HEADS + of_v) * V_DIM + d, mask=d < V_DIM)
            at = (slot * KV_HEADS + of_v).to(tl.int64) * context + position
            tl.store(v_cache + at * V_DIM + d, numbers.to(v_cache.dtype.element_ty), mask=d < V_DIM)


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
    context,
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
):
    """MLA: the last DIM elements of q f32[rows, HEADS, NOPE + DIM], rotated, to the last of y f32[rows, HEADS, RANK +
    DIM]. kv f32[rows, RANK + DIM] to the cache at slots and positions i32[rows]: the rms_norm of its first RANK
    elements, the others rotated. cos, sin f32[rows, HALF]. Grid: (rows, HEADS + 1)."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, PADDED)
    its_cos, its_sin = cos + row * HALF, sin + row * HALF
    if head < HEADS:
        numbers = _turned_head(
            q + (row * HEADS + head) * (NOPE + DIM) + NOPE, None, its_cos, its_sin, 0, d,
            1, DIM, HALF, OFFSET, STYLE, False, 0.0, 0.0,
        )  # fmt: skip
        tl.store(y + (row * HEADS + head) * (RANK + DIM) + RANK + d, numbers, mask=d < DIM)
    else:
        at = tl.load(slots + row).to(tl.int64) * context + tl.load(positions + row)
        target = cache + at * (RANK + DIM)
        c = tl.arange(0, RANK_PADDED)
        latent = tl.load(kv + row * (RANK + DIM) + c, mask=c < RANK, other=0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(latent * latent, axis=0) / RANK + EPS)
        normed = latent * factor * (tl.load(norm + c, mask=c < RANK, other=0.0) + WEIGHT_OFFSET)
        tl.store(target + c, normed.to(cache.dtype.element_ty), mask=c < RANK)
        numbers = _turned_head(
            kv + row * (RANK + DIM) + RANK, None, its_cos, its_sin, 0, d,
            1, DIM, HALF, OFFSET, STYLE, False, 0.0, 0.0,
        )  # fmt: skip
        tl.store(target + RANK + d, numbers.to(cache.dtype.element_ty), mask=d < DIM)
