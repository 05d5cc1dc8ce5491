"""Packs what is quantised already: codes and scales into panels, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends import k_blocks, packing
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import GROUPS, K_SCALES, OFFSETS, ZERO_POINTS, QuantisedNumbers

_PADDING = OFFSETS | {"mxfp4": 0, "fp8": 0, "q4z": 0}  # codes beyond the matrix
_ROWS = 256  # at once: the copies that are made on the way stay in the caches


@dataclass(frozen=True)
class Repacked:
    """``finite``: all are numbers that the format can say; ``exact``: no scale was rounded (to fp16)."""

    data: packing.Bytes
    finite: bool
    exact: bool


def repack(numbers: QuantisedNumbers, value: Value) -> Repacked | None:
    """The packed bytes of the weight ``value``, or of one or several of its matrices; None if the layout cannot hold
    them: rows of a panel in fp8 share their scales, groups of a K block its fp16 numbers.

    numbers: in the value's format, [N, K] or [E, N, K]. Raises HetcompError if the shape does not fit.
    """
    rows, columns = (int(d) for d in value.type.shape[-2:])
    if value.format != numbers.format or numbers.shape[-2:] != (rows, columns):
        raise HetcompError(
            f"Weight {value.fqn or value.id} is {value.format} [{rows}, {columns}], but its codes are "
            f"{numbers.format} {list(numbers.shape)}."
        )
    halves = 2 if value.type.layout == packing.PANELS_GLU else 1
    if numbers.format == "fp8" and not _panels_share_scales(numbers.scales, halves):
        return None
    if numbers.format in K_SCALES and not k_blocks.whole_blocks(numbers.scales, numbers.format):
        return None
    each = packing.matrix_bytes(rows, columns, numbers.format, value.type.layout)
    stack = [numbers] if numbers.ndim == 2 else [numbers[i] for i in range(len(numbers))]
    target, finite = np.zeros(len(stack) * each, np.uint8), True
    for i, matrix in enumerate(stack):
        finite &= _usable(matrix)
        panels = target[i * each : (i + 1) * each].reshape(-1, packing.panel_bytes(columns, numbers.format))
        for half in range(halves):
            first, last = half * rows // halves, (half + 1) * rows // halves
            for start in range(first, last, _ROWS):
                part = slice(start, min(start + _ROWS, last))
                place = (start - first) // packing.PANEL
                count = -(-(part.stop - start) // packing.PANEL)
                out = panels[half::halves][place : place + count]
                _fill(out, matrix.format, matrix.codes[part], matrix.scales[part])
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


def _fill(out: packing.Bytes, form: str, codes: packing.Bytes, scales: npt.NDArray[Any]) -> None:
    """Writes whole panels [panels, bytes] from rows of codes and scales."""
    panels, columns = len(out), codes.shape[1]
    width = packing.padded_columns(columns, form)
    padded = _padded(codes, panels * packing.PANEL, width, _PADDING[form])
    group = GROUPS[form]
    if form in K_SCALES:
        k_blocks.write_panels(out, form, padded, _padded(scales, panels * packing.PANEL, width // group, 0))
        return
    all_scales = _padded(scales, panels * packing.PANEL, scales.shape[1], 0)
    if form == "fp8":
        pairs = padded.view(np.uint16).reshape(panels, packing.PANEL, width // 2).transpose(0, 2, 1)
        out[:, : packing.PANEL * width] = np.ascontiguousarray(pairs).view(np.uint8).reshape(panels, -1)
        start = packing.element_bytes(columns, form)
        shared = np.ascontiguousarray(scales[:: packing.PANEL], np.float32)
        out[:, start : start + shared.shape[1] * 4] = shared.view(np.uint8)
        return
    groups = width // group
    each = packing.group_bytes(form)
    by_group = out[:, : groups * each].reshape(panels, groups, each)
    if form == "q8":
        quads = padded.reshape(panels, packing.PANEL, groups, 8, 4)
    else:
        nibbles = padded.reshape(panels, packing.PANEL, groups, 4, 2, 4)
        quads = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    words = np.ascontiguousarray(quads).view(np.uint32)[..., 0]  # [panel, row, group, vector]
    elements = np.ascontiguousarray(words.transpose(0, 2, 3, 1)).view(np.uint8).reshape(panels, groups, -1)
    by_group[:, :, : elements.shape[2]] = elements
    with np.errstate(over="ignore"):
        stored = [all_scales if form == "mxfp4" else _plain(all_scales).astype(np.float16)]
    if form == "q4z":
        stored.append(all_scales["zero"])
    by_row = [np.ascontiguousarray(part.reshape(panels, packing.PANEL, groups).transpose(0, 2, 1)) for part in stored]
    of_group = [part.view(np.uint8).reshape(panels, groups, -1) for part in by_row]
    by_group[:, :, elements.shape[2] :] = np.concatenate(of_group, axis=2)


def _padded(rows: npt.NDArray[Any], count: int, width: int, fill: int) -> npt.NDArray[Any]:
    """[rows, columns] as [count, width]."""
    if rows.shape == (count, width):
        return np.ascontiguousarray(rows)
    whole = np.full((count, width), fill, rows.dtype)
    whole[: rows.shape[0], : rows.shape[1]] = rows
    return whole
