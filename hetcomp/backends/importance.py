"""How much each column of a weight matters to the quantiser: the importance file.

A safetensors file with, for each weight's name, f32 [K], or [E, K] for a weight of E experts: the mean square of the
activations that column meets in typical text, or anything in proportion. Weights that it does not name have
columns that matter alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value

_Floats = npt.NDArray[np.float32]


class Importance:
    """Importance by weight name; checked against the weights it is for."""

    def __init__(self, vectors: Mapping[str, _Floats], weights: Iterable[Value], origin: str) -> None:
        """weights: the model's. origin: for messages. Raises HetcompError naming the first entry that is for no packed
        weight, has another shape than [K] or [E, K], or holds a negative or non-finite number."""
        self._vectors = {name: np.ascontiguousarray(vector, np.float32) for name, vector in vectors.items()}
        shapes = {v.fqn: _allowed(v) for v in weights if v.fqn is not None and _applies(v)}
        for name, vector in self._vectors.items():
            if name not in shapes:
                raise HetcompError(
                    f"{origin} gives importance to {name}, which is no quantisable weight of this model; "
                    "was the file made for another model?"
                )
            if vector.shape not in shapes[name]:
                wanted = " or ".join(str(list(shape)) for shape in shapes[name])
                raise HetcompError(f"{origin}: {name} has importance of shape {list(vector.shape)}, expected {wanted}.")
            if not (np.isfinite(vector).all() and (vector >= 0).all()):
                raise HetcompError(
                    f"{origin}: the importance of {name} has negative, infinite or NaN numbers; "
                    "expected mean squares of activations."
                )

    @staticmethod
    def load(path: Path, weights: Iterable[Value]) -> Importance:
        """Reads the file; peak memory is its size. Raises HetcompError if it is damaged or for another model."""
        try:
            vectors = load_file(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HetcompError(f"Importance file {path} cannot be read: {error}.") from None
        return Importance(vectors, weights, str(path))

    def of(self, value: Value, expert: int | None = None) -> _Floats | None:
        """f32 [K], or [E, K] if all experts of ``value`` are asked for; None if nothing is known."""
        vector = self._vectors.get(value.fqn or "") if _applies(value) else None
        return vector[expert] if vector is not None and vector.ndim == 2 and expert is not None else vector


def _applies(value: Value) -> bool:
    """Importance is of the parameter's columns; a part that is cut out and transposed has others."""
    return value.type.layout != packing.ROW_MAJOR and not (value.view is not None and value.view.head_transpose)


def _allowed(value: Value) -> tuple[tuple[int, ...], ...]:
    shape = tuple(int(d) for d in value.type.shape)
    of_experts = len(shape) == 3 and (value.view is None or value.view.head_split is None)
    return (shape[-1:], (shape[0], shape[-1])) if of_experts else (shape[-1:],)
