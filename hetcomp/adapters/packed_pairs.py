"""Low-rank pairs as programs read them: hetcomp_pair of runtime_lib/include/hetcomp/program.h.

``a`` lies row by row, so that h = a x is made of whole vectors of x; ``b`` in panels of 16 rows as the weight that it
is added to, so that b h is added to the sums of a panel while they are in registers. In 8 bits each row of a has
a scale, behind the rows of its matrix, and each row of b one, behind its panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.adapters.pair_stack import PairStack
from hetcomp.backends.adapted_ops import AdaptableWeight
from hetcomp.backends.packing import PANEL, to_bf16_bits, to_f32
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import WeightSource

RANK_STEP = 4  # HETCOMP_RANK_STEP
COLUMNS = 16  # HETCOMP_PAIR_COLUMNS

Bytes = npt.NDArray[np.uint8]
_Numbers = npt.NDArray[np.float32]


def viewed_pairs(stack: PairStack, view: WeightSource) -> PairStack:
    """The pairs of the weight that ``view`` cuts out of their parameter. The pairs are along what is multiplied with
    already, so that a transposed parameter needs nothing."""
    a, b = stack.a, stack.b
    if view.deinterleave:
        b = np.concatenate([b[:, ::2], b[:, 1::2]], axis=1)
    if view.head_split is not None:
        heads, start, stop = view.head_split
        b = b.reshape(heads, -1, stack.rank)[:, start:stop]
        a = np.broadcast_to(a, (heads, *a.shape[1:]))
        if view.head_transpose:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    if view.row_runs:
        b = _runs(b, 1, view.row_runs)
    return replace(stack, a=a, b=b)


def cut_pairs(stack: PairStack, cut: Cut) -> PairStack:
    """The pairs of a NUMA node's part of a weight: of its rows, or of its columns, whose sums the nodes add up."""
    a, b = stack.a, stack.b
    if cut.experts:
        a, b = (_runs(part, 0, cut.experts) for part in (a, b))
    if cut.axis == 0:
        a, b = (_runs(part, 0, cut.runs) for part in (a, b))
    elif cut.axis == -2:
        b = _runs(b, 1, cut.runs)
    else:
        a = _runs(a, 2, cut.runs)
    return replace(stack, a=a, b=b)


def fits(stack: PairStack, weight: AdaptableWeight) -> bool:
    """Whether the pairs have the weight's matrices, rows and columns."""
    n, _, columns = stack.a.shape
    return (n, stack.b.shape[1], columns) == (weight.matrices, weight.rows, weight.columns)


def packed_rank(rank: int) -> int:
    """The rank that is stored: the rest is zero."""
    return -(-rank // RANK_STEP) * RANK_STEP


def pack_pairs(stack: PairStack, weight: AdaptableWeight) -> tuple[Bytes, Bytes]:
    """The bytes of a and of b. Numbers are rounded to the weight's ``number_bytes``: f32, bf16, or 8 bits times the
    scale of their row."""
    rank = packed_rank(stack.rank)
    n, _, columns = stack.a.shape
    a = np.zeros((n, rank, -(-columns // COLUMNS) * COLUMNS), np.float32)
    a[:, : stack.rank, :columns] = stack.a
    rows = weight.rows // weight.halves
    panels = -(-rows // PANEL)
    b = np.zeros((n, weight.halves, panels * PANEL, rank), np.float32)
    b[:, :, :rows, : stack.rank] = stack.b.reshape(n, weight.halves, rows, stack.rank)
    in_panels = np.ascontiguousarray(b.reshape(n, weight.halves, panels, PANEL, rank).transpose(0, 2, 1, 4, 3))
    if weight.number_bytes > 1:
        return _bytes(a, weight.number_bytes), _bytes(in_panels, weight.number_bytes)
    of_a, of_b = (
        np.abs(a).max(axis=-1) / np.float32(127),
        to_bf16_bits(np.abs(in_panels).max(axis=-2) / np.float32(127)),
    )
    return (
        _with_scales(_eight_bits(a, of_a[..., None]), of_a),
        _with_scales(_eight_bits(in_panels, to_f32(of_b)[..., None, :]), of_b),
    )


def _eight_bits(numbers: _Numbers, scales: _Numbers) -> npt.NDArray[np.int8]:
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.rint(numbers / scales)
    return np.where(scales > 0, np.clip(rounded, -127, 127), 0).astype(np.int8)


def _with_scales(numbers: npt.NDArray[np.int8], scales: npt.NDArray[Any]) -> Bytes:
    """Blocks [.., rows, columns], each with its scales behind it."""
    blocks = numbers.reshape(*numbers.shape[:-2], -1).view(np.uint8)
    return np.concatenate([blocks, np.ascontiguousarray(scales).view(np.uint8)], axis=-1).reshape(-1)


def _bytes(numbers: _Numbers, number_bytes: int) -> Bytes:
    stored = numbers if number_bytes == 4 else to_bf16_bits(numbers)
    return stored.reshape(-1).view(np.uint8)


def _runs(numbers: _Numbers, axis: int, runs: Sequence[tuple[int, int]]) -> _Numbers:
    return np.concatenate([np.take(numbers, range(start, stop), axis) for start, stop in runs], axis)
