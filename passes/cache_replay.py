"""Replays recorded routing through the policies of the expert cache, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetcomp.passes.cache_policy import CachedShape, CachePolicy, CacheRule
from hetcomp.passes.routing import ReplayedStep


@dataclass(frozen=True)
class CacheReplay:
    """``hits`` i64 [steps]: choices of a step's tokens that found their expert in a slot; ``copied`` i64 [steps]: bytes
    of experts that were on their way under it; ``steps``: those that were to be kept whole."""

    hits: NDArray[np.int64]
    copied: NDArray[np.int64]
    steps: tuple[ReplayedStep, ...]


def replay_cache(
    rule: CacheRule,
    shapes: Sequence[CachedShape],
    slots: int,
    bytes_per_step: int,
    first: Sequence[Sequence[int]],
    choices: NDArray[np.integer],
    cached: Sequence[int],
    keep: Sequence[int],
) -> CacheReplay:
    """Steps of decoding through a policy.

    shapes, first: of each layer with slots, and the experts that they hold at load. choices: [steps, MoE layers,
    tokens, top_k]; cached: which of these layers have slots, in the order of ``shapes``. keep: numbers of the steps
    to give whole.
    """
    policy = CachePolicy(rule, shapes, slots, bytes_per_step)
    for layer, experts in enumerate(first):
        for slot, expert in enumerate(experts):
            policy.place(layer, expert, slot)
    mine = np.asarray(choices)[:, list(cached)]
    rows = np.arange(len(shapes))[:, None, None]
    hits, copied = np.zeros(len(mine), np.int64), np.zeros(len(mine), np.int64)
    wanted, kept = set(keep), []
    for number, step in enumerate(mine):
        arrivals = policy.choose()
        policy.begin_step(step.shape[1], True)
        policy.count(step)
        hits[number] = int(policy.held[rows, step].sum())
        copied[number] = sum(shapes[arrival.layer].expert_bytes for arrival in arrivals)
        if number in wanted:
            kept.append(ReplayedStep(choices[number], policy.held, int(copied[number])))
        policy.arrived()
    return CacheReplay(hits, copied, tuple(kept))
