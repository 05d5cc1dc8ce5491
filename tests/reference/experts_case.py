"""moe_experts in float64: operands, result and the error that a kernel may make."""

from __future__ import annotations

import math

import numpy as np

from hetcomp.backends import packing
from hetcomp.backends.cpu_isa import Gemm
from hetcomp.ir.layouts import has_act_order, with_act_order
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Value
from tests.reference.kernel_harness import weight
from tests.reference.kernel_numbers import (
    EPS,
    Doubles,
    column_orders,
    draw,
    packed,
    rounding_of,
    seen,
    terms,
    weight_rounding,
)


def expert_weights(a: MoeExperts, weight_format: str) -> tuple[Value, Value]:
    """gate_up and down of the op. weight_format: of both, or of each: ``q4k+q6k``; with ``:order`` behind it, of a
    weight whose columns have an order of their own."""
    gate_up, _, down = weight_format.partition("+")

    def of(name: str, shape: tuple[int, ...], spelled: str, layout: str) -> Value:
        form, _, ordered = spelled.partition(":")
        return weight(name, shape, form, with_act_order(layout) if ordered else layout)

    return (
        of("gate_up", (a.experts, 2 * a.intermediate, a.hidden), gate_up, packing.PANELS_GLU),
        of("down", (a.experts, a.hidden, a.intermediate), down or gate_up, packing.PANELS),
    )


def _gate(a: MoeExperts, gate: Doubles) -> Doubles:
    """The function of the gate alone."""
    erf = np.vectorize(math.erf)
    if a.function == "gelu":
        return 0.5 * gate * (1 + erf(gate / math.sqrt(2)))
    if a.function == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    if a.function == "relu":
        return np.maximum(gate, 0)
    if a.function == "swiglu_oai":
        g = np.minimum(gate, a.limit)
        return g / (1 + np.exp(-a.alpha * g))
    return gate / (1 + np.exp(-gate))


class ExpertsCase:
    """Weights, activations and routing of one call, its reference and the error it may have.

    by: how the kernel multiplies (tests.reference.kernel_numbers.seen). hot: everybody's first choice is one expert.
    away: part of the choices that are of another NUMA node (-1, with a weight that must not be read). rounded: what an
    expert adds to a token is rounded as well, as activations are.
    """

    def __init__(
        self,
        a: MoeExperts,
        weight_format: str,
        rows: int,
        hot: bool,
        seed: int,
        by: Gemm,
        away: float = 0,
        rounded: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        shapes = ((a.experts, 2 * a.intermediate, a.hidden), (a.experts, a.hidden, a.intermediate))
        values = expert_weights(a, weight_format)
        stored = [packed(draw(rng, s), v) for s, v in zip(shapes, values, strict=True)]
        x = draw(rng, (rows, a.hidden))
        ids = np.array([rng.permutation(a.experts)[: a.top_k] for _ in range(rows)], np.int32)
        ids = ids.reshape(rows, a.top_k)
        if hot:  # everybody's first choice
            ids = np.where(ids == ids[:1, :1], ids[:, :1], ids)
            ids[:, 0] = ids[0, 0] if rows else 0
        weights = rng.random((rows, a.top_k), np.float32)
        absent = rng.random(ids.shape) < away
        ids[absent], weights[absent] = -1, np.nan
        biases = [draw(rng, (a.experts, 2 * a.intermediate)), draw(rng, (a.experts, a.hidden))]
        self.inputs = [x, ids, weights, *(data for data, _ in stored), *(biases if a.bias else [])]
        self.want = np.zeros((rows, a.hidden))
        self.bound = np.zeros((rows, a.hidden))
        w1, w2 = (w.astype(np.float64) for _, w in stored)
        t1, t2 = (terms(data, v).astype(np.float64) for (data, _), v in zip(stored, values, strict=True))
        b1, b2 = (b.astype(np.float64) * a.bias for b in biases)
        of_weight = weight_rounding(weight_format, by)
        up_order, down_order = (
            column_orders(data, v) if has_act_order(v.type.layout) else [None] * a.experts
            for (data, _), v in zip(stored, values, strict=True)
        )
        for t in range(rows):
            for k in np.flatnonzero(ids[t] >= 0):
                e, r = ids[t, k], float(weights[t, k])
                h, h_bound = self._hidden(a, w1[e], t1[e], seen(x[t], by, up_order[e]), b1[e], of_weight)
                # h is rounded once more before down; its own error may move what it is rounded to.
                h_bound += rounding_of(np.abs(h) + h_bound, by, down_order[e])
                self.want[t] += r * (w2[e] @ h + b2[e])
                sums = t2[e] @ np.abs(h) + np.abs(b2[e])
                rounding = (EPS * (6 + np.sqrt(a.intermediate) + a.top_k) + of_weight) * sums
                bound = np.abs(w2[e]) @ h_bound + rounding
                added = np.abs(w2[e] @ h + b2[e]) + bound
                self.bound[t] += r * (bound + (rounding_of(added, by) if rounded else 0))

    @staticmethod
    def _hidden(
        a: MoeExperts, w: Doubles, added: Doubles, x: Doubles, b: Doubles, of_weight: float
    ) -> tuple[Doubles, Doubles]:
        """h and its error: that of the two sums carried through the function, and the function's own ulps."""
        n = a.intermediate
        sums, magnitude = w @ x + b, added @ np.abs(x) + np.abs(b)
        sum_error = (EPS * (4 + np.sqrt(a.hidden)) + of_weight) * magnitude
        factor = np.clip(sums[n:], -a.limit, a.limit) + 1 if a.function == "swiglu_oai" else sums[n:]
        gate = _gate(a, sums[:n])
        # None of the functions is steeper than 1.2 (silu, also with alpha 1.702: 1.1; gelu 1.13). gelu is x *
        # (1 + erf), towards minus infinity with the absolute error of an ulp of 1: hence |x| beside |function(x)|.
        own = 8 * EPS * (np.abs(gate) + np.abs(sums[:n])) * np.abs(factor)
        steep = 1.2 * sum_error[:n]
        return gate * factor, steep * np.abs(factor) + np.abs(gate) * sum_error[n:] + steep * sum_error[n:] + own
