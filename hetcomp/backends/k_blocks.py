"""Panels of K blocks: where the bytes of formats q4k, q5k and q6k lie, and the codes and scales that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.quantised_numbers import BLOCK, GROUPS, K_SCALES, QuantisedNumbers

_Bytes = npt.NDArray[np.uint8]
_PANEL = 16


@dataclass(frozen=True)
class KBytes:
    """Bytes of 16 rows. ``codes`` and ``scales``: of a group of GROUPS columns, one behind the other; ``head``: in
    front of the groups of each block of 256 columns, its fp16 numbers."""

    codes: int
    scales: int
    head: int


K_BYTES = {"q4k": KBytes(256, 32, 64), "q5k": KBytes(320, 32, 64), "q6k": KBytes(192, 16, 32)}
# The fields of a record (hetcomp.quantised_numbers.K_SCALES) in the order in which they lie, of 16 rows each.
_HEADS = {"q4k": ("d", "d_minimum"), "q5k": ("d", "d_minimum"), "q6k": ("d",)}
_SCALES = {"q4k": ("scale", "minimum"), "q5k": ("scale", "minimum"), "q6k": ("scale",)}
_HIGH_BITS = {"q5k": 1, "q6k": 2}  # of a code, behind the vectors of low halves


def whole_blocks(scales: npt.NDArray[Any], form: str) -> bool:
    """Whether the groups of every block of 256 columns share their fp16 numbers. scales: records [.., G]."""
    each = BLOCK // GROUPS[form]
    return all(
        np.array_equal(np.repeat(bits[..., ::each], each, axis=-1)[..., : bits.shape[-1]], bits)
        for bits in (np.ascontiguousarray(scales[field]).view(np.uint16) for field in _HEADS[form])
    )


def finite(scales: npt.NDArray[Any], form: str) -> bool:
    """Whether the records stand for numbers."""
    return all(bool(np.isfinite(scales[field]).all()) for field in _HEADS[form])


def read_panels(panels: _Bytes, form: str, columns: int) -> QuantisedNumbers:
    """The codes and records [panels * 16, ..] of ``panels`` [panels, bytes of a panel]. columns: padded to 32."""
    size, count, groups = K_BYTES[form], len(panels), columns // GROUPS[form]
    each, block = BLOCK // GROUPS[form], BLOCK // GROUPS[form] * (size.codes + size.scales) + size.head
    blocks = -(-groups // each)
    whole = np.zeros((count, blocks * block), np.uint8)
    used = blocks * size.head + groups * (size.codes + size.scales)
    whole[:, :used] = panels[:, :used]
    by_block = whole.reshape(count, blocks, block)
    by_group = by_block[:, :, size.head :].reshape(count, blocks * each, -1)[:, :groups]
    scales = np.zeros((count, _PANEL, groups), K_SCALES[form])
    for fields, raw, repeat in (
        (_HEADS[form], by_block[:, :, : size.head], each),
        (_SCALES[form], by_group[:, :, size.codes :], 1),
    ):
        for field, part in zip(fields, np.split(raw, len(fields), axis=2), strict=True):
            numbers = np.ascontiguousarray(part).view(K_SCALES[form][field]).transpose(0, 2, 1)
            scales[field] = np.repeat(numbers, repeat, axis=2)[:, :, :groups]
    of_low = GROUPS[form] * _PANEL // 2
    low = by_group[:, :, :of_low].reshape(count, groups, -1, _PANEL, 4)
    codes = np.stack([low & 15, low >> 4], axis=3)  # [panel, group, vector, half, row, byte]
    if form in _HIGH_BITS:
        high = by_group[:, :, of_low : of_low + 64].reshape(count, groups, 1, _PANEL, 4)
        bits = _HIGH_BITS[form]
        steps = high >> np.arange(0, 8, bits, dtype=np.uint8)[:, None, None] & np.uint8((1 << bits) - 1)
        codes |= (steps << np.uint8(4)).reshape(codes.shape)
    by_row = codes.transpose(0, 4, 1, 2, 3, 5).reshape(count * _PANEL, columns)
    return QuantisedNumbers(form, by_row, scales.reshape(count * _PANEL, groups))
