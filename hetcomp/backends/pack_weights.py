"""Reads weights from the checkpoint and packs them, one matrix (expert) at a time, reading ahead."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hetcomp.backends import error_feedback, packing
from hetcomp.backends.quantiser import Numbers
from hetcomp.backends.repacking import repack
from hetcomp.errors import HetcompError
from hetcomp.ir.native_format import native_format
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.prefetch import prefetch
from hetcomp.quantised_numbers import QuantisedNumbers


class WeightReader(Protocol):
    """What packing needs of a checkpoint: numbers as f32, f16, or bf16 bits in uint16, in any strides, or codes and
    scales."""

    def read(self, value: Value) -> Numbers | QuantisedNumbers:
        """The whole weight, in the value's shape."""
        ...

    def read_expert(self, value: Value, expert: int) -> Numbers | QuantisedNumbers:
        """One matrix of a weight whose first axis counts experts."""
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
class _Part:
    """Numbers that are packed in one go: a whole weight, or one expert of it."""

    value: Value
    numbers: Numbers | QuantisedNumbers
    expert: int | None = None


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
        """The packed bytes of every value, in order: one chunk an expert, otherwise one.

        The next numbers are read while a chunk is packed; at most two matrices' numbers are held. Raises HetcompError
        if the checkpoint cannot be read.
        """
        with closing(prefetch(self._parts(values), "hetcomp-read")) as parts:
            yield from map(self._packed, parts)  # no name that keeps a chunk while the next is made

    def _parts(self, values: Sequence[Value]) -> Generator[_Part]:
        for value in values:
            if value.kind is ValueKind.CONST:
                numbers = np.asarray(value.data, dtype=np.float32).reshape([int(d) for d in value.type.shape])
                yield _Part(value, numbers)
            elif len(value.type.shape) == 3 and value.type.layout != packing.ROW_MAJOR and _by_expert(value):
                for expert in range(int(value.type.shape[0])):
                    yield _Part(value, self._reader.read_expert(value, expert), expert)
            else:
                yield _Part(value, self._reader.read(value))

    def pack(self, value: Value, numbers: Numbers | QuantisedNumbers) -> NDArray[np.uint8]:
        """The packed bytes of a plain weight's numbers, or of one expert's."""
        return self._packed(_Part(value, numbers))[1]

    def _packed(self, part: _Part) -> tuple[Value, NDArray[np.uint8]]:
        if isinstance(part.numbers, QuantisedNumbers):
            data, finite = self._taken_over(part, part.numbers) or self._quantised(part, part.numbers.to_f32())
        else:
            data, finite = self._quantised(part, part.numbers)
        name = part.value.fqn or part.value.id
        if not finite and name not in self.not_finite:
            self.not_finite.append(name)
        return part.value, data

    def _taken_over(self, part: _Part, numbers: QuantisedNumbers) -> tuple[NDArray[np.uint8], bool] | None:
        """The codes as they are; None where the weight's format cannot hold them."""
        value = part.value
        held = None if value.type.layout == packing.ROW_MAJOR else numbers.in_format(value.format)
        done = None if held is None else repack(held, value)
        native = native_format(value, value.type.layout)
        exact = native is not None and native.format == value.format and not native.inexact
        name = value.fqn or value.id
        if done is None and exact:
            raise HetcompError(f"Weight {name} was to be taken over as {value.format}, which cannot hold it.")
        if done is not None and exact and not done.exact and name not in self.rounded:
            self.rounded.append(name)
        return None if done is None else (done.data, done.finite)

    def _quantised(self, part: _Part, numbers: Numbers) -> tuple[NDArray[np.uint8], bool]:
        importance = self._importance.of(part.value, part.expert) if self._importance else None
        moments = self._importance.second_moments(part.value, part.expert) if self._importance else None
        fed = None if moments is None else _with_feedback(part.value, numbers, moments)
        return fed or packing.pack(numbers, part.value, importance=importance)


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


def _by_expert(value: Value) -> bool:
    return value.view is None or value.view.head_split is None
