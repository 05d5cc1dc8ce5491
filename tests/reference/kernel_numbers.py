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


def to_q8_cache(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The bytes of a q8 KV cache that holds ``numbers`` [slots, heads, context, dim], [slots, heads, bytes]: the codes
    of all rows, then their scales (``DType.Q8``). A scale is the fp16 number at or above the group's largest magnitude
    / 127; a group that is not finite has the scale NaN."""
    slots, heads, context, dim = numbers.shape
    groups = -(-dim // 32)
    padded = np.zeros((slots, heads, context, groups, 32), np.float32)
    padded.reshape(slots, heads, context, groups * 32)[..., :dim] = numbers
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = np.abs(padded).max(-1) / np.float32(127)
        scales = wanted.astype(np.float16)
        scales = np.where(scales.astype(np.float32) < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
        scales[~np.isfinite(wanted)] = np.nan
        steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
        codes = np.rint(padded / steps[..., None])
    codes[np.isnan(scales)] = 0
    flat = slots, heads, -1
    return np.concatenate(
        [codes.astype(np.int8).view(np.uint8).reshape(flat), scales.view(np.uint8).reshape(flat)], axis=-1
    )


def from_q8_cache(stored: npt.NDArray[np.uint8], context: int, dim: int) -> npt.NDArray[np.float32]:
    """The numbers [slots, heads, context, dim] that the bytes [slots, heads, bytes] of a q8 KV cache stand for."""
    slots, heads, _ = stored.shape
    groups = -(-dim // 32)
    codes = np.ascontiguousarray(stored[..., : context * groups * 32]).view(np.int8)
    scales = np.ascontiguousarray(stored[..., context * groups * 32 :]).view(np.float16).astype(np.float32)
    numbers = codes.reshape(slots, heads, context, groups, 32) * scales.reshape(slots, heads, context, groups, 1)
    return numbers.reshape(slots, heads, context, groups * 32)[..., :dim].astype(np.float32)


def dot_error(terms: int, magnitude: Doubles) -> Doubles:
    """Bound on the error of an f32 sum of ``terms`` products whose absolute values sum to ``magnitude``.

    Rounding errors of a sum grow like a random walk, sqrt(terms) units in the last place; 4 more for the last
    additions and the epilogue.
    """
    return EPS * (4 + np.sqrt(terms)) * magnitude
