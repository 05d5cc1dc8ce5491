"""How much each column of a weight matters to the quantiser: the importance file.

A safetensors file with, for each weight's name, f32 [K], or [E, K] for a weight of E experts: the mean square of the
activations that column meets in typical text, or anything in proportion. Weights that it does not name have
columns that matter alike. It may have second moments besides, under the weight's name and ``.second_moments``: f32
[K, K] or [E, K, K], the means of x x^T; with these q4 and mxfp4 are packed with error feedback.
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
MOMENTS = ".second_moments"


class Importance:
    """Importance by weight name; checked against the weights it is for."""

    def __init__(self, vectors: Mapping[str, _Floats], weights: Iterable[Value], origin: str) -> None:
        """weights: the model's. origin: for messages. Raises HetcompError naming the first entry that is for no packed
        weight, has another shape than said above, or holds a non-finite number or a negative mean square."""
        self._vectors = {name: np.ascontiguousarray(vector, np.float32) for name, vector in vectors.items()}
        shapes = {v.fqn: _allowed(v) for v in weights if v.fqn is not None and _applies(v)}
        for name, vector in self._vectors.items():
            moments, of = name.endswith(MOMENTS), name.removesuffix(MOMENTS)
            if of not in shapes:
                raise HetcompError(
                    f"{origin} gives importance to {of}, which is no quantisable weight of this model; "
                    "was the file made for another model?"
                )
            allowed = [(*shape, shape[-1]) if moments else shape for shape in shapes[of]]
            if vector.shape not in allowed:
                wanted = " or ".join(str(list(shape)) for shape in allowed)
                raise HetcompError(f"{origin}: {name} has importance of shape {list(vector.shape)}, expected {wanted}.")
            squares = np.diagonal(vector, axis1=-2, axis2=-1) if moments else vector
            if not (np.isfinite(vector).all() and (squares >= 0).all()):
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

    def second_moments(self, value: Value, expert: int | None = None) -> _Floats | None:
        """f32 [K, K] of the matrix or of one expert of ``value``; None if nothing is known."""
        moments = self._vectors.get(f"{value.fqn}{MOMENTS}") if _applies(value) else None
        if moments is None or moments.ndim == 2:
            return moments
        return None if expert is None else moments[expert]


def _applies(value: Value) -> bool:
    """Importance is of the parameter's columns; a part that is cut out and transposed has others."""
    return value.type.layout != packing.ROW_MAJOR and not (value.view is not None and value.view.head_transpose)


def _allowed(value: Value) -> tuple[tuple[int, ...], ...]:
    shape = tuple(int(d) for d in value.type.shape)
    of_experts = len(shape) == 3 and (value.view is None or value.view.head_split is None)
    return (shape[-1:], (shape[0], shape[-1])) if of_experts else (shape[-1:],)
