"""The weights of a GGUF model, by transformers' parameters."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.frontend.checkpoint import BaseCheckpoint, read_tensor
from hetcomp.frontend.gguf.block_types import BY_NAME
from hetcomp.frontend.gguf.blocks import QUANTISED, decode
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.frontend.gguf.stored_orders import StoredOrders
from hetcomp.frontend.gguf.tensor_names import ARCHITECTURES, GATE_UP, stored_as
from hetcomp.frontend.key_mapping import Parts
from hetcomp.frontend.quantised_rows import rows_of
from hetcomp.frontend.row_places import FLOATS, block_rows, number_rows
from hetcomp.ir.plan import CheckpointTensor, Quantised, Value, WeightSource
from hetcomp.quantised_numbers import BLOCK, K_SCALES, QuantisedNumbers
from hetcomp.stored_rows import StoredRows

_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
# Of tensors that are views of the parameter: DeepSeek's key projection, transposed, and value projection,
# [heads, .., ..] each; what Qwen3-Next projects to queries, keys and values, and to z.
_IN_PARTS = "in_parts"
# What configs are made from.
_NOT_WEIGHTS = ("rope_freqs.weight",)


class GgufCheckpoint(BaseCheckpoint):
    """Tensors of GGUF files. Only headers are read before ``read``."""

    readable = f"F32, F16, BF16, {', '.join(QUANTISED)}"

    def __init__(
        self,
        files: ModelFiles,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        aliases: Mapping[str, tuple[str, ...]],
    ) -> None:
        """config: what model_config made of the files. shapes: of the model's parameters. Raises HetcompError if gate
        and up projections of experts do not fit together."""
        self._folder = files.path.parent
        assert config["model_type"] in ARCHITECTURES
        self._orders = StoredOrders.of(config)
        tensors = {name: _described(t, self._orders) for name, t in files.tensors.items() if name not in _NOT_WEIGHTS}
        parts: dict[str, Parts] = {}
        for parameter, shape in shapes.items():
            names = next((n for n in stored_as(parameter) if all(name in tensors for name in n)), None)
            if names is None:
                continue
            if len(names) == 1:
                tensors[names[0]] = _with_unit_axes(tensors[names[0]], shape)
                parts[parameter] = Parts("plain", names)
            elif GATE_UP in parameter:
                parts[parameter] = _pairs(tensors, names, str(files.path))
            else:
                parts[parameter] = Parts(_IN_PARTS, names)
        self._files = {name: number for number, name in enumerate(sorted({t.file for t in tensors.values()}))}
        self._paths = tuple((self._folder / name).absolute() for name in self._files)
        super().__init__(str(files.path), tensors, parts, aliases)

    @property
    def quantised(self) -> bool:
        """Whether any tensor is."""
        return any(t.quantised is not None for t in self._tensors.values())

    def source(self, value: Value) -> WeightSource:
        """See ir.target.Checkpoint."""
        parts = self._find(value)
        if parts.recipe != _IN_PARTS:
            return super().source(value)
        # The file has both views of the parameter as tensors of their own.
        assert value.view is not None
        first = value.view.row_runs[0][0] == 0 if value.view.row_runs else value.view.head_transpose
        name = parts.names[0 if first else 1]
        return self._checked(value, WeightSource("plain", (self._tensors[name],)))

    def _view(self, value: Value, tensors: tuple[CheckpointTensor, ...]) -> WeightSource:
        # GGUF has all matrices as [out, in], and gate and up apart, whatever the parameter's own order is.
        return replace(value.view or WeightSource("plain", ()), transpose=False, deinterleave=False)

    def _numbers(self, tensor: CheckpointTensor, row: int | None = None) -> npt.NDArray[np.generic] | QuantisedNumbers:
        raw = self._raw(tensor, row)
        return self._orders.apply(raw if tensor.quantised is None else decode(tensor.dtype, raw), tensor.name)

    def _rows(
        self, tensor: CheckpointTensor, runs: Sequence[tuple[int, int]]
    ) -> Generator[npt.NDArray[Any] | QuantisedNumbers]:
        if self._orders.changes(tensor.name):
            yield from super()._rows(tensor, runs)
        else:
            yield from (self._numbers(rows_of(tensor, *run)) for run in runs)

    def _tensor_rows(self, tensor: CheckpointTensor, by_number: bool) -> StoredRows | str:
        number = self._files[tensor.file]
        if tensor.quantised is not None:
            rows = block_rows(tensor, tensor.dtype, number, self._paths)
        elif tensor.dtype in FLOATS:
            rows = number_rows(tensor, number, self._paths, by_number)
        else:
            return f"{tensor.dtype} is converted"
        places = self._orders.row_places(rows.places, tensor.name)
        return places if isinstance(places, str) else replace(rows, places=places)

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> npt.NDArray[Any]:
        kind = BY_NAME[tensor.dtype]
        shape = tensor.shape if row is None else tensor.shape[1:]
        size = math.prod(shape) // kind.size * kind.bytes
        dtype = np.dtype(_FLOATS.get(tensor.dtype, np.uint8))
        offset = tensor.offset + (row or 0) * size
        data = read_tensor(self._folder / tensor.file, tensor.name, offset, dtype, size // dtype.itemsize)
        if tensor.quantised is not None:
            return data.reshape(*shape[:-1], -1)
        numbers = data.reshape(shape)
        return numbers.astype(np.float32) if tensor.dtype == "F64" else numbers


def _described(tensor: CheckpointTensor, orders: StoredOrders) -> CheckpointTensor:
    """The tensor; of a block type, with what it is quantised as."""
    kind = QUANTISED.get(tensor.dtype)
    if kind is None:
        return tensor
    form, inexact = kind.format, kind.inexact
    block = BLOCK if form in K_SCALES else kind.group
    if orders.cuts(tensor.name, block):
        form, inexact = "q8", f"llama.cpp has its columns in an order of its own, which cuts blocks of {block}"
    quantised = Quantised(
        tensor.dtype,
        f"GGUF {tensor.dtype}",
        (1, kind.group),
        (("codes", tensor),),
        form,
        inexact,
        BY_NAME[tensor.dtype].bits,
    )
    return replace(tensor, quantised=quantised)


def _with_unit_axes(tensor: CheckpointTensor, shape: tuple[int, ...]) -> CheckpointTensor:
    """GGUF drops axes of length 1, as of the gate of Qwen's shared expert, [1, hidden]."""
    same = [d for d in tensor.shape if d != 1] == [d for d in shape if d != 1]
    return replace(tensor, shape=shape) if same else tensor


def _pairs(tensors: dict[str, CheckpointTensor], names: tuple[str, ...], origin: str) -> Parts:
    """Gate and up of all experts, which become tensors of their own in ``tensors``."""
    pair = [tensors[name] for name in names]
    experts = pair[0].shape[0]
    if any(len(t.shape) < 2 or t.shape[0] != experts for t in pair):
        raise HetcompError(
            f"{origin}: tensor {names[0]} has shape {list(pair[0].shape)}, {names[1]} has {list(pair[1].shape)}; "
            "expected those of as many experts"
        )
    for tensor in pair:
        tensors.pop(tensor.name, None)
        each = tensor.bytes // experts
        for expert in range(experts):
            name = f"{tensor.name}[{expert}]"
            offset = tensor.offset + expert * each
            tensors[name] = replace(tensor, name=name, shape=tensor.shape[1:], offset=offset, bytes=each)
    return Parts("stack_pair", tuple(f"{name}[{expert}]" for expert in range(experts) for name in names))
