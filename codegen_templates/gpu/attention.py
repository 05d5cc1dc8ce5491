"""Attention over the KV cache (see cache.py), bf16, f32 or e4m3, by online softmax; sums are f32.

Beside a cache of bf16 or e4m3 queries and probabilities are rounded to bf16; beside an f32 one products are TF32 in
three parts.
Heads and values whose width is no power of two are cut in two parts that are (MLA: 512 + 64). Scores are kept in units
of log 2, which is what exp2 takes.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.cache import cache_block, cache_block_row, cache_row, from_cache, to_cache
from hetcomp.codegen_templates.gpu.functions import tanh

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # below every score; finite, so that differences of it are numbers


@triton.jit
def _product(a, b, sums):
    """sums + a @ b in the arithmetic of b, which comes from the cache."""
    if b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b, sums, input_precision="tf32x3")
    else:
        return tl.dot(a.to(tl.bfloat16), b, sums)


@triton.jit
def _load_queries(q, offsets, valid, DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Query rows [rows, FIRST](, [rows, SECOND]) as a tuple, f32 or bf16 as they are stored."""
    d = tl.arange(0, FIRST)
    parts = (tl.load(q + offsets[:, None] + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0),)
    if SECOND > 0:
        e = FIRST + tl.arange(0, SECOND)
        parts = parts + (
            tl.load(q + offsets[:, None] + e[None, :], mask=valid[:, None] & (e < DIM)[None, :], other=0.0),
        )
    return parts


@triton.jit
def _rows_of_cache(
    x,
    j,
    end,
    ROW: tl.constexpr,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Elements BEGIN .. BEGIN + WIDTH of the rows ``j``, ROW elements apart; 0 from DIM on and, unless WHOLE, from row
    ``end`` on."""
    d = BEGIN + tl.arange(0, WIDTH)
    at = x + j[:, None] * ROW + d[None, :]
    if not WHOLE:
        return from_cache(tl.load(at, mask=(j < end)[:, None] & (d < DIM)[None, :], other=0))
    elif BEGIN + WIDTH > DIM:
        return from_cache(tl.load(at, mask=(d < DIM)[None, :], other=0))
    else:
        return from_cache(tl.load(at))


@triton.jit
def _attend(
    queries,
    k,
    v,
    j,
    end,
    visible,
    top,
    total,
    sums,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_ROW: tl.constexpr,
    V_DIM: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One block of keys: the new running maximum, total and sums (a tuple of f32 [rows, part of the values]).

    k, v: so that the rows of the slot's head at positions ``j`` i32[keys], which are of one block of the cache, lie
    DIM and V_ROW elements apart; SHARED: the values are the keys' first V_FIRST numbers. Keys from ``end`` on are not
    read. visible [rows, keys]. WHOLE: all keys are below ``end`` and visible to all rows; neither is looked at.
    """
    keys = _rows_of_cache(k, j, end, DIM, 0, FIRST, DIM, WHOLE)
    scores = _product(queries[0], tl.trans(keys), tl.zeros((queries[0].shape[0], j.shape[0]), tl.float32))
    if SECOND > 0:
        scores = _product(queries[1], tl.trans(_rows_of_cache(k, j, end, DIM, FIRST, SECOND, DIM, WHOLE)), scores)
    if SOFTCAP > 0:
        scores = tanh(scores * (SCALE / SOFTCAP)) * (SOFTCAP * _LOG2_E)
    # Multiplied in the exponent, where it costs nothing; it is positive.
    FACTOR: tl.constexpr = 1.0 if SOFTCAP > 0 else SCALE * _LOG2_E
    if not WHOLE:
        scores = tl.where(visible, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * FACTOR)
    p = tl.exp2(scores * FACTOR - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    values = keys if SHARED else _rows_of_cache(v, j, end, V_ROW, 0, V_FIRST, V_DIM, WHOLE)
    new_sums = (_product(p, values, sums[0] * shrink[:, None]),)
    if V_SECOND > 0:
        rest = _rows_of_cache(v, j, end, V_ROW, V_FIRST, V_SECOND, V_DIM, WHOLE)
        new_sums = new_sums + (_product(p, rest, sums[1] * shrink[:, None]),)
    return new_top, total, new_sums


@triton.jit
def _attend_all(queries, keys, values, top, total, sums, SCALE: tl.constexpr):
    """_attend for keys [keys, FIRST] that all rows see and their values [keys, V_FIRST], without a softcap."""
    scores = tl.dot(queries, tl.trans(keys))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * (SCALE * _LOG2_E))
    p = tl.exp2(scores * (SCALE * _LOG2_E) - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    return new_top, total, tl.dot(p.to(tl.bfloat16), values, sums * shrink[:, None])


@triton.jit
def _no_sums(ROWS: tl.constexpr, V_FIRST: tl.constexpr, V_SECOND: tl.constexpr):
    sums = (tl.zeros((ROWS, V_FIRST), tl.float32),)
    if V_SECOND > 0:
        sums = sums + (tl.zeros((ROWS, V_SECOND), tl.float32),)
    return sums


@triton.jit
def _first_key(position, WINDOW: tl.constexpr):
    if WINDOW > 0:
        return tl.maximum(position - (WINDOW - 1), 0)
    else:
        return position * 0


@triton.jit
def _first_tile(position, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """The first key of the tile of KEYS keys that the first visible key is in: tiles do not cross blocks."""
    return _first_key(position, WINDOW) // KEYS * KEYS


@triton.jit
def _keys_of_part(position, WINDOW: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, MIN_PART: tl.constexpr):
    """Keys that each part of a token's keys has (the last one less): whole tiles of KEYS, at least MIN_PART."""
    each = tl.cdiv(position + 1 - _first_tile(position, WINDOW, KEYS), PARTS)
    return tl.maximum(tl.cdiv(each, KEYS) * KEYS, MIN_PART)


@triton.jit
def attention_decode(
    q,
    k,
    v,
    positions,
    slots,
    partial,
    stats,
    slot_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_ROW: tl.constexpr,
    V_DIM: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    SHARED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A part of the keys for the query heads of one kv head of one token: q f32[T, HEADS, DIM], caches, positions and
    slots i32[T], slot_blocks and BLOCK: see cache.py -> partial f32[T, HEADS, PARTS, V_DIM], stats f32[T, HEADS, PARTS,
    2] (maximum, total). Parts follow from the position alone; those without keys write nothing.
    Grid: (KV_HEADS * head tiles, PARTS, T)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (GROUP + HEAD_TILE - 1) // HEAD_TILE
    kv_head, token, part = tl.program_id(0) // TILES, tl.program_id(2), tl.program_id(1)
    position = tl.load(positions + token)
    each = _keys_of_part(position, WINDOW, PARTS, KEYS, MIN_PART)
    begin = _first_tile(position, WINDOW, KEYS) + part * each
    end = tl.minimum(begin + each, position + 1)
    if begin >= end:
        return
    g = tl.program_id(0) % TILES * HEAD_TILE + tl.arange(0, HEAD_TILE)
    valid = g < GROUP
    row = token * HEADS + kv_head * GROUP + g
    queries = _load_queries(q, row * DIM, valid, DIM, FIRST, SECOND)
    slot = tl.load(slots + token)
    top = tl.full((HEAD_TILE,), _LOWEST, tl.float32)
    total = tl.zeros((HEAD_TILE,), tl.float32)
    sums = _no_sums(HEAD_TILE, V_FIRST, V_SECOND)
    for first in tl.range(begin, end, KEYS, num_stages=STAGES):
        j = first + tl.arange(0, KEYS)
        visible = valid[:, None] & (j < end)[None, :]
        if WINDOW > 0:
            visible = visible & (j > position - WINDOW)[None, :]
        its_k = k + cache_block(slot, kv_head, first, slot_blocks, BLOCK, DIM)
        its_v = v + cache_block(slot, kv_head, first, slot_blocks, BLOCK, V_ROW)
        top, total, sums = _attend(
            queries, its_k, its_v, j, end, visible, top, total, sums,
            SCALE, SOFTCAP, DIM, FIRST, SECOND, V_ROW, V_DIM, V_FIRST, V_SECOND, SHARED, False,
        )  # fmt: skip
    at = row * PARTS + part
    tl.store(stats + at * 2, top, mask=valid)
    tl.store(stats + at * 2 + 1, total, mask=valid)
    c = tl.arange(0, V_FIRST)
    tl.store(partial + at[:, None] * V_DIM + c[None, :], sums[0], mask=valid[:, None] & (c < V_DIM)[None, :])
    if V_SECOND > 0:
        f = V_FIRST + tl.arange(0, V_SECOND)
        tl.store(partial + at[:, None] * V_DIM + f[None, :], sums[1], mask=valid[:, None] & (f < V_DIM)[None, :])


@triton.jit
def attention_combine(
    partial,
    stats,
    positions,
    sinks,
    y,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_PART: tl.constexpr,
):
    """Joins the parts of attention_decode: sinks f32[HEADS] or None -> y f32[T, HEADS, V_DIM]. Grid: (HEADS, T)."""
    head, token = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    length = position + 1 - _first_tile(position, WINDOW, KEYS)
    part = tl.arange(0, PARTS)
    used = part < tl.cdiv(length, _keys_of_part(position, WINDOW, PARTS, KEYS, MIN_PART))
    row = token * HEADS + head
    tops = tl.load(stats + (row * PARTS + part) * 2, mask=used, other=-float("inf"))
    totals = tl.load(stats + (row * PARTS + part) * 2 + 1, mask=used, other=0.0)
    top = tl.max(tops, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head) * _LOG2_E
        top = tl.maximum(top, sink)
    share = tl.exp2(tops - top)
    total = tl.sum(totals * share, axis=0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    c = tl.arange(0, V_PADDED)
    at = (row * PARTS + part)[:, None] * V_DIM + c[None, :]
    sums = tl.load(partial + at, mask=used[:, None] & (c < V_DIM)[None, :], other=0.0)
    tl.store(y + row * V_DIM + c, tl.sum(sums * share[:, None], axis=0) / total, mask=c < V_DIM)


@triton.jit
def attention_prefill(
    q,
    k,
    v,
    sinks,
    positions,
    slots,
    n_rows,
    y,
    slot_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_ROW: tl.constexpr,
    V_DIM: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    SHARED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """TOKENS tokens x HEAD_TILE query heads of one kv head walk over the keys together; operands as those of
    attention_decode and attention_combine. Tokens of a tile may be of several slots: the tile then walks over the keys
    of one slot after the other. q and y f32 or bf16. DESCRIPTORS: keys that all see come by tensor copies; for bf16
    caches of rows of DIM = V_ROW numbers, a power of two up to 128 that divides BLOCK, and for plain causal attention.
    Grid: (token tiles, KV_HEADS * head tiles)."""
    rows = tl.load(n_rows)
    # The last tokens first: they have the most keys.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * TOKENS >= rows:
        return
    ROWS: tl.constexpr = TOKENS * HEAD_TILE
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (GROUP + HEAD_TILE - 1) // HEAD_TILE
    kv_head = tl.program_id(1) // TILES
    m = tl.arange(0, ROWS)
    token = tile * TOKENS + m // HEAD_TILE
    g = tl.program_id(1) % TILES * HEAD_TILE + m % HEAD_TILE
    valid = (token < rows) & (g < GROUP)
    position = tl.load(positions + token, mask=token < rows, other=-1)
    slot = tl.load(slots + token, mask=token < rows, other=-1)
    head = kv_head * GROUP + g
    row = token.to(tl.int64) * HEADS + head
    queries = _load_queries(q, row * DIM, valid, DIM, FIRST, SECOND)
    if k.dtype.element_ty != tl.float32 and FIRST <= 128:  # wider ones take too many registers as bf16
        if SECOND > 0:
            queries = (queries[0].to(tl.bfloat16), queries[1].to(tl.bfloat16))
        else:
            queries = (queries[0].to(tl.bfloat16),)
    top = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = _no_sums(ROWS, V_FIRST, V_SECOND)
    first_slot = tl.min(tl.where(token < rows, slot, 0x7FFFFFFF), axis=0)
    last_slot = tl.max(slot, axis=0)
    # Of the loop behind that for keys that all see. Those of latents are too many to pass through registers.
    LAST_STAGES: tl.constexpr = 1 if WINDOW == 0 and SOFTCAP == 0 and not SHARED else STAGES
    seen_by_all = tl.min(tl.where(token < rows, position, 0x7FFFFFFE), axis=0) + 1
    if DESCRIPTORS:
        cache_rows = (last_slot + 1) * slot_blocks * (BLOCK // DIM)
        all_keys = tl.make_tensor_descriptor(k, [cache_rows, DIM], [DIM, 1], [KEYS, DIM])
        all_values = tl.make_tensor_descriptor(v, [cache_rows, DIM], [DIM, 1], [KEYS, DIM])
    for s in tl.range(first_slot, last_slot + 1):
        mine = slot == s
        end = tl.max(tl.where(mine, position, -1), axis=0) + 1
        begin = tl.min(tl.where(mine, _first_tile(position, WINDOW, KEYS), 0x7FFFFFFF), axis=0)
        if WINDOW == 0 and SOFTCAP == 0:  # with a softcap, two loops take too many registers
            begin = tl.where(first_slot == last_slot, seen_by_all // KEYS * KEYS, 0)
            if DESCRIPTORS:
                for first in tl.range(0, begin, KEYS, num_stages=STAGES):
                    at = cache_block_row(s, kv_head, first, slot_blocks, BLOCK, DIM)
                    keys, values = all_keys.load([at, 0]), all_values.load([at, 0])
                    top, total, first_sums = _attend_all(queries[0], keys, values, top, total, sums[0], SCALE)
                    sums = (first_sums,)
            else:
                for first in tl.range(0, begin, KEYS, num_stages=STAGES):
                    j = first + tl.arange(0, KEYS)
                    its_k = k + cache_block(s, kv_head, first, slot_blocks, BLOCK, DIM)
                    its_v = v + cache_block(s, kv_head, first, slot_blocks, BLOCK, V_ROW)
                    top, total, sums = _attend(
                        queries, its_k, its_v, j, end, mine, top, total, sums,
                        SCALE, SOFTCAP, DIM, FIRST, SECOND, V_ROW, V_DIM, V_FIRST, V_SECOND, SHARED, True,
                    )  # fmt: skip
        for first in tl.range(begin, end, KEYS, num_stages=LAST_STAGES):
            j = first + tl.arange(0, KEYS)
            visible = mine[:, None] & (j[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (j[None, :] > position[:, None] - WINDOW)
            its_k = k + cache_block(s, kv_head, first, slot_blocks, BLOCK, DIM)
            its_v = v + cache_block(s, kv_head, first, slot_blocks, BLOCK, V_ROW)
            top, total, sums = _attend(
                queries, its_k, its_v, j, end, visible, top, total, sums,
                SCALE, SOFTCAP, DIM, FIRST, SECOND, V_ROW, V_DIM, V_FIRST, V_SECOND, SHARED, False,
            )  # fmt: skip
    shrink = tl.full((ROWS,), 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=0.0) * _LOG2_E
        new_top = tl.maximum(top, sink)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.exp2(sink - new_top)
    c = tl.arange(0, V_FIRST)
    factor = (shrink / total)[:, None]
    first = (sums[0] * factor).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * V_DIM + c[None, :], first, mask=valid[:, None] & (c < V_DIM)[None, :])
    if V_SECOND > 0:
        f = V_FIRST + tl.arange(0, V_SECOND)
        second = (sums[1] * factor).to(y.dtype.element_ty)
        tl.store(y + row[:, None] * V_DIM + f[None, :], second, mask=valid[:, None] & (f < V_DIM)[None, :])


@triton.jit
def kv_append(
    x,
    cache,
    positions,
    slots,
    n_rows,
    slot_blocks,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x f32[rows, HEADS, DIM] to the cache's rows at slots[t], positions[t]. n_rows None: the grid has as many. Grid:
    (rows, HEADS)."""
    token, head = tl.program_id(0), tl.program_id(1)
    if n_rows is not None:
        if token >= tl.load(n_rows):
            return
    d = tl.arange(0, PADDED)
    at = cache_row(tl.load(slots + token), head, tl.load(positions + token), slot_blocks, BLOCK, DIM)
    numbers = tl.load(x + (token * HEADS + head) * DIM + d, mask=d < DIM)
    tl.store(cache + at + d, to_cache(numbers, cache.dtype.element_ty), mask=d < DIM)
