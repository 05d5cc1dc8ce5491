"""The parts of weights that are cut over NUMA nodes or a GPU: their numbers and the importance of their columns."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hetcomp.backends.importance import Importance
from hetcomp.backends.pack_weights import WeightReader
from hetcomp.backends.quantiser import Numbers
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import QuantisedNumbers
from hetcomp.row_pieces import Runs, take_rows


class CutReader:
    """A WeightReader that also knows parts. ``cuts``: by id of a part the checkpoint's weight, and the cut."""

    def __init__(self, reader: WeightReader, cuts: Mapping[str, tuple[Value, Cut]]) -> None:
        self._reader = reader
        self._cuts = cuts

    def read(self, value: Value) -> Numbers | QuantisedNumbers:
        """The weight, or the part of one, in the value's shape."""
        if value.id not in self._cuts:
            return self._reader.read(value)
        whole, cut = self._cuts[value.id]
        if cut.zero:
            return np.zeros([int(d) for d in value.type.shape], np.float32)
        numbers = self._reader.read(whole)
        if cut.experts:
            numbers = _cut(numbers, Cut(0, cut.experts))
        return _cut(numbers, cut)

    def read_expert(self, value: Value, expert: int) -> Numbers | QuantisedNumbers:
        """Matrix ``expert`` of the weight, or of the part of one."""
        if value.id not in self._cuts:
            return self._reader.read_expert(value, expert)
        whole, cut = self._cuts[value.id]
        numbers = self._reader.read_expert(whole, _whole_expert(cut, expert))
        return numbers if cut.axis == 0 else _cut(numbers, cut)

    def read_pieces(
        self, value: Value, pieces: Sequence[Runs], expert: int | None = None
    ) -> Generator[Numbers | QuantisedNumbers]:
        """See WeightReader: of the weight, or of the part of one."""
        if value.id not in self._cuts:
            yield from self._reader.read_pieces(value, pieces, expert)
            return
        whole, cut = self._cuts[value.id]
        if cut.zero:
            zeros = self.read(value)
            yield from (take_rows(zeros if expert is None else zeros[expert], runs) for runs in pieces)
            return
        if expert is not None:
            expert = _whole_expert(cut, expert)
        if cut.axis == -2:
            pieces = [_runs_of_whole(cut, runs) for runs in pieces]
        for numbers in self._reader.read_pieces(whole, pieces, expert):
            yield _cut(numbers, cut) if cut.axis == -1 else numbers


class CutImportance:
    """The importance of weights that also knows parts; arguments as :class:`CutReader`'s."""

    def __init__(self, importance: Importance, cuts: Mapping[str, tuple[Value, Cut]]) -> None:
        self._importance = importance
        self._cuts = cuts

    def of(self, value: Value, expert: int | None = None) -> npt.NDArray[np.float32] | None:
        """As :meth:`Importance.of`."""
        if value.id not in self._cuts:
            return self._importance.of(value, expert)
        whole, cut = self._cuts[value.id]
        expert = None if expert is None else _whole_expert(cut, expert)
        columns = self._importance.of(whole, expert)
        return columns if columns is None else _columns_of(cut, columns)

    def second_moments(self, value: Value, expert: int | None = None) -> npt.NDArray[np.float32] | None:
        """As :meth:`Importance.second_moments`; of a part that is cut along its columns, of these columns."""
        if value.id not in self._cuts:
            return self._importance.second_moments(value, expert)
        whole, cut = self._cuts[value.id]
        expert = None if expert is None else _whole_expert(cut, expert)
        moments = self._importance.second_moments(whole, expert)
        return moments if moments is None else _columns_of(cut, _columns_of(cut, moments).swapaxes(-1, -2))


def _columns_of(cut: Cut, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of the last axis what the part has of the weight's columns."""
    if cut.zero or cut.axis != -1:
        return numbers
    return np.concatenate([numbers[..., start:stop] for start, stop in cut.runs], axis=-1)


def _whole_expert(cut: Cut, expert: int) -> int:
    """Number in the whole weight of the part's expert."""
    runs = cut.runs if cut.axis == 0 else cut.experts
    return [e for start, stop in runs for e in range(start, stop)][expert] if runs else expert


def _runs_of_whole(cut: Cut, runs: Runs) -> Runs:
    """Rows of a part that is cut along its rows, as runs of the weight's."""
    found, first = [], 0
    for begin, end in cut.runs:
        found += [
            (begin + max(start, first) - first, begin + min(stop, first + end - begin) - first)
            for start, stop in runs
            if start < first + end - begin and stop > first
        ]
        first += end - begin
    return tuple(found)


def _cut(numbers: Numbers | QuantisedNumbers, cut: Cut) -> Numbers | QuantisedNumbers:
    if isinstance(numbers, QuantisedNumbers):
        return numbers.cut(cut.axis, cut.runs)
    along = np.moveaxis(numbers, cut.axis, 0)
    pieces = [along[start:stop] for start, stop in cut.runs]
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return np.moveaxis(joined, 0, cut.axis)  # type: ignore[return-value]  # numpy loses the dtype of a union
