"""Weights and activations as a kernel sees them, in float64, and the error that its arithmetic may make."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends import packing
from hetcomp.backends.cpu_isa import CpuIsa
from hetcomp.ir.plan import Value

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

EPS = float(np.finfo(np.float32).eps)
GROUP = 32  # activations that share a scale beside whole-number weights


def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Normal numbers."""
    return rng.standard_normal(shape).astype(np.float32)


def packed(numbers: Floats, value: Value) -> tuple[npt.NDArray[np.uint8], Floats]:
    """The weight as it is stored, and the numbers that the stored bytes mean."""
    data, finite = packing.pack(numbers, value)
    assert finite
    return data, packing.unpack(data, value)


def dot_error(terms: int, magnitude: Doubles) -> Doubles:
    """Bound on the error of an f32 sum of ``terms`` products whose absolute values sum to ``magnitude``.

    Rounding errors of a sum grow like a random walk, sqrt(terms) units in the last place; 4 more for the last
    additions and the epilogue.
    """
    return EPS * (4 + np.sqrt(terms)) * magnitude


def seen(x: Floats, weight_format: str, isa: CpuIsa, many: bool) -> Doubles:
    """Activations [.., K] as the kernel multiplies them: int8 in groups of 32 beside whole-number weights, bf16 in
    tiles of bf16 (``many`` tokens), else as they are."""
    family = isa.gemm(weight_format) if many else ("int8" if isa.whole_numbers(weight_format) else "float")
    if family in ("bf16", "amx"):
        return packing.to_f32(packing.to_bf16_bits(x)).astype(np.float64)
    return quantised(x) if family == "int8" else x.astype(np.float64)


def quantised(x: Floats) -> Doubles:
    """Multiples of max |x| / 127 of each group of 32, rounded in f32 as the kernels do."""
    k = x.shape[-1]
    wide = np.zeros((*x.shape[:-1], -(-k // GROUP) * GROUP), np.float32)
    wide[..., :k] = x
    groups = wide.reshape(*x.shape[:-1], wide.shape[-1] // GROUP, GROUP)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(groups * inverse)
    back: Any = codes.astype(np.float64) * (top * np.float32(1 / 127)).astype(np.float64)
    return back.reshape(wide.shape)[..., :k]


def rounding_of(x: Doubles, weight_format: str, isa: CpuIsa, many: bool) -> Doubles:
    """Bound, element by element, on what :func:`seen` changes: half a step of the group's scale, with a part of a step
    for the f32 arithmetic before; or half a unit in the last place of bf16."""
    family = isa.gemm(weight_format) if many else ("int8" if isa.whole_numbers(weight_format) else "float")
    if family in ("bf16", "amx"):
        return np.abs(x) * 2.0**-8
    if family == "float":
        return np.zeros_like(x)
    k = x.shape[-1]
    wide = np.zeros((*x.shape[:-1], -(-k // GROUP) * GROUP))
    wide[..., :k] = np.abs(x)
    top = wide.reshape(*x.shape[:-1], wide.shape[-1] // GROUP, GROUP).max(axis=-1)
    return np.repeat(top * (0.5 + 1e-4) / 127, GROUP, axis=-1)[..., :k]


def weight_rounding(weight_format: str, isa: CpuIsa, many: bool) -> float:
    """Relative error of a weight in a tile of bf16 that holds number and scale in one."""
    return 2.0**-8 if many and isa.gemm(weight_format) == "amx" and weight_format not in ("f32", "bf16") else 0.0
