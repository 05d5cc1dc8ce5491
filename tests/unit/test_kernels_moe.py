"""Generated kernels of moe_experts against numpy in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.cpu import FORMATS
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.ir.ops import MoeExperts
from tests.reference.experts_case import ExpertsCase, expert_weights
from tests.reference.kernel_harness import CompiledKernel, activation, build, isas_here, thorough_isas
from tests.reference.kernel_numbers import family

ROWS = 200
SILU = MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
EVEN = MoeExperts(experts=4, top_k=2, hidden=64, intermediate=48)
OAI = MoeExperts(
    experts=5, top_k=2, hidden=20, intermediate=37, function="swiglu_oai", alpha=1.702, limit=2.0, bias=True
)
OTHERS = [
    MoeExperts(experts=3, top_k=1, hidden=18, intermediate=16, function="gelu", bias=True),
    MoeExperts(experts=3, top_k=3, hidden=18, intermediate=5, function="gelu_tanh"),
    MoeExperts(experts=9, top_k=2, hidden=18, intermediate=20, function="relu"),
]


@functools.cache
def _kernel(a: MoeExperts, weight_format: str, isa: Isa) -> CompiledKernel:
    inputs = [activation("x", "T", a.hidden), activation("i", "T", a.top_k), activation("r", "T", a.top_k)]
    inputs += expert_weights(a, weight_format)
    inputs += [
        activation("gb", a.experts, 2 * a.intermediate),
        activation("db", a.experts, a.hidden),
    ] * a.bias
    return build(a, inputs, [activation("y", "T", a.hidden)], isa, {"T": ROWS})


def _case(a: MoeExperts, weight_format: str, rows: int, hot: bool, seed: int, isa: Isa) -> ExpertsCase:
    by = family(weight_format, cpu_isa(isa), rows * a.top_k / a.experts, rows == 1)
    return ExpertsCase(a, weight_format, rows, hot, seed, by)


def _check(a: MoeExperts, weight_format: str, isa: Isa, case: ExpertsCase, threads: int) -> None:
    rows = len(case.inputs[0])
    kernel = _kernel(a, weight_format, isa)
    (y,) = kernel(case.inputs, [(rows, a.hidden)], rows=rows, threads=threads)
    assert (np.abs(y - case.want) <= case.bound).all()
    (alone,) = kernel(case.inputs, [(rows, a.hidden)], rows=rows, threads=1)
    np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize(
    ("isa", "attrs", "weight_format"),
    [
        *((isa, SILU, form) for isa in isas_here() for form in FORMATS),
        *(
            (isa, attrs, form)
            for isa in thorough_isas()
            for attrs, form in ((EVEN, "bf16"), (OAI, "bf16"), (OAI, "mxfp4"), (EVEN, "q4"))
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.experts}x{v.intermediate}x{v.hidden}",
)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(0, 40), threads=st.integers(1, 3), hot=st.booleans(), seed=st.integers(0, 999))
def test_moe_experts(isa, attrs, weight_format, rows, threads, hot, seed):
    _check(attrs, weight_format, isa, _case(attrs, weight_format, rows, hot, seed, isa), threads)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("attrs", OTHERS, ids=lambda a: a.function)
def test_glu_functions(isa, attrs):
    for rows in (1, 13):
        _check(attrs, "f32", isa, _case(attrs, "f32", rows, False, rows, isa), 2)


@pytest.mark.parametrize("isa", isas_here())
def test_a_hot_expert_of_many_blocks(isa):
    for form in ("bf16", "q4"):
        _check(SILU, form, isa, _case(SILU, form, ROWS, True, 1, isa), 3)
        _check(SILU, form, isa, _case(SILU, form, ROWS, False, 2, isa), 3)


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa not in isas_here()])
@pytest.mark.parametrize("weight_format", ["f32", "fp8", "q4"])
def test_kernels_of_other_cpus_compile(isa, weight_format):
    """Not run here; with warnings as errors. A format of each family of tiles: linear kernels take all."""
    _kernel(OAI, weight_format, isa)


def test_a_token_may_name_one_expert_twice():
    a = SILU
    isa = isas_here()[-1]
    case = _case(a, "f32", 1, False, 5, isa)
    twice = _case(a, "f32", 2, False, 5, isa)
    for c in (case, twice):
        c.inputs[1][...] = 4
    for c in (case, twice):
        rows = len(c.inputs[0])
        (y,) = _kernel(a, "f32", isa)(c.inputs, [(rows, a.hidden)], rows=rows, threads=2)
        (single,) = _kernel(a, "f32", isa)(
            [c.inputs[0], c.inputs[1], _first_only(c.inputs[2]), *c.inputs[3:]],
            [(rows, a.hidden)],
            rows=rows,
        )
        np.testing.assert_allclose(y, single, rtol=1e-5, atol=1e-5 * np.abs(single).max())


def _first_only(weights: np.ndarray) -> np.ndarray:
    """All of a token's weight on its first choice."""
    moved = np.zeros_like(weights)
    moved[:, 0] = weights.sum(axis=1)
    return moved
