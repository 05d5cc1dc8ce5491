"""Reads weights from the checkpoint and packs them, a matrix (expert) or some rows of it at a time, reading ahead."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hetcomp.backends import error_feedback, packing
from hetcomp.backends.quantiser import Numbers
from hetcomp.backends.repacking import repack
from hetcomp.errors import HetcompError
from hetcomp.ir.layouts import has_act_order, has_gate_up, without_act_order
from hetcomp.ir.native_format import native_format
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.prefetch import prefetch
from hetcomp.quantised_numbers import QuantisedNumbers
from hetcomp.row_pieces import Runs, row_pieces


class WeightReader(Protocol):
    """What packing needs of a checkpoint: numbers as f32, f16, or bf16 bits in uint16, in any strides, or codes and
    scales."""

    def read(self, value: Value) -> Numbers | QuantisedNumbers:
        """The whole weight, in the value's shape."""
        ...

    def read_expert(self, value: Value, expert: int) -> Numbers | QuantisedNumbers:
        """One matrix of a weight whose first axis counts experts."""
        ...

    def read_pieces(
        self, value: Value, pieces: Sequence[Runs], expert: int | None = None
    ) -> Generator[Numbers | QuantisedNumbers]:
        """These rows of a matrix, or of one expert's, a piece at a time: what :meth:`read` or :meth:`read_expert` gives
        there, without all of it in memory where the checkpoint can be read so."""
        ...


class ColumnImportance(Protocol):
    """How much the error of each column of a weight counts: :class:`hetcomp.backends.importance.Importance`."""

    def of(self, value: Value, expert: int | None = None) -> NDArray[np.float32] | None:
        """f32 [K], or [E, K] if all experts of ``value`` are asked for; None: all alike."""
        ...

    def second_moments(self, value: Value, expert: int | None = None) -> NDArray[np.float32] | None:
        """f32 [K, K] of the matrix or of one expert of ``value``; None if nothing is known."""
        ...


class Packer(Protocol):
    """Where the bytes of weights come from."""

    @property
    def not_finite(self) -> Sequence[str]:
        """Names of the weights packed so far that are not usable: NaN, infinity, numbers too large for the format."""
        ...

    @property
    def rounded(self) -> Sequence[str]:
        """Names of quantised weights packed so far whose scales were expected to fit the format, but were rounded."""
        ...

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """The packed bytes of every value, in order, in chunks of any size."""
        ...


@dataclass(frozen=True)
class Part:
    """Numbers that are packed in one go: a whole weight, one ``expert`` of it, or some rows of either, which ``packed``
    describes as if they were all. ``order``: of the columns, where it goes behind these rows."""

    value: Value
    numbers: Numbers | QuantisedNumbers
    packed: Value
    expert: int | None = None
    order: NDArray[np.int32] | None = None


class WeightPacker:
    """Packs weights as a stream of chunks. ``not_finite`` collects the names of weights with NaN or infinity, or with
    numbers too large for their format.

    importance: how much the error of each column counts; all alike if None."""

    def __init__(self, reader: WeightReader, importance: ColumnImportance | None = None) -> None:
        self._reader = reader
        self._importance = importance
        self.not_finite: list[str] = []
        self.rounded: list[str] = []

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """The packed bytes of every value, in order: one chunk an expert, otherwise one; of large matrices several.

        The next numbers are read while a chunk is packed; at most those of two chunks are held. Raises HetcompError
        if the checkpoint cannot be read.
        """
        with closing(prefetch(self._all_parts(values), "hetcomp-read")) as parts:
            yield from map(self._chunk, parts)  # no name that keeps a chunk while the next is made

    def _chunk(self, part: Part) -> tuple[Value, NDArray[np.uint8]]:
        return part.value, self.pack(part)

    def _all_parts(self, values: Sequence[Value]) -> Generator[Part]:
        for value in values:
            if value.kind is ValueKind.CONST:
                numbers = np.asarray(value.data, dtype=np.float32).reshape([int(d) for d in value.type.shape])
                yield Part(value, numbers, value)
            elif has_experts(value):
                for expert in range(int(value.type.shape[0])):
                    yield from self.parts(value, expert)
            else:
                yield from self.parts(value)

    def parts(self, value: Value, expert: int | None = None) -> Generator[Part]:
        """The numbers of a weight, or of one expert's matrix, as they are packed one after the other. Raises
        HetcompError if they cannot be read."""
        pieces = self._pieces(value, expert)
        if len(pieces) > 1:
            numbers = self._reader.read_pieces(value, pieces, expert)
            yield from map(partial(_piece, value, expert), numbers, (runs is pieces[-1] for runs in pieces))
        elif expert is None:
            yield Part(value, self._reader.read(value), value)
        else:
            yield Part(value, self._reader.read_expert(value, expert), value, expert)

    def _pieces(self, value: Value, expert: int | None) -> list[Runs]:
        """Of the matrix or expert; none if it is packed whole."""
        layout = value.type.layout
        if layout == packing.ROW_MAJOR or len(value.type.shape) != (2 if expert is None else 3):
            return []
        if value.format in error_feedback.FORMATS and self._moments(value, expert) is not None:
            return []  # which are decomposed for each matrix that they guide
        rows, columns = (int(d) for d in value.type.shape[-2:])
        return row_pieces(rows, columns, 2 if has_gate_up(layout) else 1)

    def _moments(self, value: Value, expert: int | None) -> NDArray[np.float32] | None:
        return self._importance.second_moments(value, expert) if self._importance else None

    def pack(self, part: Part) -> NDArray[np.uint8]:
        """The packed bytes of a part."""
        if isinstance(part.numbers, QuantisedNumbers):
            data, finite = self._taken_over(part, part.numbers) or self._quantised(part, part.numbers.to_f32())
        else:
            data, finite = self._quantised(part, part.numbers)
        name = part.value.fqn or part.value.id
        if not finite and name not in self.not_finite:
            self.not_finite.append(name)
        return data if part.order is None else np.concatenate([data, part.order.view(np.uint8)])

    def _taken_over(self, part: Part, numbers: QuantisedNumbers) -> tuple[NDArray[np.uint8], bool] | None:
        """The codes as they are; None where the weight's format cannot hold them."""
        value = part.value
        held = None if value.type.layout == packing.ROW_MAJOR else numbers.in_format(value.format)
        done = None if held is None else repack(held, part.packed)
        native = native_format(value, value.type.layout)
        exact = native is not None and native.format == value.format and not native.inexact
        name = value.fqn or value.id
        if done is None and exact:
            raise HetcompError(f"Weight {name} was to be taken over as {value.format}, which cannot hold it.")
        if done is not None and exact and not done.exact and name not in self.rounded:
            self.rounded.append(name)
        return None if done is None else (done.data, done.finite)

    def _quantised(self, part: Part, numbers: Numbers) -> tuple[NDArray[np.uint8], bool]:
        importance = self._importance.of(part.value, part.expert) if self._importance else None
        moments = self._moments(part.value, part.expert)
        fed = None if moments is None else _with_feedback(part.packed, numbers, moments)
        return fed or packing.pack(numbers, part.packed, importance=importance)


def _piece(value: Value, expert: int | None, numbers: Numbers | QuantisedNumbers, last: bool) -> Part:
    """Rows of a matrix, whose order of columns lies behind the last of them."""
    layout, order = value.type.layout, None
    if isinstance(numbers, QuantisedNumbers) and numbers.order is not None and has_act_order(layout):
        layout, order = without_act_order(layout), numbers.order if last else None
        numbers = replace(numbers, order=None)
    packed = replace(value, type=replace(value.type, shape=numbers.shape, layout=layout))
    return Part(value, numbers, packed, expert, order)


def has_experts(value: Value) -> bool:
    """Whether a weight is packed one expert's matrix after the other."""
    of_experts = value.view is None or value.view.head_split is None
    return len(value.type.shape) == 3 and value.type.layout != packing.ROW_MAJOR and of_experts


def _with_feedback(value: Value, raw: Numbers, moments: NDArray[np.float32]) -> tuple[NDArray[np.uint8], bool] | None:
    """As packing.pack, or None for a format that does without feedback, for text that says nothing (an expert that saw
    no token has the moments of all) and for numbers that are not finite, which would spread."""
    if value.format not in error_feedback.FORMATS or not moments.any():
        return None
    numbers = packing.to_f32(raw)
    if not np.isfinite(numbers).all():
        return None
    each = numbers.reshape(-1, *numbers.shape[-2:])
    done = [error_feedback.pack_with_feedback(matrix, value, moments) for matrix in each]
    return np.concatenate([data for data, _ in done]), all(finite for _, finite in done)
