"""Random weights with which tokens choose experts about evenly, as plans without statistics assume.

RandomPacker's do not: its 128 different rows make pairs of equal experts and 128 different tokens, and what all tokens
have in common grows from layer to layer. Of a layer of DeepSeek-V3 prompts of 512 tokens want 195 of 256 experts then,
some of them in half the tokens. Here embedding and routers have numbers of their own, and what layers add is scaled
down. Groups of experts change nothing, nor do biases of routers, which RandomPacker makes ones. The output layer gives
token t + 1 the largest logit behind token t (modulo the rows that repeat): what is generated greedily wanders through
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_weights import STD, RandomPacker, repeated
from benchmarks.routed_weights import weights_by_role
from hetcomp.backends import packing
from hetcomp.ir.plan import Plan, Value

_LAYERS = 1 / 32  # of RandomPacker's deviation
_TOKENS = 4096  # different rows of the embedding


class EvenPacker(RandomPacker):
    """RandomPacker's weights, but for embedding, routers and output layer."""

    def __init__(self, plan: Plan) -> None:
        """plan: finished."""
        super().__init__(STD * _LAYERS)
        self._seeds: dict[str, tuple[int, int]] = {}  # of weights of their own: seed, and by how many rows they turn
        for seed, (role, weight) in enumerate(weights_by_role(plan)):
            # An output layer that is the embedding stays it.
            self._seeds.setdefault(weight, (0, 1) if role == "lm_head" else (0, 0) if role == "embed" else (seed, 0))

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """As :meth:`RandomPacker.chunks`."""
        for value in values:
            if value.id not in self._seeds:
                yield from super().chunks([value])
                continue
            seed, turned = self._seeds[value.id]
            rows, columns = (int(d) for d in value.type.shape)
            shape = (_TOKENS if rows > _TOKENS else rows, columns)
            numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(STD)
            first = replace(value, type=replace(value.type, shape=shape))
            yield from repeated(value, packing.pack(np.roll(numbers, turned, axis=0), first, threads=1)[0])
