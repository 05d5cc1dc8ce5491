"""A plain quantiser to K blocks and codes with zero points: the tests' weights in formats that ours does not make. Of
any number of columns, the last block being a part of one, with scales of no more care than their ranges."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hetcomp.quantised_numbers import BLOCK, GROUPS, K_SCALES, QuantisedNumbers, with_zero_points


def quantised(numbers: npt.NDArray[np.float32], form: str) -> QuantisedNumbers:
    """[.., K] in q4z, q4k, q5k or q6k; scales are positive, but for those of q6k."""
    columns, group = numbers.shape[-1], GROUPS[form]
    groups = -(-columns // group)
    padded = np.zeros((*numbers.shape[:-1], groups * group))
    padded[..., :columns] = numbers
    grouped = padded.reshape(*numbers.shape[:-1], groups, group)
    if form == "q4z":
        return _with_zero_points(grouped, columns)
    records = np.zeros(grouped.shape[:-1], K_SCALES[form])
    if form != "q6k":
        last = 15 if form == "q4k" else 31
        least = np.maximum(-grouped.min(-1), 0)
        top = np.maximum(grouped.max(-1) + least, 0)
        records["d"], records["scale"] = _of_blocks(top / last, group, 63)
        records["d_minimum"], records["minimum"] = _of_blocks(least, group, 63)
        offset = _product(records, "d_minimum", "minimum")
    else:
        records["d"], records["scale"] = _of_blocks(np.abs(grouped).max(-1) / 31, group, 127)
        offset, last = 32 * _product(records, "d", "scale"), 63
    scale = _product(records, "d", "scale")
    steps = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.rint((grouped + offset[..., None]) * steps[..., None]).clip(0, last)
    codes[scale == 0] = 32 if form == "q6k" else 0
    return QuantisedNumbers(form, codes.astype(np.uint8).reshape(padded.shape)[..., :columns], records)


def _with_zero_points(grouped: npt.NDArray[np.float64], columns: int) -> QuantisedNumbers:
    """[.., G, 32], of which ``columns`` are the matrix's."""
    least, top = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scale = ((top - least) / 15).astype(np.float16).astype(np.float64)
    steps = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    zero = np.rint(-least * steps).clip(0, 16)
    codes = np.rint(grouped * steps[..., None] + zero[..., None]).clip(0, 15).astype(np.uint8)
    return with_zero_points(codes.reshape(*codes.shape[:-2], -1)[..., :columns], scale, zero)


def _of_blocks(scales: npt.NDArray[np.float64], group: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [.., G] as an fp16 number, the same in all groups of a block, times whole numbers up to ``most``."""
    each = BLOCK // group
    blocks = -(-scales.shape[-1] // each)
    padded = np.zeros((*scales.shape[:-1], blocks * each))
    padded[..., : scales.shape[-1]] = scales
    top = padded.reshape(*scales.shape[:-1], blocks, each).max(-1)
    of_block = np.repeat((top / most).astype(np.float16), each, axis=-1)[..., : scales.shape[-1]]
    wide = of_block.astype(np.float64)
    whole = np.rint(np.divide(scales, wide, out=np.zeros_like(scales), where=wide > 0)).clip(0, most)
    return of_block, whole


def _product(records: np.ndarray, factor: str, whole: str) -> npt.NDArray[np.float64]:
    product: npt.NDArray[np.float64] = records[factor].astype(np.float64) * records[whole]
    return product
