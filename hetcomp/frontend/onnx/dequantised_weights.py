"""Weights behind a DequantizeLinear, as onnxruntime's tools write them with quant_format=QDQ (ONNX, Operators.md).

w = (code - zero point) * scale: one scale for all, one an index of an axis, or one a block of an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.ir.plan import CheckpointTensor, Quantised
from hetcomp.quantised_numbers import GROUPS, OFFSETS, QuantisedNumbers

_Raw = npt.NDArray[np.generic]
_Floats = npt.NDArray[np.float32]
_Numbers = npt.NDArray[Any]
_GROUP = GROUPS["q4"]
BITS = {"I4": 4, "U4": 4, "I8": 8, "U8": 8}
_SCALES = {"F32": 32, "F16": 16, "BF16": 16}


@dataclass(frozen=True)
class Dequantised:
    """A matrix [N, K] by the names of what is stored for it. ``stored``: shape of the codes, [K, N] if ``turned``.
    ``axis``: that of the scales in the stored order; ``block``: how many along it share one, 0: each has its own; an
    axis of -1: all share one. ``zero``: the zero point if it is the same everywhere, None if it is not."""

    stored: tuple[int, ...]
    codes: str
    scales: str
    zeros: str
    axis: int
    block: int
    zero: int | None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.stored[::-1] if self.turned else self.stored

    def in_order(self, turned: bool) -> Dequantised:
        """The same, with its axes swapped or not."""
        return replace(self, turned=turned)

    def described(self, name: str, tensors: Mapping[str, CheckpointTensor]) -> CheckpointTensor:
        """The tensor that it is, under ``name``. Raises NotComputable for shapes and types that contradict each
        other."""
        self._check(tensors)
        codes, scales, zeros = (tensors[n] if n else None for n in (self.codes, self.scales, self.zeros))
        assert codes is not None and scales is not None
        kind = self._form(codes.dtype)
        inexact = "its scales are f32, those of the format fp16" if scales.dtype == "F32" else ""
        if kind is None:
            inexact = "its scales or zero points are none of the format's"
        shared = self.block or (1 if self.axis == self._along_k else self.shape[1])
        label = f"ONNX {'u' * (codes.dtype[0] == 'U')}int{BITS[codes.dtype]} (QDQ), {self._sharing()}"
        parts = (("codes", codes), ("scales", scales), *((("zeros", zeros),) if zeros is not None else ()))
        bits = sum(t.bytes * 8 for _, t in parts) / float(np.prod(self.shape))
        stored = Quantised("onnx", label, (1, shared), parts, kind or "q8", inexact, bits)
        return CheckpointTensor(codes.file, name, codes.dtype, self.shape, codes.offset, codes.bytes, stored)

    def _sharing(self) -> str:
        """What has a scale, in words."""
        if self.axis < 0:
            return "a scale in all"
        along = self.axis == self._along_k
        if self.block:
            return f"blocks of {self.block}{'' if along else ' rows'}"
        return f"a scale a {'column' if along else 'row'}"

    @property
    def _along_k(self) -> int:
        """The axis of K as stored."""
        return 0 if self.turned else 1

    def _form(self, dtype: str) -> str | None:
        """The format that has the codes; None if none has."""
        whole = (self.axis == self._along_k and self.block % _GROUP == 0 and self.block > 0) or (
            self.axis != self._along_k and self.block == 0
        )
        if not whole:
            return None
        middle = 0 if dtype[0] == "I" else 1 << (BITS[dtype] - 1)
        if self.zero == middle:
            return "q4" if BITS[dtype] == 4 else "q8"
        # A code of 4 bits less another one is a whole number of 5 bits.
        return "q8" if BITS[dtype] == 4 else None

    def _check(self, tensors: Mapping[str, CheckpointTensor]) -> None:
        wanted = []
        if self.axis >= 0:
            wanted = list(self.stored) if self.block else [self.stored[self.axis]]
        if self.block:
            wanted[self.axis] = -(-wanted[self.axis] // self.block)
        for name, kinds in ((self.scales, tuple(_SCALES)), (self.zeros, (tensors[self.codes].dtype,))):
            if not name:
                continue
            tensor = tensors[name]
            if tensor.dtype not in kinds or list(tensor.shape) not in (wanted, wanted or [1]):
                raise NotComputable(
                    f"has {name} of type {tensor.dtype} and shape {list(tensor.shape)}; expected {' or '.join(kinds)} "
                    f"of shape {wanted} for a weight of shape {list(self.stored)}"
                )

    def has_rows(self, dtype: str, starts: Sequence[int]) -> bool:
        """Whether :meth:`decode` does some rows at a time that begin at ``starts``: with a byte and a block."""
        whole = self.block if self.axis == 1 - self._along_k and self.block else 1
        if self.turned and BITS[dtype] == 4:
            whole = max(whole, 2)
        return (BITS[dtype] == 8 or self.stored[1] % 2 == 0) and not any(start % whole for start in starts)

    def decode(
        self, parts: Mapping[str, _Raw], dtype: str, rows: tuple[int, int] | None = None
    ) -> QuantisedNumbers | _Floats:
        """The matrix [N, K] whose parts as they are stored these are, or those of its rows
        that :meth:`has_rows`. dtype: of its codes."""
        scales = _floats(parts["scales"]).reshape(self._count())
        zeros = whole_numbers(parts["zeros"], dtype, self._count()) if "zeros" in parts else None
        if rows is None:
            return self._numbers(parts["codes"], scales, zeros, dtype)
        axis, each = 1 - self._along_k, 8 // BITS[dtype]
        by_byte = parts["codes"].reshape(self.stored[0], -1)
        of_rows = [rows[0], rows[1]] if axis == 0 else [rows[0] // each, -(-rows[1] // each)]
        codes = np.ascontiguousarray(by_byte.take(range(*of_rows), axis))
        size = rows[1] - rows[0]
        part = replace(self, stored=(size, self.stored[1]) if axis == 0 else (self.stored[0], size))
        zeros = None if zeros is None else self._of_rows(zeros, rows)
        return part._numbers(codes, self._of_rows(scales, rows), zeros, dtype)

    def _of_rows(self, of_blocks: _Numbers, rows: tuple[int, int]) -> _Numbers:
        """Scales or zero points of these rows of the matrix."""
        axis = 1 - self._along_k
        if of_blocks.shape[axis] == 1:
            return of_blocks
        block = self.block if self.axis == axis and self.block else 1
        return of_blocks.take(range(rows[0] // block, -(-rows[1] // block)), axis)

    def _numbers(self, codes: _Raw, scales: _Floats, zeros: _Numbers | None, dtype: str) -> QuantisedNumbers | _Floats:
        each = whole_numbers(codes, dtype, self.stored)
        if zeros is not None:
            each = each - self._for_each(zeros)
        form = self._form(dtype)
        if form is None:
            made: _Floats = each.astype(np.float32) * self._for_each(scales)
            return made.T if self.turned else made
        each, scales = (each.T, scales.T) if self.turned else (each, scales)
        rows, columns = self.shape
        groups = -(-columns // _GROUP)
        of_groups = np.repeat(scales, self.block // _GROUP, axis=1)[:, :groups] if self.block else scales
        of_groups = np.ascontiguousarray(np.broadcast_to(of_groups, (rows, groups)))
        return QuantisedNumbers(form, np.ascontiguousarray(each + OFFSETS[form]).astype(np.uint8), of_groups)

    def _count(self) -> tuple[int, int]:
        """Scales along both stored axes."""
        count = [1, 1]
        if self.axis >= 0:
            size = self.stored[self.axis]
            count = list(self.stored) if self.block else count
            count[self.axis] = -(-size // self.block) if self.block else size
        return count[0], count[1]

    def _for_each(self, numbers: _Numbers) -> _Numbers:
        """Scales or zero points, of which blocks share one, for each stored number, or to be broadcast."""
        if not self.block:
            return numbers
        return np.repeat(numbers, self.block, axis=self.axis)[: self.stored[0], : self.stored[1]]


def whole_numbers(raw: _Raw, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.int16]:
    """Codes or zero points as stored; those of 4 bits two in a byte, the low half first."""
    if BITS[dtype] == 4:
        data = raw.view(np.uint8).reshape(-1)
        codes = np.empty(2 * data.size, np.int16)
        codes[0::2], codes[1::2] = data & 15, data >> 4
        codes = codes[: int(np.prod(shape))].reshape(shape)
        return np.where(codes > 7, codes - 16, codes).astype(np.int16) if dtype == "I4" else codes
    return raw.view(np.int8 if dtype == "I8" else np.uint8).reshape(shape).astype(np.int16)


def _floats(raw: _Raw) -> _Floats:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)
