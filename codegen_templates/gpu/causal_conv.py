"""Causal convolution of each channel by itself over the rows of a sequence (hetcomp/ir/ops.py: CausalConv).

What was before a step's first row of a slot is in the slot's state f32[WIDTH - 1, CHANNELS], the last row last.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.functions import activate


@triton.jit
def _rows_back(slots, rows, slot, limit, WIDTH: tl.constexpr):
    """How many rows of ``slot`` i32[rows] the step has right before each of ``rows``, up to WIDTH - 1."""
    before = tl.zeros_like(rows)
    for back in tl.static_range(1, WIDTH):
        earlier = rows - back
        there = tl.load(slots + earlier, mask=(earlier >= 0) & (rows < limit), other=-1)
        before += (there == slot).to(tl.int32)
    return before


@triton.jit
def _row_before(
    x,
    state,
    rows,
    slot,
    position,
    before,
    least,
    c,
    mask,
    BACK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The rows BACK before ``rows``, f32[rows, channels c]: of the step or of the state, 0 before position 0. ``least``
    of ``before``, or less: whether the state has any of them."""
    mask = mask & (position >= BACK)[:, None]
    if BACK == 0:
        return tl.load(x + rows.to(tl.int64)[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0)
    else:
        step = (before >= BACK)[:, None]
        of_step = (rows - BACK).to(tl.int64)[:, None] * CHANNELS + c[None, :]
        of_state = (slot.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1 - BACK + before))[:, None] * CHANNELS + c[None, :]
        given = tl.load(x + of_step, mask=mask & step, other=0.0)
        if least < BACK:
            given = tl.where(step, given, tl.load(state + of_state, mask=mask & ~step, other=0.0))
        return given


@triton.jit
def _leave_state(
    x,
    state,
    slots,
    rows,
    slot,
    position,
    before,
    c,
    mask,
    limit,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes what the next step needs where ``rows`` are the last of their slot: rows of x, or of the old state where
    the step has fewer than WIDTH - 1. All is read before anything is written; nobody else may read the old state."""
    behind = tl.load(slots + rows + 1, mask=rows + 1 < limit, other=-1)
    mask = mask & (behind != slot)[:, None]
    kept = ()
    for i in tl.static_range(WIDTH - 1):
        kept = kept + (_row_before(x, state, rows, slot, position, before, 0, c, mask, WIDTH - 2 - i, CHANNELS, WIDTH),)
    tl.debug_barrier()
    for i in tl.static_range(WIDTH - 1):
        at = (slot.to(tl.int64) * (WIDTH - 1) + i)[:, None] * CHANNELS + c[None, :]
        tl.store(state + at, kept[i], mask=mask)


@triton.jit
def causal_conv(
    x,
    weight,
    bias,
    state,
    positions,
    slots,
    n_rows,
    y,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    """x f32[rows, CHANNELS], weight f32[CHANNELS, WIDTH], bias f32[CHANNELS] or None, state f32[slots, WIDTH - 1,
    CHANNELS] -> y f32[rows, CHANNELS]. Grid: (blocks of CHANNEL_TILE channels, blocks of ROW_TILE rows).

    n_rows None: exactly ROWS rows, of which a program has all, so that it can leave the new state too; otherwise the
    old one is read alone, for a program with later rows may be done before one with the first: see leave_state.
    """
    c = tl.program_id(0) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    rows = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    limit = ROWS
    if n_rows is not None:
        limit = tl.load(n_rows)
        if tl.program_id(1) * ROW_TILE >= limit:
            return
    slot = tl.load(slots + rows, mask=rows < limit, other=-2)
    position = tl.load(positions + rows, mask=rows < limit, other=0)
    before = _rows_back(slots, rows, slot, limit, WIDTH)
    if n_rows is None:
        least = 0
    else:
        least = tl.min(before, axis=0)
    mask = (rows < limit)[:, None] & (c < CHANNELS)[None, :]
    sums = tl.zeros((ROW_TILE, CHANNEL_TILE), tl.float32)
    for j in tl.static_range(WIDTH):
        factor = tl.load(weight + c * WIDTH + j, mask=c < CHANNELS, other=0.0)
        taps = _row_before(x, state, rows, slot, position, before, least, c, mask, WIDTH - 1 - j, CHANNELS, WIDTH)
        sums += factor[None, :] * taps
    if bias is not None:
        sums += tl.load(bias + c, mask=c < CHANNELS, other=0.0)[None, :]
    if FUNCTION != "none":
        sums = activate(sums, FUNCTION)
    tl.store(y + rows.to(tl.int64)[:, None] * CHANNELS + c[None, :], sums, mask=mask)
    if n_rows is None:
        _leave_state(x, state, slots, rows, slot, position, before, c, mask, limit, CHANNELS, WIDTH)


@triton.jit
def leave_state(
    x,
    state,
    positions,
    slots,
    n_rows,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
):
    """The state behind a causal_conv of n_rows[0] rows; operands as there. Grid: (blocks of CHANNEL_TILE channels,
    blocks of ROW_TILE rows, in which a program looks for the last rows of slots)."""
    limit = tl.load(n_rows)
    first = tl.program_id(1) * ROW_TILE
    if first >= limit:
        return
    end = tl.minimum(first + ROW_TILE, limit)
    if tl.load(slots) == tl.load(slots + limit - 1):  # one slot: its rows are neighbours
        first = tl.where(end == limit, end - 1, end)
    c = tl.program_id(0) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    for row in range(first, end):
        rows = row + tl.arange(0, 1)
        slot = tl.load(slots + rows)
        if tl.max(tl.load(slots + rows + 1, mask=rows + 1 < limit, other=-1) - slot, axis=0) != 0:
            position = tl.load(positions + rows)
            before = _rows_back(slots, rows, slot, limit, WIDTH)
            mask = (c < CHANNELS)[None, :]
            _leave_state(x, state, slots, rows, slot, position, before, c, mask, limit, CHANNELS, WIDTH)
