"""Numbers as codes and scales, as a quantised checkpoint has them: what is packed without being quantised anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]

# Columns that share a scale in each format.
GROUPS = {"q4": 32, "q4z": 32, "q8": 32, "mxfp4": 32, "fp8": 128, "q4k": 32, "q5k": 32, "q6k": 16}
# What is added to a whole number to make its code.
OFFSETS = {"q4": 8, "q8": 128, "q4k": 0, "q5k": 0, "q6k": 32}
# Scales of q4z: what is added to its whole numbers differs from group to group.
ZERO_POINTS = np.dtype([("scale", "<f4"), ("zero", "u1")])
# The K blocks of llama.cpp (block_q4_K, block_q5_K, block_q6_K of ggml-common.h): groups whose scales are small whole
# numbers times an fp16 number that BLOCK columns share.
BLOCK = 256
_WITH_MINIMA = np.dtype([("d", "<f2"), ("d_minimum", "<f2"), ("scale", "u1"), ("minimum", "u1")])
K_SCALES = {
    "q4k": _WITH_MINIMA,
    "q5k": _WITH_MINIMA,
    "q6k": np.dtype([("d", "<f2"), ("scale", "i1")]),
}

# The 256 codes of e4m3fn and the 16 of e2m1 (OCP 8-bit Floating Point 1.0, Microscaling Formats 1.0).
_HALF_E4M3 = np.array([np.ldexp(m / 8 + (e > 0), max(e, 1) - 7) for e in range(16) for m in range(8)], np.float32)
_HALF_E4M3[127] = np.nan
E4M3: _Floats = np.concatenate([_HALF_E4M3, -_HALF_E4M3])
_HALF_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1: _Floats = np.concatenate([_HALF_E2M1, -_HALF_E2M1])


def e8m0(scales: npt.NDArray[np.uint8]) -> _Floats:
    """The powers of two that e8m0 bytes stand for; NaN for 255."""
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return np.where(scales == 255, np.float32(np.nan), powers)


@dataclass(frozen=True)
class QuantisedNumbers:
    """A matrix [N, K], or several [E, N, K], in a weight format of hetcomp.backends.packing, not packed.

    codes: u8 [.., N, K], one a byte: q + 8 (q4), q + its group's zero point (q4z, 0..15), q + 128 (q8; q may be -128),
    e2m1 (mxfp4), e4m3fn (fp8), q (q4k, q5k), q + 32 (q6k). scales [.., N, ceil(K / group)]: f32, the e8m0 bytes of
    mxfp4, records of ZERO_POINTS (q4z; zero points 0..16) or of K_SCALES, whose fp16 numbers are equal in all groups of
    a block of 256 columns. A group is 32 columns, in fp8 128, in q6k 16. A number is its code's value times the scale;
    in q4k and q5k d * scale * q - d_minimum * minimum, in q6k d * scale * q. order: i32 [K], or [E, K]: which column of
    the numbers each column of codes is, where they are not in the numbers' own order (K is whole groups then)."""

    format: str
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    order: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int | None) -> QuantisedNumbers:
        """One matrix of several; with None one of one."""
        order = None if self.order is None else self.order[index]
        return QuantisedNumbers(self.format, self.codes[index], self.scales[index], order)

    def rows(self, order: npt.NDArray[np.int64]) -> QuantisedNumbers:
        """Rows in this order."""
        take = [np.take(part, order, axis=-2) for part in (self.codes, self.scales)]
        return QuantisedNumbers(self.format, take[0], take[1], self.order)

    def heads(self, heads: int, start: int, stop: int) -> QuantisedNumbers:
        """[heads * n, K] as [heads, stop - start, K]: of every head's rows those from start to stop."""
        split = [part.reshape(heads, -1, part.shape[-1])[:, start:stop] for part in (self.codes, self.scales)]
        order = None if self.order is None else np.broadcast_to(self.order, (heads, self.order.size))
        return QuantisedNumbers(self.format, split[0], split[1], order)

    def transposed(self) -> QuantisedNumbers | _Floats:
        """Rows and columns swapped; as f32 where the transpose has groups whose numbers share no scale."""
        if self.format in K_SCALES or self.order is not None:
            return np.swapaxes(self.to_f32(), -1, -2)
        group = GROUPS[self.format]
        each = np.swapaxes(np.repeat(self.scales, group, axis=-1)[..., : self.shape[-1]], -1, -2)
        firsts = each[..., ::group]
        if np.array_equal(np.repeat(firsts, group, axis=-1)[..., : each.shape[-1]], each):
            return QuantisedNumbers(self.format, np.swapaxes(self.codes, -1, -2), firsts)
        return np.swapaxes(self.to_f32(), -1, -2)

    def cut(self, axis: int, runs: Sequence[tuple[int, int]]) -> QuantisedNumbers | _Floats:
        """The runs (start, stop) of an axis, one after the other; as f32 where one of columns cuts a group or block, or
        columns are in another order."""
        of_columns = axis in (-1, self.ndim - 1)
        if of_columns and self.order is not None:
            return _taken(self.to_f32(), axis, runs)
        group = GROUPS[self.format] if of_columns else 1
        whole = BLOCK if of_columns and self.format in K_SCALES else group
        if any(start % whole for start, _ in runs) or any(stop % whole for _, stop in runs[:-1]):
            return _taken(self.to_f32(), axis, runs)
        of_groups = [(start // group, -(-stop // group)) for start, stop in runs]
        order = self.order if self.order is None or self.order.ndim == 1 or axis else _taken(self.order, 0, runs)
        return QuantisedNumbers(
            self.format, _taken(self.codes, axis, runs), _taken(self.scales, axis, of_groups), order
        )

    def in_format(self, weight_format: str | None) -> QuantisedNumbers | None:
        """The same numbers in another format, exactly; None if that does not go without rounding."""
        if self.format == weight_format:
            return self
        if (self.format, weight_format) == ("q4", "q8"):
            codes = self.codes + np.uint8(OFFSETS["q8"] - OFFSETS["q4"])
            return replace(self, format="q8", codes=codes)
        if (self.format, weight_format) == ("q4z", "q8"):
            # At most 15 + 128; what wraps in bytes on the way comes out right.
            codes = self.codes - self._each(self.scales["zero"]) + np.uint8(OFFSETS["q8"])
            return replace(self, format="q8", codes=codes, scales=np.ascontiguousarray(self.scales["scale"]))
        return None

    def to_f32(self) -> _Floats:
        """The numbers, rounded once to f32."""
        if self.format == "fp8":
            values = E4M3[self.codes]
        elif self.format == "mxfp4":
            values = E2M1[self.codes]
        elif self.format == "q4z":
            values = self.codes.astype(np.float32) - self._each(self.scales["zero"])
        else:
            values = self.codes.astype(np.float32) - np.float32(OFFSETS[self.format])
        values *= self._each(self._scales())
        if self.format in ("q4k", "q5k"):
            values -= self._each(_product(self.scales, "d_minimum", "minimum"))
        if self.order is not None:
            return np.take_along_axis(values, np.argsort(self.order, axis=-1)[..., None, :], axis=-1)
        return values

    def _scales(self) -> _Floats:
        if self.format in K_SCALES:
            return _product(self.scales, "d", "scale")
        if self.format == "q4z":
            return self.scales["scale"]
        return e8m0(self.scales) if self.format == "mxfp4" else self.scales.astype(np.float32)

    def _each(self, of_groups: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[.., G] of the groups as [.., K] of their columns."""
        return np.repeat(of_groups, GROUPS[self.format], axis=-1)[..., : self.shape[-1]]


def with_zero_points(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[Any], zeros: npt.NDArray[Any]
) -> QuantisedNumbers:
    """Codes of 4 bits [.., N, K] with a scale and a zero point for each 32 of them, [.., N, G], as q4z."""
    records = np.empty(scales.shape, ZERO_POINTS)
    records["scale"], records["zero"] = scales, zeros
    return QuantisedNumbers("q4z", codes, records)


def _product(records: npt.NDArray[Any], factor: str, whole: str) -> _Floats:
    """An fp16 number of each K_SCALES record times a whole one: exact in f32."""
    numbers: _Floats = records[factor].astype(np.float32) * records[whole].astype(np.float32)
    return numbers


def _taken(array: npt.NDArray[Any], axis: int, runs: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
    along = np.moveaxis(array, axis, 0)
    pieces = [along[start:stop] for start, stop in runs]
    return np.moveaxis(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), 0, axis)


def joined(parts: Sequence[QuantisedNumbers]) -> QuantisedNumbers | _Floats:
    """One after the other along the first axis; as f32 where their formats differ, or the orders of a matrix's
    columns."""
    orders = [part.order for part in parts if part.order is not None]
    of_each = parts[0].ndim > 2
    alike = of_each or all(np.array_equal(orders[0], order) for order in orders[1:])
    if len({part.format for part in parts}) > 1 or len(orders) not in (0, len(parts)) or not alike:
        return np.concatenate([part.to_f32() for part in parts])
    codes = np.concatenate([part.codes for part in parts])
    order = None if not orders else np.concatenate(orders) if of_each else orders[0]
    return QuantisedNumbers(parts[0].format, codes, np.concatenate([part.scales for part in parts]), order)
