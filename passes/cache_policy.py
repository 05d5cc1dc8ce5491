"""Which experts of each layer are in slots of the GPU, and which come into them between two steps of decoding.

runtime_lib/src/gpu/cache_policy.cpp is the same in C++; tests/data/cache_policies.json holds them together. Here all
layers are looked at together, in arrays: traces of thousands of tokens are replayed before a plan is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CacheRule = Literal["lru", "lfu"]
NONE = -1
HALF_LIFE = 256.0
LRU_MARGIN = 16.0
LFU_FACTOR = 1.25
LFU_MARGIN = 1.0
MOST_OF_LAYER = 4
_RESCALE_AFTER = 512.0
_NO_SLOT = -2  # of a layer that has fewer experts than others have slots


@dataclass(frozen=True, slots=True)
class CachedShape:
    """A layer with slots. ``expert_bytes``: of one expert."""

    experts: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class CacheArrival:
    """An expert that is copied to a slot under the next step."""

    layer: int
    expert: int
    slot: int


class CachePolicy:
    """Time is counted in ticks: a step of decoding is one, a step of a prompt one for each token."""

    def __init__(self, rule: CacheRule, layers: Sequence[CachedShape], slots: int, bytes_per_step: int) -> None:
        """All slots are empty. bytes_per_step: what may be copied under a step of decoding."""
        most = max(layer.experts for layer in layers)
        self._lru = rule == "lru"
        self._bytes = [layer.expert_bytes for layer in layers]
        self._per_step = bytes_per_step
        self._most_credit = max(bytes_per_step, *self._bytes)
        self._credit = 0
        self._slot_of = np.full((len(layers), most), NONE)
        self._held = np.full((len(layers), slots), NONE)
        for row, layer in zip(self._held, layers, strict=True):
            row[layer.experts :] = _NO_SLOT
        self._used = np.zeros((len(layers), most), np.int64)
        self._uses = np.zeros((len(layers), most))
        self._now = self._base = 0
        self._first = 1
        self._decode = False
        self._coming: list[CacheArrival] = []

    def place(self, layer: int, expert: int, slot: int) -> None:
        """Before the first step: the expert lies in that slot, which is empty."""
        self._slot_of[layer, expert] = slot
        self._held[layer, slot] = expert

    @property
    def held(self) -> NDArray[np.bool_]:
        """[layers, experts]: whether the GPU has it in the step that runs."""
        held: NDArray[np.bool_] = self._slot_of != NONE
        return held

    def begin_step(self, tokens: int, decode: bool) -> None:
        """A step begins: of one tick with all its tokens, or with a tick for each."""
        self._decode = decode
        self._first = self._now + 1
        self._now += 1 if decode else tokens
        if self._now - self._base > _RESCALE_AFTER * HALF_LIFE:
            self._uses *= 1 / self._unit(self._now)
            self._base = self._now

    def count(self, choices: NDArray[np.integer]) -> None:
        """The experts that the step's tokens choose, [layers, tokens, top_k]."""
        layers, tokens, top_k = choices.shape
        ticks = [self._now] * tokens if self._decode else [min(self._now, self._first + t) for t in range(tokens)]
        row = np.repeat(np.arange(layers), tokens * top_k)
        expert = choices.astype(np.int64).ravel()
        np.maximum.at(self._used, (row, expert), np.tile(np.repeat(ticks, top_k), layers))
        uses = [self._unit(tick) for tick in ticks]
        np.add.at(self._uses, (row, expert), np.tile(np.repeat(uses, top_k), layers))

    def choose(self) -> list[CacheArrival]:
        """Between steps: what to copy under the next step of decoding; those that lay there are no longer held.
        :meth:`arrived` must come before the next call."""
        self._credit = min(self._credit + self._per_step, self._most_credit)
        for _, arrival in sorted(self._swaps(), key=lambda swap: -swap[0]):
            if self._bytes[arrival.layer] > self._credit:
                break
            self._credit -= self._bytes[arrival.layer]
            before = self._held[arrival.layer, arrival.slot]
            if before != NONE:
                self._slot_of[arrival.layer, before] = NONE
            self._held[arrival.layer, arrival.slot] = arrival.expert
            self._coming.append(arrival)
        return list(self._coming)

    def arrived(self) -> None:
        """The copies are over."""
        for arrival in self._coming:
            self._slot_of[arrival.layer, arrival.expert] = arrival.slot
        self._coming.clear()

    def _unit(self, tick: int) -> float:
        return math.exp2((tick - self._base) / HALF_LIFE)

    def _swaps(self) -> list[tuple[float, CacheArrival]]:
        """Gain and swap, layer by layer: the hottest expert outside against the coldest inside of those left."""
        heat = self._used.astype(np.float64) if self._lru else self._uses
        factor, margin = (1.0, LRU_MARGIN) if self._lru else (LFU_FACTOR, LFU_MARGIN * self._unit(self._now))
        rows = np.arange(len(self._bytes))
        inside = np.maximum(self._held, 0)
        cold = np.where(self._held >= 0, heat[rows[:, None], inside], -np.inf)
        kept = (self._held == _NO_SLOT) | ((self._held >= 0) & (self._used[rows[:, None], inside] == self._now))
        hot = np.where(self._slot_of == NONE, heat, -np.inf)
        cold[kept] = np.inf
        found: list[list[tuple[float, CacheArrival]]] = [[] for _ in rows]
        for _ in range(MOST_OF_LAYER):
            slot, expert = cold.argmin(axis=1), hot.argmax(axis=1)
            coldest, hottest = cold[rows, slot], hot[rows, expert]
            swaps = (coldest < np.inf) & (hottest > 0) & (hottest >= factor * coldest + margin)
            if not swaps.any():
                break
            for layer in np.flatnonzero(swaps).tolist():
                arrival = CacheArrival(layer, int(expert[layer]), int(slot[layer]))
                found[layer].append((float(hottest[layer] - coldest[layer]), arrival))
                cold[layer, slot[layer]], hot[layer, expert[layer]] = np.inf, -np.inf
            # Where one was no gain, the next is none either.
            hot[~swaps] = -np.inf
        return [swap for layer in found for swap in layer]
