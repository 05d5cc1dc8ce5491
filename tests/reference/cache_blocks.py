"""A KV cache as it lies on a GPU (codegen_templates/gpu/cache.py): blocks of positions with gaps for other states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.ir.kv_pool import BLOCK_POSITIONS, block_bytes
from hetcomp.ir.plan import Value, ValueKind

_GAP = 128  # bytes behind the states that are known


def cache_block(values: Sequence[Value]) -> int:
    """Bytes of a block with the states among ``values`` and some that nobody may touch."""
    return sum(block_bytes(v.type) for v in values if v.kind is ValueKind.STATE and v.type.is_cache) + _GAP


def slot_blocks(context: int) -> int:
    """Blocks of a slot."""
    return -(-context // BLOCK_POSITIONS)


def to_blocks(cache: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """[slots, heads, context, dim] as [slots, blocks, elements of ``block`` bytes]; between them all bits are set."""
    slots, heads, context, dim = cache.shape
    blocks = slot_blocks(context)
    stored = np.full((slots, blocks, block), 0xFF, np.uint8).view(cache.dtype)
    rows = np.zeros((slots, heads, blocks * BLOCK_POSITIONS, dim), cache.dtype)
    rows[:, :, :context] = cache
    rows = rows.reshape(slots, heads, blocks, BLOCK_POSITIONS, dim).swapaxes(1, 2)
    stored[..., : heads * BLOCK_POSITIONS * dim] = rows.reshape(slots, blocks, -1)
    return stored


def from_blocks(stored: npt.NDArray[Any], heads: int, context: int, dim: int) -> npt.NDArray[Any]:
    """The reverse of :func:`to_blocks`."""
    slots, blocks, _ = stored.shape
    used = stored[..., : heads * BLOCK_POSITIONS * dim].reshape(slots, blocks, heads, BLOCK_POSITIONS, dim)
    return used.swapaxes(1, 2).reshape(slots, heads, blocks * BLOCK_POSITIONS, dim)[:, :, :context]
