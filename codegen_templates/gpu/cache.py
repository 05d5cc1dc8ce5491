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


@triton.jit
def cache_block_row(slot, head, position, slot_blocks, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """The row of a head at a position, counted in rows of DIM elements, which divides BLOCK, from the state's first."""
    block = position // BLOCK_POSITIONS
    return (slot_blocks * slot + block) * (BLOCK // DIM) + (head - block) * BLOCK_POSITIONS + position


@triton.jit
def from_cache(stored):
    """What was read of a cache as numbers, bf16 or f32: codes of e4m3, which u8 stands for, become bf16, exactly."""
    if stored.dtype == tl.uint8:
        # The byte on top, its exponent and mantissa moved to those of f32, whose bias is larger by 120.
        bits = ((stored.to(tl.int32) << 24) >> 4) & -0x78100000  # 0x87F00000
        numbers = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return tl.where((stored & 0x7F) == 0x7F, float("nan"), numbers).to(tl.bfloat16)
    else:
        return stored


@triton.jit
def to_cache(numbers, TYPE: tl.constexpr):
    """f32 as a cache of TYPE stores it. u8 stands for e4m3: to nearest, ties to even, 448 what is beyond it, NaN what
    is not finite."""
    if TYPE == tl.uint8:
        bits = numbers.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        cut = tl.minimum(magnitude.to(tl.float32, bitcast=True), 448.0)
        whole = cut.to(tl.int32, bitcast=True)
        normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9, which is the last place of numbers around 2^14.
        tiny = (cut + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(cut < 0.015625, tiny, normal)
        code = tl.where(magnitude < 0x7F800000, code, 0x7F)
        return tl.where(bits < 0, code | 0x80, code).to(tl.uint8)
    else:
        return numbers.to(TYPE)
