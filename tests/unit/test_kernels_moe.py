"""Generated kernels of moe_experts against numpy in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.backends.cpu import FORMATS
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Value
from tests.reference.kernel_harness import (
    CompiledKernel,
    activation,
    build,
    isas_here,
    tested_isas,
    thorough_isas,
    weight,
)
from tests.reference.kernel_numbers import EPS, Doubles, draw, family, packed, rounding_of, seen, weight_rounding

ROWS = 200
SILU = MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
EVEN = MoeExperts(experts=4, top_k=2, hidden=64, intermediate=48)
DEEP = MoeExperts(experts=2, top_k=1, hidden=1100, intermediate=40)  # more columns than a slice of tiles has
OAI = MoeExperts(
    experts=5, top_k=2, hidden=20, intermediate=37, function="swiglu_oai", alpha=1.702, limit=2.0, bias=True
)
OTHERS = [
    MoeExperts(experts=3, top_k=1, hidden=18, intermediate=16, function="gelu", bias=True),
    MoeExperts(experts=3, top_k=3, hidden=18, intermediate=5, function="gelu_tanh"),
    MoeExperts(experts=9, top_k=2, hidden=18, intermediate=20, function="relu"),
]


def _weights(a: MoeExperts, weight_format: str) -> tuple[Value, Value]:
    return (
        weight("gate_up", (a.experts, 2 * a.intermediate, a.hidden), weight_format, packing.PANELS_GLU),
        weight("down", (a.experts, a.hidden, a.intermediate), weight_format, packing.PANELS),
    )


@functools.cache
def _kernel(a: MoeExperts, weight_format: str, isa: Isa) -> CompiledKernel:
    inputs = [activation("x", "T", a.hidden), activation("i", "T", a.top_k), activation("r", "T", a.top_k)]
    inputs += _weights(a, weight_format)
    inputs += [
        activation("gb", a.experts, 2 * a.intermediate),
        activation("db", a.experts, a.hidden),
    ] * a.bias
    return build(a, inputs, [activation("y", "T", a.hidden)], isa, {"T": ROWS})


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


class Case:
    """Weights, activations and routing of one call, its reference and the error it may have."""

    def __init__(
        self, a: MoeExperts, weight_format: str, rows: int, hot: bool, seed: int, isa: Isa, away: float = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        by = family(weight_format, cpu_isa(isa), rows * a.top_k / a.experts, rows <= cpu_isa(isa).few_tokens)
        shapes = ((a.experts, 2 * a.intermediate, a.hidden), (a.experts, a.hidden, a.intermediate))
        stored = [packed(draw(rng, s), v) for s, v in zip(shapes, _weights(a, weight_format), strict=True)]
        x = draw(rng, (rows, a.hidden))
        ids = np.array([rng.permutation(a.experts)[: a.top_k] for _ in range(rows)], np.int32)
        ids = ids.reshape(rows, a.top_k)
        if hot:  # everybody's first choice
            ids = np.where(ids == ids[:1, :1], ids[:, :1], ids)
            ids[:, 0] = ids[0, 0] if rows else 0
        weights = rng.random((rows, a.top_k), np.float32)
        absent = rng.random(ids.shape) < away  # of another node: neither an expert nor a weight is read
        ids[absent], weights[absent] = -1, np.nan
        biases = [draw(rng, (a.experts, 2 * a.intermediate)), draw(rng, (a.experts, a.hidden))]
        self.inputs = [x, ids, weights, *(data for data, _ in stored), *(biases if a.bias else [])]
        self.want = np.zeros((rows, a.hidden))
        self.bound = np.zeros((rows, a.hidden))
        w1, w2 = (w.astype(np.float64) for _, w in stored)
        b1, b2 = (b.astype(np.float64) * a.bias for b in biases)
        of_weight = weight_rounding(weight_format, by)
        x64 = seen(x, by)
        for t in range(rows):
            for k in np.flatnonzero(ids[t] >= 0):
                e, r = ids[t, k], float(weights[t, k])
                h, h_bound = self._hidden(a, w1[e], x64[t], b1[e], of_weight)
                # h is rounded once more before down; its own error may move what it is rounded to.
                h_bound += rounding_of(np.abs(h) + h_bound, by)
                self.want[t] += r * (w2[e] @ h + b2[e])
                sums = np.abs(w2[e]) @ np.abs(h) + np.abs(b2[e])
                rounding = (EPS * (6 + np.sqrt(a.intermediate) + a.top_k) + of_weight) * sums
                self.bound[t] += r * (np.abs(w2[e]) @ h_bound + rounding)

    @staticmethod
    def _hidden(a: MoeExperts, w: Doubles, x: Doubles, b: Doubles, of_weight: float) -> tuple[Doubles, Doubles]:
        """h and its error: that of the two sums carried through the function, and the function's own ulps."""
        n = a.intermediate
        sums, magnitude = w @ x + b, np.abs(w) @ np.abs(x) + np.abs(b)
        sum_error = (EPS * (4 + np.sqrt(a.hidden)) + of_weight) * magnitude
        factor = np.clip(sums[n:], -a.limit, a.limit) + 1 if a.function == "swiglu_oai" else sums[n:]
        gate = _gate(a, sums[:n])
        # None of the functions is steeper than 1.2 (silu, also with alpha 1.702: 1.1; gelu 1.13). gelu is x *
        # (1 + erf), towards minus infinity with the absolute error of an ulp of 1: hence |x| beside |function(x)|.
        own = 8 * EPS * (np.abs(gate) + np.abs(sums[:n])) * np.abs(factor)
        steep = 1.2 * sum_error[:n]
        return gate * factor, steep * np.abs(factor) + np.abs(gate) * sum_error[n:] + steep * sum_error[n:] + own


def _check(a: MoeExperts, weight_format: str, isa: Isa, case: Case, threads: int) -> None:
    rows = len(case.inputs[0])
    kernel = _kernel(a, weight_format, isa)
    (y,) = kernel(case.inputs, [(rows, a.hidden)], rows=rows, threads=threads)
    assert (np.abs(y - case.want) <= case.bound).all()
    (alone,) = kernel(case.inputs, [(rows, a.hidden)], rows=rows, threads=1)
    np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize(
    ("isa", "attrs", "weight_format"),
    [
        *((isa, SILU, form) for isa in tested_isas() for form in FORMATS),
        *(
            (isa, attrs, form)
            for isa in thorough_isas()
            for attrs, form in ((EVEN, "bf16"), (OAI, "bf16"), (OAI, "mxfp4"), (EVEN, "q4"))
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.experts}x{v.intermediate}x{v.hidden}",
)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 10) | st.integers(11, 40),
    threads=st.integers(1, 3),
    hot=st.booleans(),
    seed=st.integers(0, 999),
    away=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_moe_experts(isa, attrs, weight_format, rows, threads, hot, seed, away):
    _check(attrs, weight_format, isa, Case(attrs, weight_format, rows, hot, seed, isa, away), threads)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    ("isa", "attrs"),
    [*((isa, SILU) for isa in isas_here()), *((isa, OAI) for isa in thorough_isas())],
    ids=lambda v: getattr(v, "function", None),
)
@pytest.mark.parametrize("away", [0.0, 0.4])
def test_a_few_tokens_get_what_each_would_get_alone(isa, attrs, weight_format, away):
    """Bit for bit: which tokens share a step must not change what a model says."""
    kernel = _kernel(attrs, weight_format, isa)
    for rows in range(2, cpu_isa(isa).few_tokens + 1):
        # With a hot expert its rows take several passes.
        inputs = Case(attrs, weight_format, rows, rows % 3 == 2, rows, isa, away).inputs
        (y,) = kernel(inputs, [(rows, attrs.hidden)], rows=rows, threads=2)
        for t in range(rows):
            (alone,) = kernel([i[t : t + 1] for i in inputs[:3]] + inputs[3:], [(1, attrs.hidden)], rows=1)
            np.testing.assert_array_equal(y[t : t + 1], alone)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("attrs", OTHERS, ids=lambda a: a.function)
def test_glu_functions(isa, attrs):
    for rows in (1, 13):
        _check(attrs, "f32", isa, Case(attrs, "f32", rows, False, rows, isa), 2)


@pytest.mark.parametrize("isa", tested_isas())
def test_a_hot_expert_of_many_blocks(isa):
    for form in ("bf16", "q4"):
        _check(SILU, form, isa, Case(SILU, form, ROWS, True, 1, isa), 3)
        _check(SILU, form, isa, Case(SILU, form, ROWS, False, 2, isa), 3)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("weight_format", [form for form in FORMATS if form != "f32"])
def test_many_tokens_and_columns(isa, weight_format):
    _check(DEEP, weight_format, isa, Case(DEEP, weight_format, ROWS, False, 3, isa), 3)


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa not in isas_here()])
@pytest.mark.parametrize("weight_format", ["f32", "fp8", "q4"])
def test_kernels_of_other_cpus_compile(isa, weight_format):
    """Not run here; with warnings as errors. A format of each family of tiles: linear kernels take all."""
    CompiledKernel(_kernel(OAI, weight_format, isa).kernel, isa, emulate=False)


def test_a_token_may_name_one_expert_twice():
    a = SILU
    isa = isas_here()[-1]
    for rows in (1, 2, 8, 20):
        x, ids, weights, *rest = Case(a, "f32", rows, False, 5, isa).inputs
        ids[...] = 4
        kernel = _kernel(a, "f32", isa)
        (y,) = kernel([x, ids, weights, *rest], [(rows, a.hidden)], rows=rows, threads=2)
        (single,) = kernel([x, ids, _first_only(weights), *rest], [(rows, a.hidden)], rows=rows)
        np.testing.assert_allclose(y, single, rtol=1e-5, atol=1e-5 * np.abs(single).max())


def _first_only(weights: np.ndarray) -> np.ndarray:
    """All of a token's weight on its first choice."""
    moved = np.zeros_like(weights)
    moved[:, 0] = weights.sum(axis=1)
    return moved
