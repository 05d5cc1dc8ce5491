"""Types of the Plan's values: element types, symbolic dimensions, tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class DType(StrEnum):
    """Element type of an activation, state or unpacked weight.

    ``Q8`` is for KV caches only: rows in groups of 32, a group 32 int8 codes and one fp16 scale, the last one padded;
    in memory each slot's head has first the codes of all its rows [context][padded dim], then their scales
    [context][groups]. ``FP8`` is, too: e4m3fn without a scale, numbers beyond 448 are 448."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"
    U8 = "u8"
    Q8 = "q8"
    FP8 = "fp8"

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of so many elements."""
        if self is DType.Q8:
            return -(-elements // _Q8_GROUP) * (_Q8_GROUP + 2)
        return elements * _DTYPE_BYTES[self]


# Element types that KV caches can have, by falling size.
CACHE_DTYPES = (DType.F32, DType.BF16, DType.Q8, DType.FP8)

_Q8_GROUP = 32
_DTYPE_BYTES = {
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I32: 4,
    DType.I64: 8,
    DType.BOOL: 1,
    DType.U8: 1,
    DType.Q8: 1,
    DType.FP8: 1,
}


@dataclass(frozen=True, slots=True)
class Dim:
    """A symbolic dimension with its bounds (inclusive).

    The Plan knows ``T`` (tokens of a step), ``R`` (rows whose logits are wanted), ``slots`` (sequences of the KV cache,
    = max_batch), ``context`` (positions a sequence holds) and, where sequences cannot all be full at once,
    ``kv_tokens`` (positions that they hold together).
    """

    name: str
    min: int
    max: int


Shape = tuple[int | str, ...]

Q8_GROUP = 32  # elements that share a scale of 2 bytes


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape; a string in the shape names a :class:`Dim`.

    ``layout`` is ``row_major`` or the name of a packed layout (``hetcomp.backends.packing``).
    """

    dtype: DType
    shape: Shape
    layout: str = "row_major"

    def numel(self, dims: dict[str, int]) -> int:
        """Number of elements with the symbolic dimensions set to ``dims``."""
        return math.prod(d if isinstance(d, int) else dims[d] for d in self.shape)

    def bytes(self, dims: dict[str, int]) -> int:
        """Bytes of the row-major tensor with the symbolic dimensions set to ``dims``."""
        *rows, last = (d if isinstance(d, int) else dims[d] for d in self.shape or (1,))
        return math.prod(rows) * self.dtype.row_bytes(last)

    @property
    def is_cache(self) -> bool:
        """Of a state: whether it has a row for each position, as keys and values do; else a sequence's tokens have
        made it what it is (the state of a recurrence)."""
        return "context" in self.shape

    def __str__(self) -> str:
        layout = "" if self.layout == "row_major" else f" {self.layout}"
        return f"{self.dtype}[{', '.join(str(d) for d in self.shape)}]{layout}"
