"""Generated kernels of linear, head_linear, embed and select_rows against numpy in float64."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.backends.cpu import FORMATS, CpuBackend
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.errors import HetcompError
from hetcomp.ir.layouts import with_act_order
from hetcomp.ir.ops import Embed, HeadLinear, Linear, RmsNorm, SelectRows
from hetcomp.ir.plan import Op, Value
from tests.reference.kernel_harness import (
    CompiledKernel,
    Step,
    activation,
    build,
    clang_here,
    emit,
    isas_here,
    isas_of,
    isas_to_test,
    thorough_isas,
    weakest_and_best,
    weight,
)
from tests.reference.kernel_numbers import (
    column_orders,
    dot_error,
    draw,
    family,
    packed,
    packed_extremes,
    rounding_of,
    seen,
    terms,
    weight_rounding,
)

ROWS = 64
DIMS = {"T": ROWS, "R": ROWS, "slots": 1, "context": 16}


def _weight(out: int, k: int, weight_format: str) -> Value:
    """With ``:order`` behind the format, of columns in an order of their own."""
    form, _, ordered = weight_format.partition(":")
    return weight("w", (out, k), form, with_act_order(packing.PANELS) if ordered else packing.PANELS)


@functools.cache
def _linear(out: int, k: int, bias: bool, weight_format: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted_linear(out, k, bias, weight_format, isa), isa)


def _emitted_linear(out: int, k: int, bias: bool, weight_format: str, isa: Isa) -> Kernel:
    inputs = [activation("x", "T", k), _weight(out, k, weight_format)]
    inputs += [activation("b", out)] if bias else []
    return emit(Linear(k, out, bias), inputs, [activation("y", "T", out)], isa, DIMS)


@pytest.mark.parametrize(
    ("weight_format", "isa", "out", "k", "bias"),
    [
        *((form, isa, 80, 600, False) for form in FORMATS for isa in isas_of(form)),
        *((form, isa, 17, 33, True) for form in FORMATS if form not in ("q4z", "q5k") for isa in thorough_isas()),
        *((form, isa, 1, 1, False) for form in packing.FORMATS for isa in thorough_isas()),
        # Columns in an order of their own, more than a packing task takes.
        ("q4:order", isas_here()[0], 50, 640, False),
        ("q4z:order", isas_here()[-1], 50, 640, True),
        ("q8:order", isas_to_test()[-1], 50, 640, False),
    ],
)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(0, 40), threads=st.integers(1, 3), seed=st.integers(0, 999))
@example(rows=ROWS, threads=3, seed=0)  # as many as the families for many tokens are for
def test_linear(isa, weight_format, out, k, bias, rows, threads, seed):
    rng = np.random.default_rng(seed)
    x = draw(rng, (rows, k))
    value = _weight(out, k, weight_format)
    data, w = packed(draw(rng, (out, k)), value)
    orders, form = column_orders(data, value), str(value.format)
    order = None if orders is None else orders[0]
    b = draw(rng, (out,)) if bias else np.zeros(out, np.float32)
    kernel = _linear(out, k, bias, weight_format, isa)
    inputs = [x, data, b] if bias else [x, data]
    (y,) = kernel(inputs, [(rows, out)], rows=rows, threads=threads)
    facts = cpu_isa(isa)
    by = family(form, facts, rows, rows <= facts.tuning(form).gemv_rows)
    w64, x64 = w.astype(np.float64), seen(x, by, order)
    magnitude = np.abs(x64) @ terms(data, value).T
    bound = dot_error(k, magnitude + np.abs(b)) + weight_rounding(form, by) * magnitude
    assert (np.abs(y - (x64 @ w64.T + b)) <= bound).all()
    # Against activations that were not rounded: each term is off by its activation's rounding at most.
    exact = np.abs(y - (x.astype(np.float64) @ w64.T + b))
    assert (exact <= bound + rounding_of(x.astype(np.float64), by, order) @ np.abs(w64.T)).all()
    (alone,) = kernel(inputs, [(rows, out)], rows=rows, threads=1)
    np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize(
    ("weight_format", "isa"),
    [(form, isa) for form in ("q4", "q8", "fp8", "mxfp4", "q4z", "q4k", "q5k", "q6k") for isa in isas_of(form)],
)
@pytest.mark.parametrize("rows", [1, 5, ROWS])
def test_linear_takes_codes_that_only_checkpoints_have(isa, weight_format, rows):
    """Weights and activations are the largest that there are, of all signs: sums of two products in 16 bits must not
    saturate."""
    out, k = 80, 600
    rng = np.random.default_rng(rows)
    value = weight("w", (out, k), weight_format, packing.PANELS)
    data, w = packed_extremes(rng, value)
    x = np.where(rng.random((rows, k)) < 0.9, 1.0, -1.0).astype(np.float32)
    (y,) = _linear(out, k, False, weight_format, isa)([x, data], [(rows, out)], rows=rows, threads=1)
    facts = cpu_isa(isa)
    by = family(weight_format, facts, rows, rows <= facts.tuning(weight_format).gemv_rows)
    w64, x64 = w.astype(np.float64), seen(x, by)
    magnitude = np.abs(x64) @ terms(data, value).T
    bound = dot_error(k, magnitude) + weight_rounding(weight_format, by) * magnitude
    assert (np.abs(y - x64 @ w64.T) <= bound).all()


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("weight_format", packing.FORMATS)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(0, 40), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_head_linear(isa, weight_format, rows, threads, seed):
    heads, k, out = 3, 21, 37
    rng = np.random.default_rng(seed)
    x = draw(rng, (rows, heads, k))
    value = weight("w", (heads, out, k), weight_format, packing.PANELS)
    data, w = packed(draw(rng, (heads, out, k)), value)
    kernel = _head_linear(heads, k, out, weight_format, isa)
    (y,) = kernel([x, data], [(rows, heads, out)], rows=rows, threads=threads)
    facts = cpu_isa(isa)
    by = family(weight_format, facts, rows, rows <= facts.tuning(weight_format).gemv_rows)
    x64, w64 = seen(x, by), w.astype(np.float64)
    want = np.einsum("thk,hnk->thn", x64, w64)
    magnitude = np.einsum("thk,hnk->thn", np.abs(x64), terms(data, value))
    bound = dot_error(k, magnitude) + weight_rounding(weight_format, by) * magnitude
    assert (np.abs(y - want) <= bound).all()


@functools.cache
def _head_linear(heads: int, k: int, out: int, weight_format: str, isa: Isa) -> CompiledKernel:
    w = weight("w", (heads, out, k), weight_format, packing.PANELS)
    outputs = [activation("y", "T", heads, out)]
    return build(HeadLinear(heads, k, out), [activation("x", "T", heads, k), w], outputs, isa, DIMS)


@functools.cache
def _embed(vocab: int, width: int, scale: float, weight_format: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted_embed(vocab, width, scale, weight_format, isa), isa)


def _emitted_embed(vocab: int, width: int, scale: float, weight_format: str, isa: Isa) -> Kernel:
    table = weight("w", (vocab, width), weight_format, packing.PANELS)
    inputs = [activation("ids", "T"), table]
    return emit(Embed(vocab, width, scale), inputs, [activation("y", "T", width)], isa, DIMS)


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("weight_format", FORMATS)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(0, 40), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_embed_reads_the_layout_of_lm_head(isa, weight_format, rows, threads, seed):
    vocab, width, scale = 50, 301, 1.5
    rng = np.random.default_rng(seed)
    data, table = packed(draw(rng, (vocab, width)), weight("w", (vocab, width), weight_format, packing.PANELS))
    ids = rng.integers(0, vocab, rows).astype(np.int32)
    (y,) = _embed(vocab, width, scale, weight_format, isa)([ids, data], [(rows, width)], rows=rows, threads=threads)
    np.testing.assert_array_equal(y, table[ids] * np.float32(scale))


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 40), rows=st.integers(0, 9), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_select_rows(tokens, rows, threads, seed):
    width = 19
    rng = np.random.default_rng(seed)
    x, chosen = draw(rng, (tokens, width)), rng.integers(0, tokens, rows).astype(np.int32)
    (y,) = _select_rows(width)([x], [(rows, width)], rows=rows, threads=threads, step=Step(logit_rows=chosen))
    np.testing.assert_array_equal(y, x[chosen])


@functools.cache
def _select_rows(width: int) -> CompiledKernel:
    outputs = [activation("y", "R", width)]
    return build(SelectRows(), [activation("x", "T", width)], outputs, isas_here()[0], DIMS)


def test_infinite_and_nan_activations_stay_in_their_row():
    isa = isas_here()[-1]
    out, k = 80, 600
    for weight_format, bad in itertools.product(("bf16", "q8", "q4", "q4k"), (np.nan, np.inf)):
        data, _ = packed(draw(np.random.default_rng(0), (out, k)), weight("w", (out, k), weight_format, packing.PANELS))
        for rows in (2, 30):
            x = draw(np.random.default_rng(1), (rows, k))
            x[1, 5] = bad
            (y,) = _linear(out, k, False, weight_format, isa)([x, data], [(rows, out)], rows=rows, threads=2)
            assert not np.isfinite(y[1]).any()
            assert np.isfinite(np.delete(y, 1, axis=0)).all()


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa not in isas_here()])
@pytest.mark.parametrize("weight_format", packing.FORMATS)
def test_kernels_of_other_cpus_compile(isa, weight_format):
    """Not run here; with warnings as errors. Of K blocks the kernels of experts are, which have both in one."""
    for kernel in (
        _emitted_linear(80, 600, True, weight_format, isa),
        _emitted_embed(50, 301, 1.5, weight_format, isa),
    ):
        CompiledKernel(kernel, isa, emulate=False)


@pytest.mark.skipif(clang_here() is None, reason="clang++ is not installed")
def test_clang_compiles_the_same_source():
    isa, compiler = isas_here()[-1], clang_here()
    assert compiler
    rng = np.random.default_rng(0)
    for weight_format in ("bf16", "q4"):
        data, _ = packed(draw(rng, (80, 600)), weight("w", (80, 600), weight_format, packing.PANELS))
        x = draw(rng, (13, 600))
        gcc = _linear(80, 600, False, weight_format, isa)
        (want,) = gcc([x, data], [(13, 80)], rows=13, threads=2)
        (y,) = CompiledKernel(gcc.kernel, isa, compiler)([x, data], [(13, 80)], rows=13, threads=2)
        # The same sums; the compilers may contract other products.
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def _request(weight_format: str, layout: str = packing.PANELS) -> KernelRequest:
    inputs = (activation("x", "T", 8), weight("w", (4, 8), weight_format, layout))
    op = Op("op3", Linear(8, 4), (), (), origin="model.layers.0.mlp.gate")
    return KernelRequest(op, inputs, (activation("y", "T", 4),), Isa.AVX2, DIMS)


def test_equal_requests_give_equal_names_and_other_code_another_name():
    backend = CpuBackend()
    first, again = backend.emit(_request("f32")), backend.emit(_request("f32"))
    assert first == again
    assert first.name != backend.emit(_request("bf16")).name
    assert first.workspace_bytes == backend.workspace_bytes(_request("f32"))


def test_what_the_backend_cannot_do_is_refused_by_name():
    backend = CpuBackend()
    assert backend.score(_request("f32")) > 0
    assert backend.score(_request("q5")) == 0
    with pytest.raises(HetcompError, match=r"model\.layers\.0\.mlp\.gate: weight w has format q5"):
        backend.emit(_request("q5"))
    with pytest.raises(HetcompError, match="layout row_major; expected panels16"):
        backend.emit(_request("f32", packing.ROW_MAJOR))
    norm = KernelRequest(Op("n", RmsNorm(8, 1e-6), (), ()), (), (), Isa.AVX2, DIMS)
    assert backend.score(norm) == 0
    with pytest.raises(HetcompError, match="no template for 'rms_norm'"):
        backend.emit(norm)
