"""Packs what is quantised already: codes and scales into panels, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends import k_blocks, packing, quantiser
from hetcomp.errors import HetcompError
from hetcomp.ir.layouts import has_act_order, has_gate_up
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import K_SCALES, ZERO_POINTS, QuantisedNumbers


@dataclass(frozen=True)
class Repacked:
    """``finite``: all are numbers that the format can say; ``exact``: no scale was rounded (to fp16)."""

    data: packing.Bytes
    finite: bool
    exact: bool


def repack(numbers: QuantisedNumbers, value: Value) -> Repacked | None:
    """The packed bytes of the weight ``value``, or of one or several of its matrices; None if the layout cannot hold
    them: rows of a panel in fp8 share their scales, groups of a K block its fp16 numbers, and an order of columns is
    that of one layout.

    numbers: in the value's format, [N, K] or [E, N, K]. Raises HetcompError if the shape does not fit.
    """
    rows, columns = (int(d) for d in value.type.shape[-2:])
    if value.format != numbers.format or numbers.shape[-2:] != (rows, columns):
        raise HetcompError(
            f"Weight {value.fqn or value.id} is {value.format} [{rows}, {columns}], but its codes are "
            f"{numbers.format} {list(numbers.shape)}."
        )
    layout = value.type.layout
    if has_act_order(layout) != (numbers.order is not None):
        return None
    halves = 2 if has_gate_up(layout) else 1
    if numbers.format == "fp8" and not _panels_share_scales(numbers.scales, halves):
        return None
    if numbers.format in K_SCALES and not k_blocks.whole_blocks(numbers.scales, numbers.format):
        return None
    each = packing.matrix_bytes(rows, columns, numbers.format, layout)
    panels = each - packing.order_bytes(columns, layout)
    stack = [numbers] if numbers.ndim == 2 else [numbers[i] for i in range(len(numbers))]
    target, finite = np.empty(len(stack) * each, np.uint8), True
    for i, matrix in enumerate(stack):
        finite &= _usable(matrix)
        quantiser.repack(matrix, halves == 2, target[i * each : i * each + panels])
        if matrix.order is not None:
            target[i * each + panels : (i + 1) * each].view(np.int32)[:columns] = matrix.order
    return Repacked(target, finite, _exact(numbers))


def _exact(numbers: QuantisedNumbers) -> bool:
    if numbers.format not in ("q4", "q4z", "q8"):
        return True
    scales = _plain(numbers.scales)
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())


def _plain(scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Without zero points."""
    return scales["scale"] if scales.dtype == ZERO_POINTS else scales


def _panels_share_scales(scales: npt.NDArray[Any], halves: int) -> bool:
    by_half = scales.reshape(-1, halves, scales.shape[-2] // halves, scales.shape[-1])
    firsts = by_half[:, :, :: packing.PANEL]
    return np.array_equal(np.repeat(firsts, packing.PANEL, axis=2)[:, :, : by_half.shape[2]], by_half)


def _usable(matrix: QuantisedNumbers) -> bool:
    """Without NaN, and with scales that the format can say."""
    if matrix.format in K_SCALES:
        return k_blocks.finite(matrix.scales, matrix.format)
    if matrix.format == "mxfp4":
        return not (matrix.scales == 255).any()
    if matrix.format == "fp8":
        return bool(np.isfinite(matrix.scales).all()) and not ((matrix.codes & 127) == 127).any()
    scales = _plain(matrix.scales)
    return not (np.abs(scales) >= 65520).any() and not np.isnan(scales).any()
