"""Where rows of the KV cache lie on a GPU.

All states share one memory: [slots][blocks of positions][states][heads][BLOCK_POSITIONS][dim]. A sequence that grows
takes the bytes behind its last ones (hetcomp/ir/kv_pool.py says how many). BLOCK: elements of a block, all states
together; slot_blocks: blocks that a slot has.
"""

import triton
import triton.language as tl

# As in hetcomp/ir/kv_pool.py; tiles of keys do not cross blocks.
BLOCK_POSITIONS: tl.constexpr = tl.constexpr(64)


@triton.jit
def cache_row(slot, head, position, slot_blocks, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Where, in elements behind the state's first, a head's row at a position begins."""
    block = slot_blocks.to(tl.int64) * slot + position // BLOCK_POSITIONS
    return block * BLOCK + (head * BLOCK_POSITIONS + position % BLOCK_POSITIONS) * DIM


@triton.jit
def cache_block(slot, head, position, slot_blocks, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """What to add to a state's address so that DIM * j is the row of a head at position j, for those of one block with
    ``position``."""
    block = position // BLOCK_POSITIONS
    wide = slot_blocks.to(tl.int64) * slot + block
    return wide * BLOCK + (head - block).to(tl.int64) * (BLOCK_POSITIONS * DIM)
