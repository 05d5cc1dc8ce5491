"""The weights of a folder of safetensors files, quantised or not."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.act_order import Groups
from hetcomp.frontend.checkpoint import NUMPY, BaseCheckpoint, read_tensor
from hetcomp.frontend.folder_tensors import folder_tensors
from hetcomp.frontend.key_mapping import map_checkpoint
from hetcomp.frontend.quantisation_config import QuantisationConfig, Stored
from hetcomp.frontend.quantised_codes import groups_of_columns, read_quantised
from hetcomp.frontend.quantised_rows import RowsOfParts, rows_of
from hetcomp.frontend.quantised_tensors import quantised_tensors
from hetcomp.frontend.row_places import FLOATS, coded_rows, number_rows
from hetcomp.ir.plan import CheckpointTensor
from hetcomp.quantised_numbers import QuantisedNumbers
from hetcomp.stored_rows import StoredRows

_Raw = npt.NDArray[Any]

# What quantised weights are stored in besides.
_CODES = {
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


class FolderCheckpoint(BaseCheckpoint):
    """safetensors files of a folder. Only headers are read before ``read``."""

    def __init__(
        self,
        folder: Path,
        parameters: Iterable[str],
        model_type: str,
        aliases: Mapping[str, tuple[str, ...]] | None = None,
        quantisation: QuantisationConfig | None = None,
    ) -> None:
        """Raises HetcompError naming a file that is missing, truncated or damaged, or a tensor that contradicts
        ``quantisation``."""
        tensors = folder_tensors(folder)
        if quantisation is not None:
            tensors = quantised_tensors(tensors, quantisation, str(folder))
        names = [*parameters, *(a for other in (aliases or {}).values() for a in other)]
        parts = map_checkpoint(tensors, names, model_type)
        super().__init__(str(folder), tensors, parts, aliases or {})
        self._folder = folder
        self._quantisation = quantisation
        # All that there are, by number: those of scales may be others than those of codes.
        stored = {t.file for t in tensors.values()} | {
            part.file for t in tensors.values() if t.quantised is not None for _, part in t.quantised.parts
        }
        self._files = {name: number for number, name in enumerate(sorted(stored))}
        self._paths = tuple((folder / name).absolute() for name in self._files)

    @property
    def quantised(self) -> bool:
        """Whether the config says so."""
        return self._quantisation is not None

    def _together(self, tensors: Sequence[CheckpointTensor]) -> _Raw | QuantisedNumbers:
        first = tensors[0]
        if not all(map(_follows, tensors, tensors[1:])):
            return super()._together(tensors)
        rows = sum(t.shape[0] for t in tensors)
        return self._numbers(replace(first, shape=(rows, *first.shape[1:]), bytes=sum(t.bytes for t in tensors)))

    def _groups(self, tensor: CheckpointTensor) -> Groups:
        assert tensor.quantised is not None
        return groups_of_columns(self._raw(tensor.quantised.part("groups"), None), self._stored(tensor), tensor)

    def _stored(self, tensor: CheckpointTensor) -> Stored:
        assert self._quantisation is not None
        stored = self._quantisation.stored(tensor.name.removesuffix(".weight"))
        assert stored is not None
        return stored

    def _numbers(self, tensor: CheckpointTensor, row: int | None = None) -> _Raw | QuantisedNumbers:
        if tensor.quantised is None:
            return super()._numbers(tensor, row)
        return read_quantised(tensor, self._stored(tensor), lambda part: self._raw(part, row))

    def _rows(self, tensor: CheckpointTensor, runs: Sequence[tuple[int, int]]) -> Generator[_Raw | QuantisedNumbers]:
        if tensor.quantised is None:
            yield from (self._numbers(rows_of(tensor, *run)) for run in runs)
            return
        stored = self._stored(tensor)
        parts = RowsOfParts.of(tensor, stored, [start for start, _ in runs], lambda part: self._raw(part, None))
        if parts is None:
            yield from super()._rows(tensor, runs)
            return
        for start, stop in runs:
            yield read_quantised(parts.matrix(start, stop), stored, parts.reading(start, stop))

    def _tensor_rows(self, tensor: CheckpointTensor, by_number: bool) -> StoredRows | str:
        if tensor.quantised is None:
            if tensor.dtype not in FLOATS:
                return f"{tensor.dtype} is converted"
            return number_rows(tensor, self._files[tensor.file], self._paths, by_number)
        return coded_rows(tensor, self._stored(tensor), self._files, self._paths)

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> _Raw:
        dtype = np.dtype((NUMPY | _CODES)[tensor.dtype])
        shape = tensor.shape if row is None else tensor.shape[1:]
        count = math.prod(shape)
        offset = tensor.offset + (row or 0) * count * dtype.itemsize
        return read_tensor(self._folder / tensor.file, tensor.name, offset, dtype, count).reshape(shape)


def _follows(first: CheckpointTensor, second: CheckpointTensor) -> bool:
    """Whether ``second`` goes on where ``first`` ends, with numbers of the same kind."""
    place, end = (second.file, second.offset), (first.file, first.offset + first.bytes)
    alike = (first.dtype, first.shape[1:]) == (second.dtype, second.shape[1:])
    return place == end and alike and first.quantised is None and second.quantised is None
