"""The weights of an ONNX model, by the names that its graph was read with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.frontend.key_mapping import Parts
from hetcomp.frontend.onnx.model_file import OnnxFile
from hetcomp.frontend.onnx.parameters import Parameter
from hetcomp.ir.plan import CheckpointTensor, Value, WeightSource
from hetcomp.quantised_numbers import QuantisedNumbers, joined


class OnnxCheckpoint(BaseCheckpoint):
    """Tensors in an .onnx file or beside it. Only headers are read before ``read``."""

    def __init__(self, file: OnnxFile, parameters: Mapping[str, Parameter], unread: Iterable[str]) -> None:
        """unread: tensors of the file that no node reads which the logits depend on."""
        self._file = file
        self._parameters = parameters
        self._unread = sorted(unread)
        tensors = {fqn: _described(file, p) for fqn, p in parameters.items()}
        parts = {fqn: Parts("plain", (fqn,)) for fqn in parameters}
        super().__init__(str(file.path), tensors, parts, {})

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
        packed = self._parameters[tensor.name].packed
        if packed is None or tensor.quantised is None:
            return super()._numbers(tensor, row)
        if row is None and len(packed.shape) > 2:
            experts = [self._numbers(tensor, expert)[None] for expert in range(packed.shape[0])]
            made = [e for e in experts if isinstance(e, QuantisedNumbers)]
            return joined(made) if made else np.concatenate([e for e in experts if isinstance(e, np.ndarray)])
        return packed.decode({name: self._file.numbers(part, row) for name, part in tensor.quantised.parts})

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> npt.NDArray[np.generic]:
        stored = self._file.graph.initialisers[self._parameters[tensor.name].tensor]
        return self._file.numbers(stored, row)


def _described(file: OnnxFile, parameter: Parameter) -> CheckpointTensor:
    """The tensor behind a parameter, under the parameter's name."""
    if parameter.packed is not None:
        return parameter.packed.described(parameter.fqn, file.graph.initialisers)
    return replace(file.graph.initialisers[parameter.tensor], name=parameter.fqn)
