"""Reads weights from the checkpoint and packs them, one matrix (expert, head) at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hetcomp.backends import packing
from hetcomp.ir.plan import Value, ValueKind


class WeightReader(Protocol):
    """What packing needs of a checkpoint: numbers as f32, f16, or bf16 bits in uint16."""

    def read(self, value: Value) -> packing.Numbers:
        """The whole weight, in the value's shape."""
        ...

    def read_expert(self, value: Value, expert: int) -> packing.Numbers:
        """One matrix of a weight whose first axis counts experts."""
        ...


class WeightPacker:
    """Packs weights as a stream of chunks. ``not_finite`` collects the names of weights with NaN or infinity."""

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader
        self.not_finite: list[str] = []

    def chunks(self, value: Value) -> Iterator[NDArray[np.uint8]]:
        """The packed bytes of ``value`` in order: one chunk an expert, otherwise one."""
        if value.kind is ValueKind.CONST:
            numbers = np.asarray(value.data, dtype=np.float32).reshape([int(d) for d in value.type.shape])
            yield self._pack(numbers, value)
        elif len(value.type.shape) == 3 and value.type.layout != packing.ROW_MAJOR and _by_expert(value):
            for expert in range(int(value.type.shape[0])):
                yield self._pack(self._reader.read_expert(value, expert), value)
        else:
            yield self._pack(self._reader.read(value), value)

    def _pack(self, numbers: packing.Numbers, value: Value) -> NDArray[np.uint8]:
        data, finite = packing.pack(numbers, value)
        name = value.fqn or value.id
        if not finite and name not in self.not_finite:
            self.not_finite.append(name)
        return data


def _by_expert(value: Value) -> bool:
    return value.view is None or value.view.head_split is None
