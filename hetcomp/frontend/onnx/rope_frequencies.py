"""The frequencies of a rotary embedding, from the cosines and sines that a graph has for some positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hetcomp.frontend.onnx.not_computable import NotComputable

_Doubles = npt.NDArray[np.float64]
# Of the angle's own rounding, position * frequency in f32, and of a frequency's: three halves of a unit each.
_ROUNDING = 3 * 2.0**-24
# Of tables that are rounded: a cosine's and a sine's unit, of which angles come at the table's begin and end.
_UNITS = 4
_TOLERANCE = 2e-6  # of cosines in f32, half of whose error comes from the angle's


@dataclass(frozen=True)
class RopeFrequencies:
    """See ir.ops.RopeTable. ``unit``: how far the cosines that they come from are rounded, for a scaling of 1."""

    inv_freq: tuple[float, ...]
    scaling: float
    unit: float = 0.0

    def check(self, cos: Tensor, sin: Tensor, past: int) -> None:
        """Raises NotComputable if these are not the cosines and sines from position ``past`` on."""
        positions = np.arange(past, past + len(cos), dtype=np.float64)[:, None]
        angles = positions * np.asarray(self.inv_freq)
        bound = (_TOLERANCE + _UNITS * self.unit + angles * _ROUNDING) * self.scaling
        for got, want in ((cos, np.cos(angles)), (sin, np.sin(angles))):
            if not (np.abs(got.double().numpy() - want * self.scaling) <= bound).all():
                raise NotComputable("has angles that are no multiples of the position; hetcomp cannot compile it")


def rounding_of(cos: Tensor) -> float:
    """0 for a table in f32; of one that was rounded to fp16 or bf16 the largest error relative to its scaling."""
    for dtype, unit in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        if torch.equal(cos.to(dtype).float(), cos.float()):
            return unit
    return 0.0


def fit(cos: Tensor, sin: Tensor, past: int, constants: Iterable[Tensor]) -> RopeFrequencies:
    """The table that has ``cos`` and ``sin`` [n, rotary_dim / 2] for the positions from ``past`` on, in the numbers of
    the model's own constants or of a whole base where these are it. Raises NotComputable if there is none."""
    scalings = np.hypot(cos.double().numpy(), sin.double().numpy())
    scaling, unit = float(scalings.mean()), rounding_of(cos)
    tolerance = _TOLERANCE + 2 * unit  # a cosine's and a sine's
    if scaling <= 0 or np.abs(scalings - scaling).max() > tolerance * scaling:
        raise NotComputable("scales positions or dimensions differently; hetcomp cannot compile it")
    scaling = 1.0 if abs(scaling - 1.0) < tolerance else float(np.float32(scaling))
    estimate = _estimate(cos, sin, past)
    half = len(estimate)
    candidates = [c.double().numpy().reshape(-1) for c in constants if c.is_floating_point()]
    for base in _bases(estimate):
        # As transformers computes them, to the bit: numpy's powers are others.
        powers = base ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
        candidates.append((1.0 / powers).numpy())
    for candidate in [*candidates, estimate]:
        if np.allclose(candidate, estimate, rtol=1e-5, atol=1e-9 + _UNITS * unit / len(cos)):
            table = RopeFrequencies(tuple(float(f) for f in candidate.astype(np.float32)), scaling, unit)
            table.check(cos, sin, past)
            return table
    raise AssertionError("the estimate is near itself")


def _estimate(cos: Tensor, sin: Tensor, past: int) -> _Doubles:
    """Frequencies from angles: the difference of neighbours, then over ever more positions, whose turns are known."""
    angles = np.arctan2(sin.double().numpy(), cos.double().numpy())
    turn = 2 * np.pi
    frequencies: _Doubles = np.mod(angles[1] - angles[0] + np.pi, turn) - np.pi
    distance = 2
    while distance < len(angles):
        frequencies = _refined(angles[distance] - angles[0], frequencies, distance)
        distance *= 2
    last = past + len(angles) - 1
    return _refined(angles[-1], _refined(angles[-1] - angles[0], frequencies, len(angles) - 1), last)


def _refined(angle: _Doubles, frequencies: _Doubles, distance: int) -> _Doubles:
    turns = np.round((distance * frequencies - angle) / (2 * np.pi))
    made: _Doubles = (angle + 2 * np.pi * turns) / distance
    return made


def _bases(frequencies: _Doubles) -> list[float]:
    """Whole numbers near the base that the second frequency follows from, the roundest first: next to 1,000,000 other
    numbers fit some positions as well, but not those far behind."""
    if len(frequencies) < 2 or not 0 < frequencies[1] < 1:
        return []
    base = float(frequencies[1] ** -len(frequencies))
    digits = [10.0**k for k in range(5, -1, -1)]
    rounded = dict.fromkeys(round(base / d) * d for d in digits if base > d)
    return [b for b in rounded if b and abs(b - base) < 1e-3 * base]
