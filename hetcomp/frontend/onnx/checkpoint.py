"""The weights of an ONNX model, by the names that its graph was read with."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.act_order import Groups
from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.frontend.key_mapping import Parts
from hetcomp.frontend.onnx.dequantised_weights import Dequantised
from hetcomp.frontend.onnx.model_file import INLINE, OnnxFile
from hetcomp.frontend.onnx.packed_weights import Packed
from hetcomp.frontend.onnx.parameters import Parameter
from hetcomp.frontend.onnx.torch_ops import from_numpy
from hetcomp.frontend.quantised_rows import rows_of
from hetcomp.frontend.row_places import FLOATS, number_rows
from hetcomp.ir.plan import CheckpointTensor, Value, WeightSource
from hetcomp.quantised_numbers import QuantisedNumbers, joined
from hetcomp.stored_rows import StoredRows


class OnnxCheckpoint(BaseCheckpoint):
    """Tensors in an .onnx file or beside it. Only headers are read before ``read``."""

    def __init__(self, file: OnnxFile, parameters: Mapping[str, Parameter], unread: Iterable[str]) -> None:
        """unread: tensors of the file that no node reads which the logits depend on."""
        self._file = file
        self._parameters = parameters
        self._unread = sorted(unread)
        tensors: dict[str, CheckpointTensor] = {}
        parts: dict[str, Parts] = {}
        # By the name of one expert's half of a pair: the half, all of it as a tensor, and the number of the expert.
        self._experts: dict[str, tuple[Parameter, CheckpointTensor, int]] = {}
        for fqn, parameter in parameters.items():
            if parameter.halves is None:
                tensors[fqn] = _described(file, parameter)
                parts[fqn] = Parts("plain", (fqn,))
            else:
                parts[fqn] = Parts("stack_pair", self._pair(parameter.halves, tensors))
        names = sorted({t.file for t in file.graph.initialisers.values()} - {INLINE})
        self._files = {name: number for number, name in enumerate(names)}
        self._paths = tuple((file.path.parent / name).absolute() for name in names)
        super().__init__(str(file.path), tensors, parts, {})

    def _pair(self, halves: tuple[Parameter, Parameter], tensors: dict[str, CheckpointTensor]) -> tuple[str, ...]:
        """Names of the matrices of all experts, a half after the other, which become tensors of their own."""
        names = []
        whole = [_described(self._file, half) for half in halves]
        for expert in range(halves[0].shape[0]):
            for half, tensor in zip(halves, whole, strict=True):
                name, each = f"{half.fqn}[{expert}]", tensor.bytes // half.shape[0]
                offset = tensor.offset + expert * each
                tensors[name] = replace(tensor, name=name, shape=tensor.shape[1:], offset=offset, bytes=each)
                self._experts[name] = half, tensor, expert
                names.append(name)
        return tuple(names)

    def _groups(self, tensor: CheckpointTensor) -> Groups:
        packed = self._parameters[tensor.name].packed
        assert isinstance(packed, Packed) and tensor.quantised is not None
        return packed.groups_of(self._file.numbers(tensor.quantised.part("groups"), None), tensor)

    @property
    def quantised(self) -> bool:
        """Whether any tensor is."""
        return any(t.quantised is not None for t in self._tensors.values())

    def unused(self, weights: Iterable[Value]) -> list[str]:
        """Tensors that the logits do not depend on, sorted."""
        return self._unread

    def _view(self, value: Value, tensors: tuple[CheckpointTensor, ...]) -> WeightSource:
        view = super()._view(value, tensors)
        turned = self._parameters[value.fqn or value.id].transposed
        return replace(view, transpose=view.transpose != turned)

    def _numbers(self, tensor: CheckpointTensor, row: int | None = None) -> npt.NDArray[np.generic] | QuantisedNumbers:
        parameter, whole, at = self._place(tensor, row)
        packed = parameter.packed
        if parameter.log_of:
            numbers = from_numpy(self._raw(tensor, row), bits=whole.dtype == "BF16")
            return np.asarray((numbers * parameter.log_of).double().log().float())
        if packed is None or whole.quantised is None:
            return super()._numbers(tensor, row)
        if at is None and len(packed.shape) > 2:
            experts = [self._numbers(tensor, expert)[None] for expert in range(packed.shape[0])]
            made = [e for e in experts if isinstance(e, QuantisedNumbers)]
            return joined(made) if made else np.concatenate([e for e in experts if isinstance(e, np.ndarray)])
        parts = {name: self._file.numbers(part, at) for name, part in whole.quantised.parts}
        return packed.decode(parts, whole.dtype) if isinstance(packed, Dequantised) else packed.decode(parts, tensor)

    def _rows(
        self, tensor: CheckpointTensor, runs: Sequence[tuple[int, int]]
    ) -> Generator[npt.NDArray[Any] | QuantisedNumbers]:
        parameter, whole, at = self._place(tensor, None)
        packed = parameter.packed
        if packed is None and at is None and not parameter.log_of:
            stored = self._file.graph.initialisers[parameter.tensor]
            numbers = (self._file.numbers(rows_of(stored, *run)) for run in runs)
            yield from (n.astype(np.float32) if n.dtype == np.float64 else n for n in numbers)
        elif isinstance(packed, Packed) and at is None and packed.has_rows(whole):
            for start, stop in runs:
                part = packed.rows(whole, start, stop)
                assert part.quantised is not None
                parts = {name: self._file.numbers(stored) for name, stored in part.quantised.parts}
                yield replace(packed, shape=part.shape).decode(parts, part)
        elif isinstance(packed, Dequantised) and at is None and packed.has_rows(whole.dtype, [r[0] for r in runs]):
            assert whole.quantised is not None
            parts = {name: self._file.numbers(stored) for name, stored in whole.quantised.parts}
            yield from (packed.decode(parts, whole.dtype, run) for run in runs)
        else:
            yield from super()._rows(tensor, runs)

    def _tensor_rows(self, tensor: CheckpointTensor, by_number: bool) -> StoredRows | str:
        parameter, whole, at = self._place(tensor, None)
        if parameter.log_of:
            return "its numbers are computed from what is stored"
        stored = [tensor] if whole.quantised is None else [part for _, part in whole.quantised.parts]
        if any(part.file == INLINE for part in stored):
            return "its numbers are in the graph itself"
        if isinstance(parameter.packed, Packed):
            return parameter.packed.stored_rows(whole, at, self._files, self._paths)
        if whole.quantised is not None:
            return "DequantizeLinear's codes are no rows that kernels take over"
        if tensor.dtype not in FLOATS:
            return f"{tensor.dtype} is converted"
        return number_rows(tensor, self._files[tensor.file], self._paths, by_number)

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> npt.NDArray[np.generic]:
        parameter, _, at = self._place(tensor, row)
        return self._file.numbers(self._file.graph.initialisers[parameter.tensor], at)

    def _place(self, tensor: CheckpointTensor, row: int | None) -> tuple[Parameter, CheckpointTensor, int | None]:
        """The parameter whose tensor holds this one or its part ``row``, that tensor, and which part of it."""
        return self._experts.get(tensor.name) or (self._parameters[tensor.name], tensor, row)


def _described(file: OnnxFile, parameter: Parameter) -> CheckpointTensor:
    """The tensor behind a parameter, under the parameter's name."""
    if parameter.packed is not None:
        return parameter.packed.described(parameter.fqn, file.graph.initialisers)
    return replace(file.graph.initialisers[parameter.tensor], name=parameter.fqn)
