"""Reads the parts of weights that are cut over NUMA nodes out of the whole ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hetcomp.backends.pack_weights import WeightReader
from hetcomp.backends.packing import Numbers
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import Value


class CutReader:
    """A WeightReader that also knows parts. ``cuts``: by id of a part the checkpoint's weight, and the cut."""

    def __init__(self, reader: WeightReader, cuts: Mapping[str, tuple[Value, Cut]]) -> None:
        self._reader = reader
        self._cuts = cuts

    def read(self, value: Value) -> Numbers:
        """The weight, or the part of one, in the value's shape."""
        if value.id not in self._cuts:
            return self._reader.read(value)
        whole, cut = self._cuts[value.id]
        if cut.zero:
            return np.zeros([int(d) for d in value.type.shape], np.float32)
        return _cut(self._reader.read(whole), cut)

    def read_expert(self, value: Value, expert: int) -> Numbers:
        """Matrix ``expert`` of the weight, or of the part of one."""
        if value.id not in self._cuts:
            return self._reader.read_expert(value, expert)
        whole, cut = self._cuts[value.id]
        if cut.axis != 0:
            return _cut(self._reader.read_expert(whole, expert), cut)
        here = [e for start, stop in cut.runs for e in range(start, stop)]
        return self._reader.read_expert(whole, here[expert])


def _cut(numbers: Numbers, cut: Cut) -> Numbers:
    along = np.moveaxis(numbers, cut.axis, 0)
    pieces = [along[start:stop] for start, stop in cut.runs]
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return np.moveaxis(joined, 0, cut.axis)  # type: ignore[return-value]  # numpy loses the dtype of a union
