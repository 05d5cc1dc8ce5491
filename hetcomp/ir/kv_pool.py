"""Memory of states: of the KV cache what sequences take of it that share a pool of positions, as an upper bound; of
recurrences one a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from hetcomp.ir.types import Q8_GROUP, DType, TensorType

# Positions whose rows lie together on a GPU, of all states; tiles of keys do not cross blocks of them
# (codegen_templates/gpu/cache.py).
BLOCK_POSITIONS = 64
# Physical memory that is mapped at once: what cuMemGetAllocationGranularity says of every GPU so far.
GRANULE_BYTES = 2 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class KvPool:
    """``tokens`` positions, which ``slots`` sequences of at most ``context`` hold together."""

    tokens: int
    slots: int
    context: int

    @classmethod
    def of(cls, dims: Mapping[str, int]) -> KvPool:
        """By a plan's bounds; without ``kv_tokens`` every slot may be full."""
        whole = dims["slots"] * dims["context"]
        return cls(min(whole, dims.get("kv_tokens", whole)), dims["slots"], dims["context"])

    @property
    def is_whole(self) -> bool:
        """Whether all slots may be full at once."""
        return self.tokens == self.slots * self.context

    @property
    def longest(self) -> int:
        """Positions of the longest sequence that there can be."""
        return min(self.tokens, self.context)

    def __str__(self) -> str:
        whole = f"{self.slots} x {self.context:,} positions"
        return whole if self.is_whole else f"{self.tokens:,} positions of at most {whole}"

    def bytes(self, state: TensorType, device: str) -> int:
        """Of a state in the memory of a device, ``cpu:0``, ``gpu:0``, .."""
        return self.gpu_bytes(state) if device.startswith("gpu") else self.cpu_bytes(state)

    @property
    def _in_use(self) -> int:
        """Slots with a position, at most."""
        return min(self.slots, self.tokens)

    def cpu_bytes(self, state: TensorType) -> int:
        """Of a state in the CPU's memory [slots, heads, context, dim]: pages are touched as rows are written, and each
        run of rows of a slot has at most two that it shares with what nobody has written. A recurrence's is whole."""
        if not state.is_cache:
            return self.slots * recurrent_bytes(state)
        whole = self.slots * self.context * sum(row_runs(state))
        if self.is_whole:
            return whole
        taken = self.tokens * sum(row_runs(state)) + self._in_use * len(row_runs(state)) * 2 * _PAGE_BYTES
        return min(whole, taken)

    def gpu_bytes(self, state: TensorType) -> int:
        """Of a state in a GPU's memory, without what granules waste (:attr:`granule_waste`). One more sequence than
        there are slots has one: the rows that pad a step write there."""
        if not state.is_cache:
            return (self.slots + 1) * recurrent_bytes(state)
        return (self._blocks() + 1) * block_bytes(state)

    @property
    def granule_waste(self) -> int:
        """On a GPU: each sequence's last granule, and that of the block for rows of nobody."""
        return 0 if self.is_whole else (self._in_use + 1) * GRANULE_BYTES

    def _blocks(self) -> int:
        """Blocks that the sequences have at most: in each one, all positions but one may be free."""
        whole = self.slots * -(-self.context // BLOCK_POSITIONS)
        return min(whole, (self.tokens + (BLOCK_POSITIONS - 1) * self._in_use) // BLOCK_POSITIONS)

    def gpu_memory(self, block: int) -> GpuCacheMemory:
        """How a cache lies on a GPU whose blocks have ``block`` bytes, all states together."""
        slot_blocks = -(-self.context // BLOCK_POSITIONS)
        whole = (self.slots * slot_blocks + 1) * block
        granules = self._blocks() * block // GRANULE_BYTES + self._in_use + -(-block // GRANULE_BYTES)
        if self.is_whole or granules * GRANULE_BYTES >= whole:
            return GpuCacheMemory(block, slot_blocks, whole, None)
        unit = GRANULE_BYTES // gcd(block, GRANULE_BYTES)  # blocks that fill granules
        slot_blocks = -(-slot_blocks // unit) * unit
        addresses = self.slots * slot_blocks * block + -(-block // GRANULE_BYTES) * GRANULE_BYTES
        return GpuCacheMemory(block, slot_blocks, addresses, granules)


@dataclass(frozen=True)
class GpuCacheMemory:
    """``slot_blocks`` blocks of ``block`` bytes a slot, and one more behind the last slot, which rows of nobody write
    to. ``addresses``: bytes of all; ``granules``: pieces of physical memory that are mapped there as slots grow, None:
    all of it is there from the start."""

    block: int
    slot_blocks: int
    addresses: int
    granules: int | None

    @property
    def bytes(self) -> int:
        """Physical memory."""
        return self.addresses if self.granules is None else self.granules * GRANULE_BYTES


# Copies of a sequence's states of recurrences that the runtime keeps in the CPU's memory, wherever the states are
# (runtime_lib/src/session.cpp).
CHECKPOINTS = 2


def recurrent_bytes(state: TensorType) -> int:
    """Of a sequence's state of a recurrence."""
    return state.bytes({"slots": 1})


def row_runs(state: TensorType) -> list[int]:
    """Bytes of a position's row in each run of rows that a slot of a state has in the CPU's memory; a recurrence's has
    none."""
    if not state.is_cache:
        return []
    _, heads, _, dim = state.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    if state.dtype is DType.Q8:  # codes, then scales
        groups = -(-dim // Q8_GROUP)
        return [groups * Q8_GROUP, groups * 2] * heads
    return [state.dtype.row_bytes(dim)] * heads


def block_bytes(state: TensorType) -> int:
    """Of the rows of a state for the positions of a block, all heads."""
    _, heads, _, dim = state.shape
    assert isinstance(heads, int) and isinstance(dim, int)
    return BLOCK_POSITIONS * heads * state.dtype.row_bytes(dim)
