"""Routing that nobody recorded: experts of Zipf's popularity, which a token keeps from the one before (Markov).

Random tokens route uniformly and anew each time, which hides whatever a cache of experts gains or loses on text.
"""

from __future__ import annotations

import numpy as np

from hetcomp.errors import HetcompError
from hetcomp.routing_trace import RoutedStep, RoutingTrace


def synthetic_routing(
    spec: str, layers: int, experts: int, top_k: int, tokens: int = 1024, seed: int = 0
) -> RoutingTrace:
    """A trace by ``spec``, as ``zipf:1.1,markov:0.9``.

    zipf: of a layer's experts, in a random order, the r-th is drawn in proportion to r^-zipf. markov: each choice of
    the token before is kept with that probability; the others are drawn without repetition. Weights are random and
    fall with the order of the choices. Raises HetcompError for a spec that is not understood.
    """
    zipf, markov = _parse(spec)
    generator = np.random.default_rng(seed)
    popularity = np.arange(1, experts + 1) ** -zipf
    order = np.stack([generator.permutation(experts) for _ in range(layers)])
    chosen = np.full((tokens, layers, top_k), -1, np.int32)
    for token in range(tokens):
        keys = np.log(popularity) + generator.gumbel(size=(layers, experts))  # Gumbel's top-k, as passes/routing.py
        if token:
            kept = generator.random((layers, top_k)) < markov
            for layer in range(layers):
                ranks = np.flatnonzero(np.isin(order[layer], chosen[token - 1, layer, kept[layer]]))
                keys[layer, ranks] = np.inf
        ranks = np.argsort(-keys, axis=1, kind="stable")[:, :top_k]
        chosen[token] = np.take_along_axis(order, ranks, axis=1)
    weights = -np.sort(-generator.dirichlet(np.ones(top_k), size=(layers, tokens)), axis=2)
    numbers = np.arange(tokens, dtype=np.int32)
    step = RoutedStep(False, numbers, np.zeros_like(numbers), chosen.swapaxes(0, 1), weights.astype(np.float32))
    return RoutingTrace.of_steps("synthetic", spec, experts, [step])


def _parse(spec: str) -> tuple[float, float]:
    found = {"zipf": 0.0, "markov": 0.0}
    for part in spec.split(","):
        name, colon, number = part.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not colon or name not in found or not 0 <= value < float("inf") or (name == "markov" and value > 1):
            raise HetcompError(
                f"Routing '{spec}' is neither a file nor understood; write for instance zipf:1.1,markov:0.9 (zipf from "
                "0 on, markov from 0 to 1)."
            )
        found[name] = value
    return found["zipf"], found["markov"]
