"""Generated kernels of moe_experts against numpy in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.backends.cpu import FORMATS
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.errors import HetcompError
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Value
from tests.reference.experts_case import ExpertsCase, expert_weights
from tests.reference.kernel_harness import (
    CompiledKernel,
    activation,
    build,
    emit,
    isas_here,
    isas_of,
    thorough_isas,
)
from tests.reference.kernel_numbers import family

ROWS = 200
SILU = MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
EVEN = MoeExperts(experts=4, top_k=2, hidden=64, intermediate=48)
ORDERED = MoeExperts(experts=3, top_k=2, hidden=96, intermediate=64)  # whole groups
DEEP = MoeExperts(experts=2, top_k=1, hidden=1100, intermediate=40)  # more columns than a slice of tiles has
OAI = MoeExperts(
    experts=5, top_k=2, hidden=20, intermediate=37, function="swiglu_oai", alpha=1.702, limit=2.0, bias=True
)
OTHERS = [
    MoeExperts(experts=3, top_k=1, hidden=18, intermediate=16, function="gelu", bias=True),
    MoeExperts(experts=3, top_k=3, hidden=18, intermediate=5, function="gelu_tanh"),
    MoeExperts(experts=9, top_k=2, hidden=18, intermediate=20, function="relu"),
]


def _operands(a: MoeExperts, weight_format: str) -> list[Value]:
    inputs = [activation("x", "T", a.hidden), activation("i", "T", a.top_k), activation("r", "T", a.top_k)]
    inputs += expert_weights(a, weight_format)
    inputs += [
        activation("gb", a.experts, 2 * a.intermediate),
        activation("db", a.experts, a.hidden),
    ] * a.bias
    return inputs


@functools.cache
def _kernel(a: MoeExperts, weight_format: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted(a, weight_format, isa), isa)


def _emitted(a: MoeExperts, weight_format: str, isa: Isa) -> Kernel:
    return emit(a, _operands(a, weight_format), [activation("y", "T", a.hidden)], isa, {"T": ROWS})


def _case(a: MoeExperts, weight_format: str, rows: int, hot: bool, seed: int, isa: Isa, away: float = 0) -> ExpertsCase:
    form = weight_format.partition("+")[0].partition(":")[0]
    by = family(form, cpu_isa(isa), rows * a.top_k / a.experts, rows <= cpu_isa(isa).few_tokens)
    return ExpertsCase(a, weight_format, rows, hot, seed, by, away)


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
        *((isa, SILU, form) for form in FORMATS if form not in ("q4z", "q5k") for isa in isas_of(form)),
        (isas_here()[-1], SILU, "q5k+q4z"),
        # Columns in an order of their own, of both matrices or of one.
        *((isa, ORDERED, "q4:order") for isa in thorough_isas()),
        (isas_here()[-1], ORDERED, "q4z:order+q8"),
        (thorough_isas()[-1], ORDERED, "q4+q8:order"),
        *(
            (isa, attrs, form)
            for isa in thorough_isas()
            for attrs, form in ((EVEN, "bf16"), (OAI, "bf16"), (OAI, "mxfp4"), (EVEN, "q4"), (OAI, "q4k+q6k"))
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
    _check(attrs, weight_format, isa, _case(attrs, weight_format, rows, hot, seed, isa, away), threads)


@pytest.mark.parametrize(
    ("isa", "attrs", "weight_format"),
    [
        *(
            (isa, SILU, form)
            for form in FORMATS
            if form not in ("q4z", "q5k")
            for isa in isas_here()
            if isa in isas_of(form)
        ),
        (isas_here()[-1], SILU, "q5k+q4z"),
        *((isa, OAI, form) for form in (*packing.FORMATS, "q4k+q6k") for isa in thorough_isas()),
    ],
    ids=lambda v: v if isinstance(v, str) else v.function,
)
@pytest.mark.parametrize("away", [0.0, 0.4])
def test_a_few_tokens_get_what_each_would_get_alone(isa, attrs, weight_format, away):
    """Bit for bit: which tokens share a step must not change what a model says."""
    kernel = _kernel(attrs, weight_format, isa)
    for rows in range(2, cpu_isa(isa).few_tokens + 1):
        # With a hot expert its rows take several passes.
        inputs = _case(attrs, weight_format, rows, rows % 3 == 2, rows, isa, away).inputs
        (y,) = kernel(inputs, [(rows, attrs.hidden)], rows=rows, threads=2)
        for t in range(rows):
            (alone,) = kernel([i[t : t + 1] for i in inputs[:3]] + inputs[3:], [(1, attrs.hidden)], rows=1)
            np.testing.assert_array_equal(y[t : t + 1], alone)


def test_weights_that_may_be_on_the_disk_give_the_same():
    """The system is asked for pages that it has already; of the last expert, up to the end of the weights."""
    isa, inputs = isas_here()[-1], _operands(EVEN, "q4")
    output = [activation("y", "T", EVEN.hidden)]
    from_disk = build(EVEN, inputs, output, isa, {"T": ROWS}, from_disk=True)
    assert "fetch_pages" in from_disk.kernel.source
    for rows in (1, 5, 60):
        case = _case(EVEN, "q4", rows, False, rows, isa)
        (y,) = from_disk(case.inputs, [(rows, EVEN.hidden)], rows=rows, threads=2)
        (want,) = _kernel(EVEN, "q4", isa)(case.inputs, [(rows, EVEN.hidden)], rows=rows, threads=2)
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("attrs", OTHERS, ids=lambda a: a.function)
def test_glu_functions(isa, attrs):
    for rows in (1, 13):
        _check(attrs, "f32", isa, _case(attrs, "f32", rows, False, rows, isa), 2)


@pytest.mark.parametrize(("form", "isa"), [(form, isa) for form in ("bf16", "q4") for isa in isas_of(form)])
def test_a_hot_expert_of_many_blocks(form, isa):
    _check(SILU, form, isa, _case(SILU, form, ROWS, True, 1, isa), 3)
    _check(SILU, form, isa, _case(SILU, form, ROWS, False, 2, isa), 3)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("weight_format", [*(form for form in packing.FORMATS if form != "f32"), "q4k+q6k"])
def test_many_tokens_and_columns(isa, weight_format):
    _check(DEEP, weight_format, isa, _case(DEEP, weight_format, ROWS, False, 3, isa), 3)


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa not in isas_here()])
@pytest.mark.parametrize("weight_format", ["f32", "fp8", "q4", "q4k+q6k"])
def test_kernels_of_other_cpus_compile(isa, weight_format):
    """Not run here; with warnings as errors. A format of each family of tiles: linear kernels take all."""
    CompiledKernel(_emitted(OAI, weight_format, isa), isa, emulate=False)


def test_floats_and_whole_numbers_in_one_expert_are_refused():
    with pytest.raises(HetcompError, match="gate_up and down are bf16 and q4k, which are multiplied in different ways"):
        _kernel(EVEN, "q4k+bf16", isas_here()[0])


def test_a_token_may_name_one_expert_twice():
    a = SILU
    isa = isas_here()[-1]
    for rows in (1, 2, 8, 20):
        x, ids, weights, *rest = _case(a, "f32", rows, False, 5, isa).inputs
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
