"""Where the rows of a weight lie in files: what is repacked when a model is loaded instead of being packed before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
# A place is the number of a file and a byte in it, in one number.
_FILE_BITS = 48
# Of a block of columns: how many, and its bytes (runtime_lib/src/quantise/row_encoding.h). Codes of safetensors: one.
_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "codes": (1, 1),
    "int8": (1, 1),
    "nibbles": (2, 1),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q4_0": (32, 18),
    "MXFP4": (32, 17),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
WORD = 4
SCALE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "E8M0": 1}


def places(file: int, offset: int, stride: int, shape: Sequence[int]) -> Places:
    """Places of so many rows in ``shape``, each ``stride`` bytes behind the one before."""
    rows = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)
    return (np.int64(file) << _FILE_BITS) + offset + rows * stride


@dataclass(frozen=True)
class StoredScales:
    """Scales that lie apart from their codes: of each row ``places`` [.., N, 1], one for so many ``columns``. ``type``:
    of SCALE_BYTES. ``line``: bytes from a row's scale to its next; 0: they lie side by side."""

    type: str
    columns: int
    places: Places
    line: int = 0


@dataclass(frozen=True)
class StoredRows:
    """The rows of a weight in the order in which it has them. ``places``: [.., N, 1] of a packed matrix's rows with
    ``columns`` numbers each; of other weights those of their numbers, in the weight's shape, and ``columns`` is 1.
    ``numbers``: a type of numbers, or an encoding of codes, as the runtime calls them. ``files``: by their numbers.
    ``line``: bytes from a row's WORD bytes of codes to its next; 0: they lie side by side."""

    numbers: str
    files: tuple[Path, ...]
    places: Places
    columns: int
    scales: StoredScales | None = None
    line: int = 0

    @property
    def kind(self) -> tuple[str, int, int, tuple[str, int, int] | None]:
        """What rows of one weight have in common."""
        scales = None if self.scales is None else (self.scales.type, self.scales.columns, self.scales.line)
        return self.numbers, self.columns, self.line, scales

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's numbers, or codes."""
        return row_bytes(self.numbers, self.columns)

    def cut(self, axis: int, runs: Sequence[tuple[int, int]]) -> StoredRows | None:
        """The runs (start, stop) of an axis of the weight, one after the other; None where one of columns begins within
        a block, or there are several."""
        if axis == -1 and self.places.shape[-1] == 1 and self.columns > 1:
            return self._cut_columns(*runs[0]) if len(runs) == 1 else None
        scales = self.scales and replace(self.scales, places=_taken(self.scales.places, axis, runs))
        return replace(self, places=_taken(self.places, axis, runs), scales=scales)

    def _cut_columns(self, start: int, stop: int) -> StoredRows | None:
        block, size = _BLOCKS[self.numbers]
        group = self.scales.columns if self.scales else 1
        if start % block or start % group or (stop % block and stop != self.columns):
            return None
        before = start // block * size
        if self.line and (before % WORD or row_bytes(self.numbers, stop - start) % WORD):
            return None
        moved = self.scales and replace(
            self.scales,
            places=self.scales.places + start // group * (self.scales.line or SCALE_BYTES[self.scales.type]),
        )
        ahead = before // WORD * self.line if self.line else before
        return replace(self, places=self.places + ahead, columns=stop - start, scales=moved)


def row_bytes(numbers: str, columns: int) -> int:
    """Bytes of ``columns`` of them."""
    block, size = _BLOCKS[numbers]
    return -(-columns // block) * size


def _taken(array: Places, axis: int, runs: Sequence[tuple[int, int]]) -> Places:
    along = np.moveaxis(array, axis, 0)
    return np.moveaxis(np.concatenate([along[start:stop] for start, stop in runs]), 0, axis)


def runs_of(rows: Places) -> Iterator[tuple[int, int, int, int]]:
    """Rows [N] in order as runs: the file's number, the first row's byte, how many rows, and the bytes from one to the
    next."""
    steps = np.diff(rows)
    ends = np.append(np.flatnonzero(np.diff(steps)) + 1, len(steps))  # where a step is the last of its kind
    at = 0
    while at < len(rows):
        count, step = 1, 0
        if at < len(steps) and 0 <= steps[at] < 1 << (_FILE_BITS - 1):
            step = int(steps[at])
            count = int(ends[np.searchsorted(ends, at, side="right")]) - at + 1
        yield int(rows[at] >> _FILE_BITS), int(rows[at] & ((1 << _FILE_BITS) - 1)), count, step
        at += count
