"""The error of converted weights is that of the whole matrix, however it is cut into pieces."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp import conversion_error, row_pieces
from hetcomp.backends import packing
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType


class Reader:
    def __init__(self, numbers) -> None:
        self.numbers = numbers

    def read(self, value):
        return self.numbers

    def read_expert(self, value, expert):
        return self.numbers[expert]

    def read_pieces(self, value, pieces, expert=None):
        yield from (row_pieces.take_rows(self.numbers if expert is None else self.numbers[expert], p) for p in pieces)


@pytest.mark.parametrize(
    ("shape", "layout"), [((300, 40), packing.PANELS), ((64, 32), packing.PANELS), ((2, 300, 40), packing.PANELS_GLU)]
)
def test_pieces(shape, layout, monkeypatch):
    monkeypatch.setattr(row_pieces, "_NUMBERS", 1)
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    value = Value("w", TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn="w", format="q4")
    matrix = numbers if len(shape) == 2 else numbers[0]
    data, _ = packing.pack(matrix, value)
    unpacked = packing.unpack_matrix(data, *matrix.shape, "q4", layout)
    error = np.linalg.norm(unpacked - matrix) / np.linalg.norm(matrix)
    assert 0.05 < error < 0.12
    assert f"is {error:.2e} (relative RMS)" in conversion_error._measured(value, Reader(numbers))
