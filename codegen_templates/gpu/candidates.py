"""The most likely tokens of each row of logits, for sampling: every token whose logit is at least a bound.

A row's columns are groups of GROUP. The bound is one that WANTED groups reach, so that at least as many tokens do; only
groups that reach it are read again. A row's temperature says whether candidates are wanted: ``inverse_temperatures``
f32[rows], 0 where not. ``candidates`` i32[rows, WORDS] as runtime_lib/src/gpu/candidate_rows.h has it.
"""

import triton
import triton.language as tl

from hetcomp.codegen_templates.gpu.argmax import store_block, store_row


@triton.jit
def candidate_blocks(
    logits,
    inverse_temperatures,
    largest,
    first,
    sums,
    maxima,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """-> largest, first as argmax_blocks; of rows with a temperature also sums f32[rows, BLOCKS] of exp((logit -
    largest) * inverse temperature), and maxima f32[rows, BLOCKS * COLUMNS / GROUP], of each group. Grid: (rows,
    BLOCKS)."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits + row.to(tl.int64) * WIDTH + n, mask=n < WIDTH, other=float("-inf"))
    most = store_block(x, n, row * BLOCKS + block, largest, first, WIDTH)
    inverse = tl.load(inverse_temperatures + row)
    if inverse > 0:
        shift = tl.where(most > float("-inf"), most, 0.0)
        tl.store(sums + row * BLOCKS + block, tl.sum(tl.exp((x - shift) * inverse), axis=0))
        groups = tl.max(tl.reshape(x, (COLUMNS // GROUP, GROUP)), axis=1)
        of_block = (row * BLOCKS + block) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
        tl.store(maxima + of_block, groups)


@triton.jit
def candidate_bound(
    largest,
    first,
    sums,
    maxima,
    inverse_temperatures,
    best,
    chosen,
    candidates,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    WANTED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    MOST: tl.constexpr,
    SEGMENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """-> best as store_row; chosen i32[rows, MOST]: the groups that reach the bound, -1 behind them; the header of
    candidates: segments of SEGMENT groups in use (-1: none, as the row has no temperature, is not finite or has more
    than MOST such groups), the bound (only KEY_BITS of its bits, from the sign on, may be 1), the sum over the row.
    Grid: (rows)."""
    row = tl.program_id(0)
    x, most, finite = store_row(largest, first, row, best, BLOCKS, PADDED)
    inverse = tl.load(inverse_temperatures + row)
    header = candidates + row * WORDS
    if inverse > 0:
        b = tl.arange(0, PADDED)
        parts = tl.load(sums + row * BLOCKS + b, mask=b < BLOCKS, other=0.0)
        total = tl.sum(parts * tl.exp((x - most) * inverse), axis=0)
        g = tl.arange(0, GROUPS_PADDED)
        values = tl.load(maxima + row * GROUPS + g, mask=g < GROUPS, other=float("-inf"))
        bits = values.to(tl.int32, bitcast=True)
        # Whole numbers in the order of the logits.
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - KEY_BITS)
        bound = tl.full((), -(1 << (KEY_BITS - 1)), tl.int32)
        for i in tl.static_range(KEY_BITS):
            higher = bound + (1 << (KEY_BITS - 1 - i))
            reach = tl.sum((keys >= higher).to(tl.int32), axis=0)
            bound = tl.where(reach >= WANTED, higher, bound)
        bound = bound << (32 - KEY_BITS)
        least = tl.where(bound < 0, bound ^ 0x7FFFFFFF, bound).to(tl.float32, bitcast=True)
        reached = (values >= least).to(tl.int32)
        number = tl.sum(reached, axis=0)
        place = tl.cumsum(reached, axis=0) - 1
        tl.store(chosen + row * MOST + place, g, mask=(reached != 0) & (place < MOST))
        rest = tl.arange(0, MOST)
        tl.store(chosen + row * MOST + rest, -1, mask=rest >= number)
        good = finite & (number > 0) & (number <= MOST)
        tl.store(header, tl.where(good, (number + SEGMENT - 1) // SEGMENT, -1))
        tl.store(header + 1, least.to(tl.int32, bitcast=True))
        tl.store(header + 2, total.to(tl.int32, bitcast=True))
    else:
        tl.store(header, -1)
        tl.store(chosen + row * MOST + tl.arange(0, MOST), -1)


@triton.jit
def gather_candidates(
    logits,
    chosen,
    candidates,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PLACES: tl.constexpr,
    HEADER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """-> of candidates, of each segment: how many tokens reach the bound, and the first PLACES of them. Grid: (rows,
    SEGMENTS)."""
    row = tl.program_id(0)
    segment = tl.program_id(1)
    ours = chosen + row * MOST + segment * SEGMENT
    if tl.load(ours) < 0:
        return
    groups = tl.load(ours + tl.arange(0, SEGMENT))
    n = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (SEGMENT * GROUP,))
    mine = candidates + row * WORDS
    least = tl.load(mine + 1).to(tl.float32, bitcast=True)
    x = tl.load(logits + row.to(tl.int64) * WIDTH + n, mask=(n >= 0) & (n < WIDTH), other=float("-inf"))
    reached = (x >= least).to(tl.int32)
    place = tl.cumsum(reached, axis=0) - 1
    kept = (reached != 0) & (place < PLACES)
    at = HEADER + SEGMENTS + segment * PLACES + place
    tl.store(mine + HEADER + segment, tl.sum(reached, axis=0))
    tl.store(mine + at, x.to(tl.int32, bitcast=True), mask=kept)
    tl.store(mine + at + SEGMENTS * PLACES, n, mask=kept)
