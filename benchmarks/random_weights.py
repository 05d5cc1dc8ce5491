"""Random weights in packed bytes, without numbers for each of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hetcomp.backends import packing
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.routing_trace import RoutingTrace

_PANELS = 8  # different panels that a weight is made of
_CHUNK_BYTES = 64 << 20
STD = 0.02  # standard deviation of weights


class RandomPacker:
    """Packed bytes of normal numbers of standard deviation ``std``, repeated; norm weights are ones."""

    not_finite: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    trace: RoutingTrace | None = None  # that its models follow

    def __init__(self, std: float = STD) -> None:
        self._std = std

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """As :meth:`hetcomp.backends.pack_weights.WeightPacker.chunks`."""
        for value in values:
            if value.kind is ValueKind.CONST or value.type.layout == packing.ROW_MAJOR:
                shape = [int(d) for d in value.type.shape]
                numbers = np.ones(shape) if value.data is None else np.asarray(value.data).reshape(shape)
                yield value, packing.pack(numbers.astype(np.float32), value)[0]
                continue
            yield from repeated(value, _panels(int(value.type.shape[-1]), str(value.format), self._std))


def repeated(value: Value, pattern: NDArray[np.uint8]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
    """The bytes of ``value``: ``pattern`` again and again, in pieces."""
    size = packing.packed_bytes(value)
    piece = np.tile(pattern, min(-(-size // pattern.size), max(1, _CHUNK_BYTES // pattern.size)))
    for at in range(0, size, piece.size):
        yield value, piece[: size - at]


@cache
def _panels(columns: int, weight_format: str, std: float) -> NDArray[np.uint8]:
    shape = (_PANELS * packing.PANEL, columns)
    value = Value("w", TensorType(DType.F32, shape, packing.PANELS), ValueKind.WEIGHT, fqn="w", format=weight_format)
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(std)
    return packing.pack(numbers, value, threads=1)[0]
