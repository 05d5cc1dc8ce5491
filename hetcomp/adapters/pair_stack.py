"""All pairs of a weight as one array each, with one rank and one scale: what other formats store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetcomp.adapters.low_rank import AdaptedWeight, Floats


@dataclass(frozen=True, eq=False)
class PairStack:
    """a: f32 [n, r, in], b: f32 [n, out, r] of n experts, 1 for a matrix; ``exact``: they are the stored numbers."""

    a: Floats
    b: Floats
    scale: float
    exact: bool

    @property
    def rank(self) -> int:
        """The r of all."""
        return int(self.a.shape[1])

    def filled_up(self, rank: int) -> PairStack:
        """The same of a larger rank, with zeros."""
        more = rank - self.rank
        a = np.pad(self.a, ((0, 0), (0, more), (0, 0)))
        return PairStack(a, np.pad(self.b, ((0, 0), (0, 0), (0, more))), self.scale, self.exact)


def stack_of(weight: AdaptedWeight) -> PairStack:
    """The pairs of a weight; smaller ranks are filled up with zeros, different scales multiplied into b."""
    count, rank = len(weight.factors), weight.rank
    scale = common_scale(weight)
    alike = scale is not None
    a = np.zeros((count, rank, weight.in_features), np.float32)
    b = np.zeros((count, weight.out_features, rank), np.float32)
    for expert in range(count):
        pair = weight.pair(expert)
        a[expert, : pair.rank] = pair.a
        b[expert, :, : pair.rank] = pair.b if alike else np.float32(pair.scale) * pair.b
    return PairStack(a, b, scale if scale is not None else 1.0, alike)


def common_scale(weight: AdaptedWeight) -> float | None:
    """The scale of all of the weight's pairs; None: they have different ones."""
    scales = {factor.scale for factors in weight.factors for factor in factors}
    return scales.pop() if len(scales) == 1 else None


def gate_and_up(weight: AdaptedWeight, stack: PairStack) -> tuple[PairStack, PairStack]:
    """The stack of a gate_up weight as one for its gate rows and one for its up rows, without the ranks that are zero
    in all of its half's b: those of a block-diagonal b."""
    half = weight.out_features // 2
    rows = (np.s_[0::2], np.s_[1::2]) if weight.interleaved else (np.s_[:half], np.s_[half:])
    gate, up = (_without_zeros(PairStack(stack.a, stack.b[:, r], stack.scale, stack.exact)) for r in rows)
    return gate, up


def _without_zeros(stack: PairStack) -> PairStack:
    used = np.flatnonzero(stack.b.any(axis=(0, 1)))
    if not used.size:
        used = np.arange(1)
    return PairStack(stack.a[:, used], stack.b[:, :, used], stack.scale, stack.exact)
