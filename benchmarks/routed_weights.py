"""Random weights with which a model routes as a trace does, wherever its routers run.

Token t of the first N is an embedding of its own, which every layer hardly changes: what the layers add is scaled down.
Each router is then the solution of linear equations, from N embeddings to the scores of the trace's choices, and its
weights come out as the trace's where they are a softmax of the chosen scores. The output layer gives token t + 1 the
largest logit behind token t: what is generated greedily follows the trace too. N is at most three quarters of the
hidden size, so that the equations have a solution that small errors do not spoil.

Not for models with biases (which RandomPacker makes ones), nor for routers that choose among groups of experts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.random_weights import STD, RandomPacker
from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan, Value
from hetcomp.replay_routing import routing_of
from hetcomp.routing_trace import RoutingTrace

_EQUATIONS = 0.75  # of the hidden size
# The score of a chosen expert of weight 1 above that of others; the smallest weight that is told apart.
_SCORE, _LEAST_WEIGHT = 16.0, 1e-3
_LAYERS = 1 / 16  # of RandomPacker's deviation: a layer adds less than a percent to the embedding

_Floats = NDArray[np.float32]


class RoutedPacker(RandomPacker):
    """RandomPacker's weights, but for embedding, routers and output layer."""

    def __init__(self, plan: Plan, routing: str) -> None:
        """plan: finished. routing: a trace file, or a synthetic one, of which ``trace`` is what the model follows.
        Raises HetcompError if it is not of this model, or the model's output layer is its embedding."""
        super().__init__(STD * _LAYERS)
        trace = routing_of(routing, plan)
        count = (
            min(trace.tokens, plan.model.vocab, int(_EQUATIONS * plan.model.hidden)) // packing.PANEL * packing.PANEL
        )
        embedding = np.random.default_rng(1).standard_normal((count, plan.model.hidden), np.float32)
        self._rows: dict[str, _Floats] = {}  # the first rows of a weight
        layer = 0
        inverse = np.linalg.pinv(embedding / np.sqrt(np.mean(embedding**2, axis=1, keepdims=True)))
        for role, weight in _weights(plan):
            if role == "embed":
                self._rows[weight] = embedding
            elif role == "lm_head":
                if weight in self._rows:
                    raise HetcompError(f"{plan.model.name} ties its output layer to the embedding; take another model.")
                self._rows[weight] = np.roll(embedding, 1, axis=0) * np.float32(STD)
            elif role == "moe.router":
                self._rows[weight] = (inverse @ _scores(trace, layer, count)).T.astype(np.float32)
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


def _weights(plan: Plan) -> Generator[tuple[str, str]]:
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


def _scores(trace: RoutingTrace, layer: int, count: int) -> _Floats:
    """[count, experts]: what the layer's router is to give token t."""
    scores = np.zeros((count, trace.n_experts), np.float32)
    weights = np.maximum(trace.weights[:count, layer].astype(np.float32), _LEAST_WEIGHT)
    np.put_along_axis(scores, trace.experts[:count, layer].astype(np.int64), _SCORE + np.log(weights), axis=1)
    return scores
