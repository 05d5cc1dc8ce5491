"""Random weights with which a model routes as a trace does, wherever its routers run.

Token t of the first N is an embedding of its own, a row of a Hadamard matrix, which every layer hardly changes: what
the layers add is scaled down. As these rows are orthogonal, each router is the sum of them that gives the scores of the
trace's choices, and its weights come out as the trace's where they are a softmax of the chosen scores. The output layer
gives token t + 1 the largest logit behind token t: what is generated greedily follows the trace too. N is at most the
largest power of two in the hidden size. All sums are of multiples of 1/64 and exact: the bytes are the same everywhere.

Not for models with biases (which RandomPacker makes ones), nor for routers that choose among groups of experts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from benchmarks.random_weights import STD, RandomPacker
from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan, Value
from hetcomp.replay_routing import routing_of
from hetcomp.routing_trace import RoutingTrace

# The score of a chosen expert of weight 1 above that of others; the smallest weight that is told apart; what scores are
# multiples of.
_SCORE, _LEAST_WEIGHT, _GRID = 16.0, 1e-3, 1 / 64
_LAYERS = 1 / 16  # of RandomPacker's deviation: a layer adds less than a percent to the embedding

_Floats = NDArray[np.float32]


class RoutedPacker(RandomPacker):
    """RandomPacker's weights, but for embedding, routers and output layer."""

    def __init__(self, plan: Plan, routing: str) -> None:
        """plan: finished. routing: a trace file, or a synthetic one, of which ``trace`` is what the model follows.
        Raises HetcompError if it is not of this model, or the model's output layer is its embedding."""
        super().__init__(STD * _LAYERS)
        trace = routing_of(routing, plan)
        hidden = plan.model.hidden
        order = 1 << (hidden.bit_length() - 1)
        count = min(trace.tokens, plan.model.vocab, order) // packing.PANEL * packing.PANEL
        embedding = np.zeros((count, hidden), np.float32)
        embedding[:, :order] = hadamard(order)[:count]
        self._rows: dict[str, _Floats] = {}  # the first rows of a weight
        layer = 0
        # Behind a norm an embedding's numbers are larger where others are zero.
        scale = np.sqrt(order / hidden) / order
        for role, weight in weights_by_role(plan):
            if role == "embed":
                self._rows[weight] = embedding
            elif role == "lm_head":
                if weight in self._rows:
                    raise HetcompError(f"{plan.model.name} ties its output layer to the embedding; take another model.")
                self._rows[weight] = np.roll(embedding, 1, axis=0) * np.float32(STD)
            elif role == "moe.router":
                self._rows[weight] = ((_scores(trace, layer, count).T @ embedding) * scale).astype(np.float32)
                layer += 1
        self.trace = trace.first(count)

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """As :meth:`RandomPacker.chunks`."""
        for value in values:
            rows = self._rows.get(value.id)
            if rows is None:
                yield from super().chunks([value])
                continue
            first = replace(value, type=replace(value.type, shape=rows.shape))
            packed = packing.pack(rows, first, threads=1)[0]
            yield value, packed
            rest = (int(value.type.shape[0]) - len(rows), *value.type.shape[1:])
            if rest[0] > 0:
                for _, piece in super().chunks([replace(value, type=replace(value.type, shape=rest))]):
                    yield value, piece


def weights_by_role(plan: Plan) -> Generator[tuple[str, str]]:
    """Role and the plan's name of the weight of embedding, routers and output layer, in the order of the step."""
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            if op.role in ("embed", "moe.router", "lm_head"):
                yield (
                    op.role,
                    next(actual[name] for name in op.inputs if name in actual and _is_matrix(plan, actual[name])),
                )


def _is_matrix(plan: Plan, name: str) -> bool:
    value = plan.value_map()[name]
    return value.kind.value == "weight" and len(value.type.shape) == 2


def _scores(trace: RoutingTrace, layer: int, count: int) -> NDArray[np.float64]:
    """[count, experts]: what the layer's router is to give token t."""
    scores = np.zeros((count, trace.n_experts))
    weights = np.log(np.maximum(trace.weights[:count, layer].astype(np.float64), _LEAST_WEIGHT))
    wanted = np.round((_SCORE + weights) / _GRID) * _GRID
    np.put_along_axis(scores, trace.experts[:count, layer].astype(np.int64), wanted, axis=1)
    return scores
