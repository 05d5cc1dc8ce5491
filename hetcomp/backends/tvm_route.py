"""TIR of route: scores, choice of groups, sorted top-k and weights, one token after the other.

The k-th best is found as the best (score, lower expert) behind the (k-1)-th in that order; nothing is marked
or sorted, and equal scores need no special case. Score rows are padded with -inf to whole vectors.
"""

# TVMScript: the decorated bodies are parsed by TVM, whose decorators carry no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import operator
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hetcomp.backends.tvm_math import exp, sigmoid, tree
from hetcomp.ir.ops import Route

Expr = Any
PrimFunc = Any
Buffer = Any


def route(attrs: Route, padded: int, lanes: int) -> PrimFunc:
    """logits f32[n, experts](, bias f32[experts]) -> ids i32[n, top_k], weights f32[n, top_k].

    Two more parameters are scratch rows f32[padded]: TVM puts no more than 1 KB of its own on the stack
    and would ask the host for memory.
    """
    experts, top_k = attrs.experts, attrs.top_k
    score = _score(attrs, padded, lanes)
    mask_groups = _mask_groups(attrs)
    choose = _choose(attrs, padded, lanes)
    weigh = _weigh(attrs, padded, lanes)

    @T.prim_func
    def plain(l_: T.handle, i_: T.handle, w_: T.handle, s_: T.handle, c_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        logits = T.match_buffer(l_, (n, experts), "float32", align=4)
        ids = T.match_buffer(i_, (n, top_k), "int32", align=4)
        weights = T.match_buffer(w_, (n, top_k), "float32", align=4)
        scores = T.match_buffer(s_, (padded,), "float32", align=4)
        choice = T.match_buffer(c_, (padded,), "float32", align=4)
        for r in T.serial(n):
            for e in T.serial(experts):
                scores[e] = logits[r, e]
            score(scores)
            for e in T.serial(padded):
                choice[e] = scores[e]
            mask_groups(choice)
            choose(choice, ids, r)
            weigh(scores, ids, weights, r)

    @T.prim_func
    def biased(l_: T.handle, b_: T.handle, i_: T.handle, w_: T.handle, s_: T.handle, c_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        logits = T.match_buffer(l_, (n, experts), "float32", align=4)
        bias = T.match_buffer(b_, (experts,), "float32", align=4)
        ids = T.match_buffer(i_, (n, top_k), "int32", align=4)
        weights = T.match_buffer(w_, (n, top_k), "float32", align=4)
        scores = T.match_buffer(s_, (padded,), "float32", align=4)
        choice = T.match_buffer(c_, (padded,), "float32", align=4)
        for r in T.serial(n):
            for e in T.serial(experts):
                scores[e] = logits[r, e]
            score(scores)
            for e in T.serial(experts):
                choice[e] = scores[e] + bias[e]
            for e in T.serial(padded - experts):
                choice[experts + e] = T.float32(float("-inf"))
            mask_groups(choice)
            choose(choice, ids, r)
            weigh(scores, ids, weights, r)

    return biased if attrs.bias else plain


def _score(attrs: Route, padded: int, lanes: int) -> Any:  # noqa: ANN401
    """Turns the logits in ``scores`` into scores and pads the row with -inf."""
    experts = attrs.experts
    minus_inf = tirx.const(float("-inf"), "float32")

    @T.inline
    def pad(scores):  # noqa: ANN001, ANN202
        for e in T.serial(padded - experts):
            scores[experts + e] = minus_inf

    @T.inline
    def softmax(scores):  # noqa: ANN001, ANN202
        pad(scores)
        largest = T.alloc_buffer((lanes,), "float32")
        total = T.alloc_buffer((lanes,), "float32")
        for v in T.vectorized(lanes):
            largest[v] = minus_inf
        for i in T.serial(padded // lanes):
            for v in T.vectorized(lanes):
                largest[v] = T.max(largest[v], scores[i * lanes + v])
        largest[0] = tree(T.max, largest, lanes)
        for v in T.vectorized(lanes):
            total[v] = T.float32(0)
        for i in T.serial(padded // lanes):
            for v in T.vectorized(lanes):
                scores[i * lanes + v] = exp(scores[i * lanes + v] - largest[0])
            for v in T.vectorized(lanes):
                total[v] = total[v] + scores[i * lanes + v]
        total[0] = tree(operator.add, total, lanes)
        for i in T.serial(padded // lanes):
            for v in T.vectorized(lanes):
                scores[i * lanes + v] = scores[i * lanes + v] / total[0]
        pad(scores)

    @T.inline
    def sigmoids(scores):  # noqa: ANN001, ANN202
        pad(scores)
        for i in T.serial(padded // lanes):
            for v in T.vectorized(lanes):
                scores[i * lanes + v] = sigmoid(scores[i * lanes + v])
        pad(scores)

    return {"softmax": softmax, "sigmoid": sigmoids}.get(attrs.scoring, pad)


def _mask_groups(attrs: Route) -> Any:  # noqa: ANN401
    """Sets the choice scores outside the best ``top_groups`` groups to -inf or 0.0 (``outside_groups``)."""
    groups, top_groups = attrs.groups, attrs.top_groups
    size = attrs.experts // groups
    top2 = attrs.group_score == "top2"
    minus_inf = tirx.const(float("-inf"), "float32")
    outside = minus_inf if attrs.outside_groups == "never" else tirx.const(0.0, "float32")

    @T.inline
    def nothing(choice):  # noqa: ANN001, ANN202
        T.evaluate(0)

    @T.inline
    def mask(choice):  # noqa: ANN001, ANN202
        best = T.alloc_buffer((groups,), "float32")
        second = T.alloc_buffer((groups,), "float32")
        rank = T.alloc_buffer((1,), "int32")
        for g in T.serial(groups):
            best[g] = minus_inf
            second[g] = minus_inf
            for e in T.serial(size):
                second[g] = T.max(second[g], T.min(best[g], choice[g * size + e]))
                best[g] = T.max(best[g], choice[g * size + e])
            if top2:
                best[g] = best[g] + second[g]
        for g in T.serial(groups):
            # Number of groups that come before this one; equal scores: lower group first.
            rank[0] = 0
            for other in T.serial(groups):
                rank[0] = rank[0] + T.Select(
                    T.Or(best[other] > best[g], T.And(best[other] == best[g], other < g)), 1, 0
                )
            if rank[0] >= top_groups:
                for e in T.serial(size):
                    choice[g * size + e] = outside

    return mask if groups > 1 else nothing


def _choose(attrs: Route, padded: int, lanes: int) -> Any:  # noqa: ANN401
    """Writes the experts of the ``top_k`` largest choice scores to row ``r`` of ``ids``.

    Without a candidate (scores are NaN) the last expert is named: an id is always in range.
    """
    experts, top_k = attrs.experts, attrs.top_k
    minus_inf = tirx.const(float("-inf"), "float32")

    def behind(value: Expr, index: Expr, last: Buffer, last_id: Buffer) -> Expr:
        return T.Or(value < last[0], T.And(value == last[0], index > last_id[0]))

    @T.inline
    def choose(choice, ids, r):  # noqa: ANN001, ANN202
        value = T.alloc_buffer((lanes,), "float32")
        index = T.alloc_buffer((lanes,), "int32")
        last = T.alloc_buffer((1,), "float32")
        last_id = T.alloc_buffer((1,), "int32")
        last[0] = T.float32(float("inf"))
        last_id[0] = -1
        for k in T.serial(top_k):
            for v in T.vectorized(lanes):
                value[v] = minus_inf
                index[v] = experts - 1
            for i in T.serial(padded // lanes):
                for v in T.vectorized(lanes):
                    value[v] = T.max(
                        value[v],
                        T.Select(
                            behind(choice[i * lanes + v], i * lanes + v, last, last_id),
                            choice[i * lanes + v],
                            minus_inf,
                        ),
                    )
            value[0] = tree(T.max, value, lanes)
            for i in T.serial(padded // lanes):
                for v in T.vectorized(lanes):
                    index[v] = T.min(
                        index[v],
                        T.Select(
                            T.And(
                                choice[i * lanes + v] == value[0],
                                behind(choice[i * lanes + v], i * lanes + v, last, last_id),
                            ),
                            i * lanes + v,
                            experts - 1,
                        ),
                    )
            last[0] = value[0]
            last_id[0] = tree(T.min, index, lanes)
            ids[r, k] = last_id[0]

    return choose


def _weigh(attrs: Route, padded: int, lanes: int) -> Any:  # noqa: ANN401
    """Weights of the chosen experts: their scores, the softmax over the chosen logits, or what a sparse mixer gives."""
    top_k = attrs.top_k
    over_chosen = attrs.scoring == "topk_softmax"
    normalise = attrs.normalise
    take = _mix(attrs, padded, lanes) if attrs.scoring == "sparse_mixer" else _take(attrs)

    @T.inline
    def weigh(scores, ids, weights, r):  # noqa: ANN001, ANN202
        largest = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        take(scores, ids, weights, r)
        if over_chosen:
            largest[0] = weights[r, 0]
            for k in T.serial(top_k):
                largest[0] = T.max(largest[0], weights[r, k])
            total[0] = T.float32(0)
            for k in T.serial(top_k):
                weights[r, k] = exp(weights[r, k] - largest[0])
                total[0] = total[0] + weights[r, k]
            for k in T.serial(top_k):
                weights[r, k] = weights[r, k] / total[0]
        if normalise:
            total[0] = T.float32(0)
            for k in T.serial(top_k):
                total[0] = total[0] + weights[r, k]
            total[0] = total[0] + T.float32(attrs.norm_eps)
            for k in T.serial(top_k):
                weights[r, k] = weights[r, k] / total[0]
        for k in T.serial(top_k):
            weights[r, k] = weights[r, k] * T.float32(attrs.scaling)

    return weigh


def _take(attrs: Route) -> Any:  # noqa: ANN401
    top_k = attrs.top_k

    @T.inline
    def take(scores, ids, weights, r):  # noqa: ANN001, ANN202
        for k in T.serial(top_k):
            weights[r, k] = scores[ids[r, k]]

    return take


def _mix(attrs: Route, padded: int, lanes: int) -> Any:  # noqa: ANN401
    """Weights of a sparse mixer. Those chosen become -inf in ``scores``, as the padding is: they add exp(-inf) = 0."""
    top_k, jitter = attrs.top_k, attrs.jitter

    def share(score: Expr, best: Expr) -> Expr:
        # The comparison is false of NaN: 0 / 0 where all are 0, inf / inf of the padding.
        far = (best - score) / T.max(T.fabs(score), best) > T.float32(2 * jitter)
        return T.Select(far, T.float32(0), exp(score - best))

    @T.inline
    def take(scores, ids, weights, r):  # noqa: ANN001, ANN202
        best = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((lanes,), "float32")
        for k in T.serial(top_k):
            best[0] = scores[ids[r, k]]
            for v in T.vectorized(lanes):
                total[v] = T.float32(0)
            for i in T.serial(padded // lanes):
                for v in T.vectorized(lanes):
                    total[v] = total[v] + share(scores[i * lanes + v], best[0])
            weights[r, k] = T.float32(1) / tree(operator.add, total, lanes)
            scores[ids[r, k]] = T.float32(float("-inf"))

    return take
