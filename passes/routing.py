"""Sampled routings: how many tokens of a step each expert gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Above this many tokens each expert's number is drawn on its own: the fixed sum over experts no longer matters.
INDEPENDENT_TOKENS = 64


def sample_tokens(
    shares: Sequence[float], top_k: int, tokens: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Tokens by expert, i64 [experts], when ``tokens`` tokens choose ``top_k`` different experts each with
    probabilities in proportion to ``shares`` (Gumbel's top-k; for many tokens, binomial numbers with the same mean)."""
    p = np.asarray(shares, dtype=np.float64)
    if tokens > INDEPENDENT_TOKENS:
        return generator.binomial(tokens, np.minimum(1.0, p * top_k)).astype(np.int64)
    with np.errstate(divide="ignore"):
        keys = np.log(p) + generator.gumbel(size=(tokens, p.size))
    chosen = np.argpartition(-keys, min(top_k, p.size - 1), axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=p.size).astype(np.int64)
