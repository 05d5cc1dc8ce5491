"""Synthetic routing has the popularity and the memory that it was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.errors import HetcompError
from hetcomp.synthetic_routing import synthetic_routing

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 16, 2, 4000


def kept(spec: str) -> float:
    """Part of the choices that the token before had made too."""
    experts = synthetic_routing(spec, LAYERS, EXPERTS, TOP_K, TOKENS).experts
    return float((experts[1:, :, :, None] == experts[:-1, :, None, :]).any(axis=3).mean())


def test_every_token_chooses_different_experts_with_weights_that_fall_and_add_up():
    trace = synthetic_routing("zipf:1.1,markov:0.5", LAYERS, EXPERTS, TOP_K, 50)
    assert trace.experts.shape == (50, LAYERS, TOP_K) and trace.n_experts == EXPERTS
    assert (trace.experts[..., 0] != trace.experts[..., 1]).all()
    np.testing.assert_allclose(trace.weights.sum(axis=2), 1, atol=2e-3)
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    again = synthetic_routing("zipf:1.1,markov:0.5", LAYERS, EXPERTS, TOP_K, 50)
    np.testing.assert_array_equal(trace.experts, again.experts)


def test_without_memory_popularity_is_zipfs():
    # Of one choice a token: no expert is missing because it was chosen before.
    experts = synthetic_routing("zipf:1.2", 1, EXPERTS, 1, 20000).experts
    counts = np.sort(np.bincount(experts.ravel(), minlength=EXPERTS))[::-1] / 20000
    wanted = np.arange(1, EXPERTS + 1) ** -1.2
    np.testing.assert_allclose(counts, wanted / wanted.sum(), atol=0.012)  # three standard deviations


def test_memory_keeps_choices():
    by_chance = kept("zipf:0,markov:0")
    assert by_chance == pytest.approx(TOP_K / EXPERTS, abs=0.01)
    assert 0.9 < kept("zipf:0,markov:0.9") < 0.93
    assert kept("markov:1") == 1.0


@pytest.mark.parametrize("spec", ["zipf", "zipf:x", "uniform:1", "markov:1.5", "zipf:-1", "zipf:nan", ""])
def test_what_is_not_understood_is_refused(spec):
    with pytest.raises(HetcompError, match=f"Routing '{spec}' is neither a file nor understood"):
        synthetic_routing(spec, LAYERS, EXPERTS, TOP_K)
