"""Sampled and recorded routings: how many tokens of a step each expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Above this many tokens each expert's number is drawn on its own: the fixed sum over experts no longer matters.
INDEPENDENT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step with recorded routing: ``choices`` [MoE layers, tokens, top_k]. ``held`` bool [layers with an expert
    cache, experts]: what the cache holds in it (None: what it holds at load); ``copied_bytes``: of experts that are
    copied to it meanwhile."""

    choices: NDArray[np.integer]
    held: NDArray[np.bool_] | None = None
    copied_bytes: int = 0

    def tokens(self, moe_layer: int, experts: int) -> NDArray[np.int64]:
        """Tokens by expert of the layer, i64 [experts]."""
        return np.bincount(self.choices[moe_layer].ravel(), minlength=experts).astype(np.int64)


def sample_tokens(
    shares: Sequence[float], top_k: int, tokens: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Tokens by expert, i64 [experts], when ``tokens`` tokens choose ``top_k`` different experts each with
    probabilities in proportion to ``shares`` (Gumbel's top-k; for many tokens, binomial numbers with the same mean)."""
    p = np.asarray(shares, dtype=np.float64)
    if tokens > INDEPENDENT_TOKENS:
        return generator.binomial(tokens, np.minimum(1.0, p * top_k)).astype(np.int64)
    return np.bincount(sample_choices(shares, top_k, tokens, generator).ravel(), minlength=p.size).astype(np.int64)


def sample_choices(
    shares: Sequence[float], top_k: int, tokens: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """The same by token, i64 [tokens, top_k], in falling order of the drawn keys: those that a router's weights of a
    softmax would follow."""
    p = np.asarray(shares, dtype=np.float64)
    with np.errstate(divide="ignore"):
        keys = np.log(p) + generator.gumbel(size=(tokens, p.size))
    chosen = np.argpartition(-keys, min(top_k, p.size - 1), axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(keys, chosen, 1), axis=1)
    return np.take_along_axis(chosen, order, 1).astype(np.int64)


def sample_deferral(
    shares: Sequence[float],
    top_k: int,
    tokens: int,
    on_cpu: NDArray[np.bool_],
    deferred: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens by expert as :func:`sample_tokens` draws them, and those of them whose choice of it is deferred: of a
    token's choices of experts on the CPU the ``deferred`` of the smallest weights."""
    if not deferred:
        drawn = sample_tokens(shares, top_k, tokens, generator)
        return drawn, np.zeros_like(drawn)
    if tokens > INDEPENDENT_TOKENS:
        drawn = sample_tokens(shares, top_k, tokens, generator)
        here = float(np.dot(np.asarray(shares), on_cpu)) * top_k  # of a token's choices, in the mean
        part = min(1.0, deferred / here) if here else 0.0
        return drawn, generator.binomial(np.where(on_cpu, drawn, 0), part).astype(np.int64)
    choices = sample_choices(shares, top_k, tokens, generator)
    return np.bincount(choices.ravel(), minlength=on_cpu.size).astype(np.int64), deferred_of(choices, on_cpu, deferred)


def deferred_of(choices: NDArray[np.int64], on_cpu: NDArray[np.bool_], deferred: int) -> NDArray[np.int64]:
    """Of ``choices`` [tokens, top_k] as :func:`sample_choices` gives them, the tokens by expert, i64 [experts], whose
    choice of it is deferred: the last ``deferred`` of a token's that are on the CPU."""
    here = on_cpu[choices]
    behind = np.cumsum(here[:, ::-1], axis=1)[:, ::-1]  # of the CPU's choices: this one and those behind it
    left = choices[here & (behind <= deferred)]
    return np.bincount(left, minlength=on_cpu.size).astype(np.int64)
