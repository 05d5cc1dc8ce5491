"""glu, activation, add, mul, scale, slice, concat of the TVM backend against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from tests.reference.tvm_harness import BACKEND, machine_isas, request, run, value
from tests.sampled_cases import draws

pytestmark = pytest.mark.spread("isa")
ISAS = machine_isas()
FEW = settings(max_examples=draws(4), deadline=None, derandomize=True)

FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _random(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def _pointwise(attrs: ops.Attrs, arrays: list[np.ndarray], isa: Isa, threads: int = 1) -> np.ndarray:
    ins = [value(f"x{i}", ("T", *a.shape[1:])) for i, a in enumerate(arrays)]
    kernel = BACKEND.emit(request(attrs, ins, [value("y", ("T", *arrays[0].shape[1:]))], isa))
    return run(kernel, isa, arrays, [(arrays[0].shape, np.float32)], len(arrays[0]), threads)[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_is_accurate_to_a_few_ulp_of_its_range(function: str, isa: Isa):
    """Absolute error below 2^-20 of max(1, |y|), over [-120, 120] and densely around 0."""
    x = np.concatenate([np.linspace(-120, 120, 33_000), np.linspace(-6, 6, 33_000)]).astype(np.float32)
    got = _pointwise(ops.Activation(function), [x.reshape(-1, 33)], isa).ravel()
    want = FUNCTIONS[function](torch.from_numpy(x).double()).numpy()
    assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() < 2.0**-20


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", ["sigmoid", "silu", "tanh"])
def test_small_arguments_keep_relative_accuracy(function: str, isa: Isa):
    x = np.geomspace(1e-30, 0.5, 3300).astype(np.float32).reshape(-1, 33)
    got = _pointwise(ops.Activation(function), [x], isa)
    want = FUNCTIONS[function](torch.from_numpy(x).double()).numpy()
    assert (np.abs(got - want) / np.abs(want)).max() < 4e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_nan_and_infinities_give_the_limits(function: str, isa: Isa):
    x = np.array([[np.nan, np.inf, -np.inf] * 11], np.float32)
    got = _pointwise(ops.Activation(function), [x], isa)
    assert np.isnan(got[0, ::3]).all()
    assert (got[0, 1::3] == (1.0 if function in ("sigmoid", "tanh") else np.inf)).all()
    if function in ("relu", "sigmoid", "tanh"):  # the others are -inf * 0 there, in torch too
        assert (got[0, 2::3] == (-1.0 if function == "tanh" else 0.0)).all()


def _glu(function: str, gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    if function != "swiglu_oai":
        return FUNCTIONS[function](gate) * up
    g = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"])
def test_glu(function: str, isa: Isa):
    for rows, width, threads in ((1, 37, 1), (129, 37, 3)):
        gate, up = _random(rows, width, seed=1), _random(rows, width, seed=2, scale=9)
        attrs = ops.Glu(width, function, alpha=1.702, limit=7.0)
        got = _pointwise(attrs, [gate, up], isa, threads)
        want = _glu(function, torch.from_numpy(gate).double(), torch.from_numpy(up).double(), 1.702, 7.0)
        # 1 + erf cancels for negative gates: the error is relative to up, not to the product.
        assert (np.abs(got - want.numpy()) <= 2e-6 * (1 + np.abs(up) + np.abs(want.numpy()))).all()


@pytest.mark.parametrize("isa", ISAS)
@FEW
@given(
    rows=st.integers(1, 300),
    shape=st.sampled_from([(33,), (3, 20)]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_add_mul_scale(isa: Isa, rows: int, shape: tuple[int, ...], threads: int, seed: int):
    a, b = _random(rows, *shape, seed=seed), _random(rows, *shape, seed=seed + 1)
    np.testing.assert_array_equal(_pointwise(ops.Add(), [a, b], isa, threads), a + b)
    np.testing.assert_array_equal(_pointwise(ops.Mul(), [a, b], isa, threads), a * b)
    np.testing.assert_array_equal(_pointwise(ops.Scale(0.3), [a], isa, threads), a * np.float32(0.3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (77, 33), (513, 5)])
def test_mul_by_one_number_a_row(isa: Isa, rows: int, width: int):
    a, b = _random(rows, width), _random(rows, 1, seed=1)
    ins = [value("a", ("T", width)), value("b", ("T", 1))]
    kernel = BACKEND.emit(request(ops.Mul(), ins, [value("y", ("T", width))], isa))
    (got,) = run(kernel, isa, [a, b], [((rows, width), np.float32)], rows, 2)
    np.testing.assert_array_equal(got, a * b)


@pytest.mark.parametrize("isa", ISAS)
@FEW
@given(
    rows=st.integers(1, 70),
    outer=st.sampled_from([(), (1,), (3,)]),
    columns=st.integers(1, 80),
    data=st.data(),
)
def test_slice(isa: Isa, rows: int, outer: tuple[int, ...], columns: int, data: st.DataObject):
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    x = _random(rows, *outer, columns)
    ins, outs = [value("x", ("T", *outer, columns))], [value("y", ("T", *outer, stop - start))]
    kernel = BACKEND.emit(request(ops.Slice(start, stop), ins, outs, isa))
    (got,) = run(kernel, isa, [x], [((rows, *outer, stop - start), np.float32)], rows, 2)
    np.testing.assert_array_equal(got, x[..., start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shapes", [[(7,), (16,), (33,)], [(4, 20), (1, 12)], [(1, 3), (5, 16), (1, 17)]])
def test_concat_repeats_a_single_head(isa: Isa, shapes: list[tuple[int, ...]]):
    rows = 19
    arrays = [_random(rows, *s, seed=i) for i, s in enumerate(shapes)]
    heads = max(s[0] for s in shapes) if len(shapes[0]) == 2 else None
    full = [np.repeat(a, heads, 1) if heads and a.shape[1] == 1 else a for a in arrays]
    want = np.concatenate(full, -1)
    ins = [value(f"x{i}", ("T", *s)) for i, s in enumerate(shapes)]
    kernel = BACKEND.emit(request(ops.Concat(), ins, [value("y", ("T", *want.shape[1:]))], isa))
    (got,) = run(kernel, isa, arrays, [(want.shape, np.float32)], rows, 3)
    np.testing.assert_array_equal(got, want)


def test_no_rows_is_no_work():
    attrs = ops.Add()
    ins = [value("a", ("R", 32)), value("b", ("R", 32))]
    kernel = BACKEND.emit(request(attrs, ins, [value("y", ("R", 32))], ISAS[-1]))
    nothing = np.zeros((0, 32), np.float32)
    assert run(kernel, ISAS[-1], [nothing, nothing], [((0, 32), np.float32)], 0, 2)[0].size == 0


def test_shapes_that_do_not_fit_are_refused_with_the_module_path():
    isa = ISAS[0]
    x, y = value("x", ("T", 8)), value("y", ("T", 8))
    for attrs, ins in (
        (ops.Mul(), [x, value("b", ("T", 3))]),
        (ops.Add(), [x, value("b", ("T", 3))]),
        (ops.Slice(4, 12), [x]),
        (ops.Concat(), [x, value("b", ("T", 3))]),
    ):
        with pytest.raises(HetcompError, match=r"model\.layers\.0\.test"):
            BACKEND.emit(request(attrs, ins, [y], isa))


def test_exp_is_within_two_ulp():
    """Through softmax-like use: sigmoid(-x) / sigmoid(x) would hide it, so exp itself is compiled and run."""
    from hetcomp.backends import tvm_elementwise, tvm_math
    from hetcomp.backends.tvm_rowwise import BLOCK, Operand, RowKernel, Stage, emit_rowwise

    for isa in ISAS:
        stage = Stage(
            lambda: tvm_elementwise.unary(tvm_math.exp, 8),
            (Operand("args.in[0]", (BLOCK,)), Operand("args.out[0]", (BLOCK,))),
        )
        kernel = emit_rowwise(f"exp_{isa.value}", isa, RowKernel("exp", "an element", "args.rows", 64, (stage,)))
        x = np.linspace(-103.9, 88.7, 300_001).astype(np.float32)
        special = np.array([np.nan, np.inf, -np.inf, 0.0, -200.0, 200.0], np.float32)
        both = np.concatenate([x, special])
        (got,) = run(kernel, isa, [both], [(both.shape, np.float32)], len(both))
        want = np.exp(x.astype(np.float64))
        ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
        assert (np.abs(got[: len(x)] - want) / ulp).max() <= 2.0
        assert math.isnan(got[-6])
        np.testing.assert_array_equal(got[-5:], [np.inf, 0.0, 1.0, 0.0, np.inf])
