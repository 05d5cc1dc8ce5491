"""A large matrix in pieces of rows: what is read, converted and packed at a time, and bounds what lies in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.quantised_numbers import QuantisedNumbers

# Runs of rows, start and stop, one after the other: one, or one of gate and one of up.
Runs = tuple[tuple[int, int], ...]

# Of a piece; 64 MB in f32.
_NUMBERS = 1 << 24
# Whole blocks of fp8, panels and words of zero points.
_ROWS = 128


def row_pieces(rows: int, columns: int, halves: int) -> list[Runs]:
    """The pieces of a matrix [rows, columns]: of each half the same rows of it. Each piece but the last has a multiple
    of _ROWS."""
    each = rows // halves
    step = max(_ROWS, _NUMBERS // (columns * halves) // _ROWS * _ROWS)
    return [
        tuple((half * each + start, half * each + min(start + step, each)) for half in range(halves))
        for start in range(0, each, step)
    ]


def take_rows(numbers: npt.NDArray[Any] | QuantisedNumbers, runs: Runs) -> npt.NDArray[Any] | QuantisedNumbers:
    """Rows of a matrix [N, K]; of one run nothing is copied."""
    if isinstance(numbers, QuantisedNumbers):
        return numbers.cut(0, runs)
    taken = [numbers[start:stop] for start, stop in runs]
    return taken[0] if len(taken) == 1 else np.concatenate(taken)
