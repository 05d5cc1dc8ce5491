"""Weights of onnxruntime's contrib ops in 4 or 8 bits: MatMulNBits, GatherBlockQuantized and QMoE pack them alike.

A row's codes lie one behind the other, the low half of a byte first; w = (code - zero point) * scale of its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.act_order import Groups, scattered_groups
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.quantised_rows import rows_of
from hetcomp.ir.plan import CheckpointTensor, Quantised
from hetcomp.quantised_numbers import GROUPS, QuantisedNumbers, with_zero_points
from hetcomp.stored_rows import Places, StoredRows, StoredScales, places

_Raw = npt.NDArray[np.generic]
_Floats = npt.NDArray[np.float32]
_GROUP = GROUPS["q4"]
_SCALES = {"F32": 32, "F16": 16, "BF16": 16}


@dataclass(frozen=True)
class Packed:
    """A matrix of ``shape`` [.., N, K] in blocks of ``block`` columns, by the names of what is stored for it. Without
    ``zeros`` all zero points are half of the codes' range, without ``groups`` a block's columns lie together."""

    shape: tuple[int, ...]
    bits: int
    block: int
    codes: str
    scales: str
    zeros: str = ""
    groups: str = ""

    def described(self, name: str, tensors: Mapping[str, CheckpointTensor]) -> CheckpointTensor:
        """The tensor that it is, under ``name``. Raises NotComputable for sizes and types that contradict each other,
        and for what no weight format comes near to."""
        self._check(tensors)
        scales, zeros = tensors[self.scales], tensors.get(self.zeros)
        form, inexact = self._format(zeros, scales)
        parts: tuple[tuple[str, CheckpointTensor], ...] = (("codes", tensors[self.codes]), ("scales", scales))
        zero_bits = 0
        if zeros is not None:
            parts = (*parts, ("zeros", zeros))
            zero_bits = self.bits if zeros.dtype == "U8" else _SCALES[zeros.dtype]
        label = f"ONNX int{self.bits}, blocks of {self.block}{'' if zeros is None else ', zero points'}"
        bits = self.bits + (_SCALES[scales.dtype] + zero_bits) / self.block
        if self.groups:
            parts = (*parts, ("groups", tensors[self.groups]))
        ordered = bool(self.groups) and self._of_format(zeros)
        stored = Quantised("onnx", label, (1, self.block), parts, form, inexact, bits, ordered)
        codes = tensors[self.codes]
        return CheckpointTensor(codes.file, name, codes.dtype, self.shape, codes.offset, codes.bytes, stored)

    def _format(self, zeros: CheckpointTensor | None, scales: CheckpointTensor) -> tuple[str, str]:
        """The weight format, and why it does not hold the numbers exactly, if so."""
        if not self._has_runs():
            return "q8", f"its groups are no runs of {_GROUP} columns"
        if not self._of_format(zeros):
            return "q8", "its zero points are no whole numbers of 4 bits"
        inexact = "its scales are f32, those of the format fp16" if scales.dtype == "F32" else ""
        return "q8" if self.bits == 8 else "q4" if zeros is None else "q4z", inexact

    def _of_format(self, zeros: CheckpointTensor | None) -> bool:
        """Whether a weight format has such groups and zero points."""
        return self._has_runs() and (zeros is None or (self.bits == 4 and zeros.dtype == "U8"))

    def _has_runs(self) -> bool:
        return self.block % _GROUP == 0 or self.block >= self.shape[-1]

    def _blocks(self) -> int:
        return -(-self.shape[-1] // self.block)

    def _check(self, tensors: Mapping[str, CheckpointTensor]) -> None:
        if self.bits not in (4, 8):
            raise NotComputable(f"has weights of {self.bits} bits; expected 4 or 8")
        *rows, columns = self.shape
        count, padded = int(np.prod(rows)), self._blocks() * self.block
        whole = {count * padded * self.bits // 8, count * columns * self.bits // 8}
        zeros = count * -(-self._blocks() * self.bits // 8)
        wanted = [(self.codes, ("U8",), whole), (self.scales, tuple(_SCALES), {count * self._blocks()})]
        if self.zeros:
            as_numbers = count * self._blocks()
            wanted.append((self.zeros, ("U8", *_SCALES), {zeros, as_numbers}))
        if self.groups:
            wanted.append((self.groups, ("I32",), {columns, padded}))
        for name, dtypes, sizes in wanted:
            tensor = tensors.get(name)
            if tensor is None:
                raise NotComputable(f"takes {name} for a quantised weight, which is computed")
            found = int(np.prod(tensor.shape))
            if tensor.dtype not in dtypes or found not in sizes:
                raise NotComputable(
                    f"has {name} of type {tensor.dtype} and shape {list(tensor.shape)}; expected {' or '.join(dtypes)} "
                    f"with {' or '.join(map(str, sorted(sizes)))} elements for a weight of shape {list(self.shape)}"
                )

    def has_rows(self, tensor: CheckpointTensor) -> bool:
        """Whether what is stored for a row of the matrix is a run of bytes."""
        assert tensor.quantised is not None
        parts = [part for name, part in tensor.quantised.parts if name != "groups"]
        return len(self.shape) == 2 and not any(np.prod(part.shape) % self.shape[0] for part in parts)

    def rows(self, tensor: CheckpointTensor, start: int, stop: int) -> CheckpointTensor:
        """Rows of the matrix ``tensor`` that :meth:`has_rows`, as one of their own."""
        assert tensor.quantised is not None
        parts = [
            (name, part if name == "groups" else rows_of(_by_row(part, self.shape[0]), start, stop))
            for name, part in tensor.quantised.parts
        ]
        shape = (stop - start, self.shape[1])
        return replace(tensor, shape=shape, quantised=replace(tensor.quantised, parts=tuple(parts)))

    def stored_rows(
        self, tensor: CheckpointTensor, expert: int | None, numbers: Mapping[str, int], files: tuple[Path, ...]
    ) -> StoredRows | str:
        """Where the rows of the matrix ``tensor``, or one expert's, lie, or why they cannot be used there. numbers: of
        the files by their names."""
        assert tensor.quantised is not None
        if self.zeros:
            return f"zero points lie apart from the codes of {tensor.quantised.label}"
        if self.groups:
            return f"columns of {tensor.quantised.label} are in another order"
        count, shape = int(np.prod(self.shape[:-1])), self.shape[:-1] if expert is None else self.shape[1:-1]

        def of_rows(part: CheckpointTensor) -> Places:
            each = part.bytes // count
            first = part.offset + (expert or 0) * self.shape[-2] * each
            return places(numbers[part.file], first, each, (*shape, 1))

        codes, scales = tensor.quantised.part("codes"), tensor.quantised.part("scales")
        if codes.bytes % count:
            return "its rows begin within a byte"
        columns = self.shape[-1]
        of_scales = StoredScales(scales.dtype, min(self.block, columns), of_rows(scales))
        return StoredRows("nibbles" if self.bits == 4 else "codes", files, of_rows(codes), columns, of_scales)

    def groups_of(self, raw: _Raw, tensor: CheckpointTensor) -> Groups:
        """Each column's block, as ``raw`` has it. Raises HetcompError if there are none such."""
        return scattered_groups(raw, self.shape[-1], self.block, self._blocks(), tensor)

    def decode(self, parts: Mapping[str, _Raw], tensor: CheckpointTensor) -> QuantisedNumbers | _Floats:
        """The matrix ``tensor``, or one expert's, whose parts as they are stored these are; with columns brought into
        runs where it says so."""
        assert tensor.quantised is not None
        rows, columns = self.shape[-2:]
        codes = _unpacked(parts["codes"].reshape(-1), self.bits).reshape(rows, -1)[:, :columns]
        scales = _floats(parts["scales"]).reshape(rows, self._blocks())
        zeros = self._zeros(parts.get("zeros"), rows)
        groups = self.groups_of(parts["groups"], tensor) if "groups" in parts else None
        if groups is not None and tensor.quantised.act_order:
            order = np.argsort(groups, kind="stable")
            return replace(self._in_runs(codes[:, order], scales, zeros), order=order.astype(np.int32))
        if groups is None and self._of_format(dict(tensor.quantised.parts).get("zeros")):
            return self._in_runs(codes, scales, zeros)
        if groups is None:
            groups = np.arange(columns) // self.block
        middle = np.float32(1 << (self.bits - 1))
        off = middle if zeros is None else zeros.astype(np.float32)[:, groups]
        made: _Floats = (codes.astype(np.float32) - off) * scales[:, groups]
        return made

    def _in_runs(
        self, codes: npt.NDArray[np.uint8], scales: _Floats, zeros: npt.NDArray[np.uint8] | _Floats | None
    ) -> QuantisedNumbers:
        columns = codes.shape[1]
        width = min(self.block, columns)
        both = [scales] if zeros is None else [scales, zeros]
        of_groups = [np.repeat(part, -(-width // _GROUP), axis=1)[:, : -(-columns // _GROUP)] for part in both]
        if zeros is None:
            return QuantisedNumbers("q4" if self.bits == 4 else "q8", codes, of_groups[0])
        return with_zero_points(codes, *of_groups)

    def _zeros(self, raw: _Raw | None, rows: int) -> npt.NDArray[np.uint8] | _Floats | None:
        """[rows, blocks]; rows of packed ones are padded to whole bytes."""
        if raw is None:
            return None
        if raw.dtype == np.uint8:
            return _unpacked(raw.reshape(-1), self.bits).reshape(rows, -1)[:, : self._blocks()]
        return _floats(raw).reshape(rows, self._blocks())


def _by_row(part: CheckpointTensor, rows: int) -> CheckpointTensor:
    return replace(part, shape=(rows, int(np.prod(part.shape)) // rows))


def _unpacked(packed: _Raw, bits: int) -> npt.NDArray[np.uint8]:
    data = packed.view(np.uint8)
    if bits == 8:
        return data
    codes = np.empty(2 * data.size, np.uint8)
    codes[0::2], codes[1::2] = data & 15, data >> 4
    return codes


def _floats(raw: _Raw) -> _Floats:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)
