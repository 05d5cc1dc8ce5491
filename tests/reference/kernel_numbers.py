"""Weights as a kernel sees them, in float64, and the error that f32 arithmetic may make."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hetcomp.backends import packing

Doubles = npt.NDArray[np.float64]

EPS = float(np.finfo(np.float32).eps)


def draw(rng: np.random.Generator, shape: tuple[int, ...], weight_format: str = "f32") -> npt.NDArray[np.float32]:
    """Normal numbers that the format holds exactly: reference and kernel then use the same weights."""
    numbers = rng.standard_normal(shape).astype(np.float32)
    return numbers if weight_format == "f32" else packing.to_f32(packing.to_bf16_bits(numbers))


def dot_error(terms: int, magnitude: Doubles) -> Doubles:
    """Bound on the error of an f32 sum of ``terms`` products whose absolute values sum to ``magnitude``.

    Rounding errors of a sum grow like a random walk, sqrt(terms) units in the last place; 4 more for the last
    additions and the epilogue.
    """
    return EPS * (4 + np.sqrt(terms)) * magnitude
