"""Where a checkpoint has the rows of a weight, if it has them as the kernels' layout can take them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.quantisation_config import Stored
from hetcomp.ir.plan import CheckpointTensor, WeightSource
from hetcomp.stored_rows import SCALE_BYTES, WORD, StoredRows, StoredScales, places, row_bytes

FLOATS = ("F32", "F16", "BF16")
_SCALE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F8_E8M0": "E8M0", "U8": "E8M0"}
# How the codes of quantised safetensors are stored, less zero points.
_ROWS = {
    ("fp8", 8): "codes",
    ("float-quantized", 8): "codes",
    ("mxfp4", 8): "nibbles",
    ("mxfp4-pack-quantized", 8): "nibbles",
    ("pack-quantized", 4): "nibbles",
    ("pack-quantized", 8): "codes",
    ("int-quantized", 8): "int8",
    ("gptq", 4): "nibbles",
    ("gptq", 8): "codes",
}
# Does something with an array of places: an order of its rows.
View = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def number_rows(tensor: CheckpointTensor, file: int, files: tuple[Path, ...], by_number: bool) -> StoredRows:
    """Of a tensor of numbers, its rows or (``by_number``) each of its numbers."""
    size = row_bytes(tensor.dtype, 1)
    if by_number:
        return StoredRows(tensor.dtype, files, places(file, tensor.offset, size, tensor.shape), 1)
    return block_rows(tensor, tensor.dtype, file, files)


def block_rows(tensor: CheckpointTensor, encoding: str, file: int, files: tuple[Path, ...]) -> StoredRows:
    """Of a matrix, or several, whose rows are stored one behind the other."""
    *rows, columns = tensor.shape
    each = row_bytes(encoding, columns)
    return StoredRows(encoding, files, places(file, tensor.offset, each, (*rows, 1)), columns)


def coded_rows(
    tensor: CheckpointTensor, stored: Stored, numbers: Mapping[str, int], files: tuple[Path, ...]
) -> StoredRows | str:
    """Of a quantised weight of safetensors, or why not. numbers: of the files by their names."""
    quantised = tensor.quantised
    assert quantised is not None
    parts = dict(quantised.parts)
    bits = 8 if stored.kind.startswith("mxfp4") else stored.bits
    encoding = _ROWS.get((stored.kind, bits))
    if encoding is None or not stored.symmetric:
        return f"zero points lie apart from the codes of {quantised.label}"
    if quantised.act_order:
        return f"columns of {quantised.label} are in another order"
    codes, scales = parts["codes"], parts["scales"]
    if stored.kind == "gptq":
        return _word_columns(tensor, encoding, (numbers[codes.file], numbers[scales.file]), files)
    rows = block_rows(replace(tensor, offset=codes.offset), encoding, numbers[codes.file], files)
    per_rows, per_columns = quantised.block
    columns = tensor.shape[-1]
    kind = _SCALE_TYPES[scales.dtype]
    each = -(-columns // per_columns) * SCALE_BYTES[kind]
    grid = (*tensor.shape[:-2], -(-tensor.shape[-2] // per_rows), 1)
    of_blocks = places(numbers[scales.file], scales.offset, each, grid)
    of_rows = np.repeat(of_blocks, per_rows, axis=-2)[..., : tensor.shape[-2], :]
    return replace(rows, scales=StoredScales(kind, min(per_columns, columns), of_rows))


def _word_columns(
    tensor: CheckpointTensor, encoding: str, numbers: tuple[int, int], files: tuple[Path, ...]
) -> StoredRows:
    """Of GPTQ's words [K / 8, N] and scales [groups, N]. numbers: of the files of both."""
    assert tensor.quantised is not None
    codes, scales = tensor.quantised.part("codes"), tensor.quantised.part("scales")
    rows, columns = tensor.shape
    kind = _SCALE_TYPES[scales.dtype]
    each = SCALE_BYTES[kind]
    of_scales = places(numbers[1], scales.offset, each, (rows, 1))
    stored = StoredScales(kind, tensor.quantised.block[1], of_scales, rows * each)
    of_codes = places(numbers[0], codes.offset, WORD, (rows, 1))
    return StoredRows(encoding, files, of_codes, columns, stored, rows * WORD)


def assembled(
    source: WeightSource,
    of_tensor: Callable[[CheckpointTensor], StoredRows | str],
    view: Callable[[npt.NDArray[Any], WeightSource], npt.NDArray[Any]],
    by_number: bool,
) -> StoredRows | str:
    """The rows of a weight out of those of its tensors, or why they cannot be used as they are. view: what applies the
    source's view to an array."""
    if not by_number and (source.transpose or source.head_transpose):
        return "their transpose is stored"
    parts = []
    for tensor in source.tensors:
        part = of_tensor(tensor)
        if isinstance(part, str):
            return part
        parts.append(part)
    if len({part.kind for part in parts}) > 1:
        return "their tensors are stored in several ways"

    def joined(each: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if source.recipe == "plain":
            return view(each[0], source)
        if source.recipe == "concat":
            return view(np.concatenate(each), source)
        pair = 2 if source.recipe == "stack_pair" else 1
        return np.stack([view(np.concatenate(each[i : i + pair]), source) for i in range(0, len(each), pair)])

    scales = parts[0].scales
    if scales is not None:
        scales = replace(scales, places=joined([p.scales.places for p in parts if p.scales is not None]))
    return replace(parts[0], places=joined([p.places for p in parts]), scales=scales)
