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


class OnnxCheckpoint(BaseCheckpoint):
    """Tensors in an .onnx file or beside it. Only headers are read before ``read``."""

    def __init__(self, file: OnnxFile, parameters: Mapping[str, Parameter], unread: Iterable[str]) -> None:
        """unread: tensors of the file that no node reads which the logits depend on."""
        self._file = file
        self._parameters = parameters
        self._unread = sorted(unread)
        tensors = {name: file.graph.initialisers[name] for p in parameters.values() for name in p.tensors}
        parts = {fqn: Parts("plain", p.tensors) for fqn, p in parameters.items()}
        super().__init__(str(file.path), tensors, parts, {})

    def unused(self, weights: Iterable[Value]) -> list[str]:
        """Tensors that the logits do not depend on, sorted."""
        return self._unread

    def _view(self, value: Value, tensors: tuple[CheckpointTensor, ...]) -> WeightSource:
        view = super()._view(value, tensors)
        turned = self._parameters[value.fqn or value.id].transposed
        return replace(view, transpose=view.transpose != turned)

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> npt.NDArray[np.generic]:
        return self._file.numbers(tensor, row)
