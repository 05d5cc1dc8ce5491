"""What adapters add in generated kernels of linear, head_linear and moe_experts, against numpy in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hetcomp.adapters.packed_pairs import pack_pairs, packed_rank
from hetcomp.adapters.pair_stack import PairStack
from hetcomp.backends import packing
from hetcomp.backends.adapted_ops import shape_of
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.ir.ops import HeadLinear, Linear, MoeExperts
from hetcomp.ir.plan import Value
from tests.reference.experts_case import expert_weights
from tests.reference.kernel_harness import (
    AdaptedRows,
    CompiledKernel,
    activation,
    build,
    isas_here,
    thorough_isas,
    weight,
)
from tests.reference.kernel_numbers import draw, packed
from tests.reference.pair_numbers import pair_numbers

ROWS = 60
# Each weight's pairs by adapter: (rank, scale); None: the adapter leaves the weight alone. One rank is no multiple of
# what kernels take at a time.
RANKS = ((3, 0.5), None, (16, 2.0))


class Pairs:
    """Random pairs of an adapter for a weight, as the kernel gets them and as deltas f64 [matrices, rows, columns]."""

    def __init__(self, rng: np.random.Generator, value: Value, rank: int, scale: float) -> None:
        shape = shape_of(value)
        # Numbers of 8 bits are the same in bf16 and f32; those that are stored in 8 bits have scales of their rows.
        a = rng.integers(-128, 128, (shape.matrices, rank, shape.columns)).astype(np.float32) / 128
        b = rng.integers(-128, 128, (shape.matrices, shape.rows, rank)).astype(np.float32) / 128
        self.packed = (packed_rank(rank), scale, *pack_pairs(PairStack(a, b, scale, True), shape))
        a, b = pair_numbers(*self.packed[2:], self.packed[0], shape)
        self.delta = scale * np.einsum("nor,nri->noi", b.astype(np.float64), a.astype(np.float64))
        self.magnitude = abs(scale) * np.einsum("nor,nri->noi", np.abs(b).astype(np.float64), np.abs(a))


def _adapters(rng: np.random.Generator, values: list[Value]) -> list[list[Pairs | None]]:
    made = [[Pairs(rng, v, *ranks) if ranks else None for v in values] for ranks in RANKS]
    if len(values) > 1:  # one changes gate_up alone, another down alone
        made[1][1] = Pairs(rng, values[1], 5, 1.5)
        made.append([Pairs(rng, values[0], 4, -1.0), None])
    return made


def _rows_of(adapters: list[list[Pairs | None]], of_row: np.ndarray, scratch: int) -> AdaptedRows:
    return AdaptedRows([[p.packed if p else None for p in adapter] for adapter in adapters], of_row, scratch)


def _rank(adapters: list[list[Pairs | None]]) -> int:
    return max(p.packed[0] for adapter in adapters for p in adapter if p)


@functools.cache
def _linear(heads: int, out: int, k: int, bias: bool, weight_format: str, isa: Isa) -> tuple[CompiledKernel, Value]:
    lead = (heads,) if heads > 1 else ()
    w = weight("w", (*lead, out, k), weight_format, packing.PANELS)
    inputs = [activation("x", "T", *lead, k), w, *([activation("b", out)] if bias else [])]
    attrs = HeadLinear(heads, k, out) if heads > 1 else Linear(k, out, bias)
    return build(attrs, inputs, [activation("y", "T", *lead, out)], isa, {"T": ROWS}), w


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize(
    ("heads", "out", "k", "bias", "weight_format"),
    [(1, 37, 75, True, "f32"), (1, 80, 128, False, "q4"), (1, 37, 75, False, "bf16"), (3, 21, 18, False, "f32")],
)
def test_linear(isa, heads, out, k, bias, weight_format):
    kernel, w = _linear(heads, out, k, bias, weight_format, isa)
    rng = np.random.default_rng(out)
    data, _ = packed(draw(rng, tuple(int(d) for d in w.type.shape)), w)
    adapters = _adapters(rng, [w])
    for rows in (1, 2, 8, 40, ROWS):
        x = draw(rng, (rows, heads, k))
        inputs = [x, data, *([draw(rng, (out,))] if bias else [])]
        of_row = rng.integers(-1, len(adapters), rows).astype(np.int32)
        of_row[rows // 2] = 2
        shape = [(rows, heads, out)]
        (base,) = kernel(inputs, shape, rows=rows, threads=2)
        scratch = rows * heads * _rank(adapters)
        (y,) = kernel(inputs, shape, rows=rows, threads=2, adapted=_rows_of(adapters, of_row, scratch))
        for t, adapter in enumerate(of_row):
            pairs = adapters[adapter][0] if adapter >= 0 else None
            if pairs is None:
                np.testing.assert_array_equal(y[t], base[t])
                continue
            added = np.einsum("noi,ni->no", pairs.delta, x[t].astype(np.float64))
            bound = 1e-5 * (np.einsum("noi,ni->no", pairs.magnitude, np.abs(x[t])) + np.abs(base[t]))
            assert (np.abs(y[t] - base[t] - added) <= bound).all()
        (alone,) = kernel(inputs, shape, rows=rows, threads=1, adapted=_rows_of(adapters, of_row, scratch))
        np.testing.assert_array_equal(y, alone)


EXPERTS = MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
OAI = MoeExperts(
    experts=5, top_k=2, hidden=20, intermediate=37, function="swiglu_oai", alpha=1.702, limit=7.0, bias=True
)


@functools.cache
def _experts(a: MoeExperts, weight_format: str, isa: Isa) -> tuple[CompiledKernel, list[Value]]:
    weights = list(expert_weights(a, weight_format))
    inputs = [activation("x", "T", a.hidden), activation("i", "T", a.top_k), activation("r", "T", a.top_k), *weights]
    inputs += [activation("gb", a.experts, 2 * a.intermediate), activation("db", a.experts, a.hidden)] * a.bias
    return build(a, inputs, [activation("y", "T", a.hidden)], isa, {"T": ROWS}), weights


class ExpertsCall:
    """A call whose adapters can also be merged into f32 weights: into the numbers that the packed ones stand for."""

    def __init__(self, a: MoeExperts, weight_format: str, isa: Isa, rows: int) -> None:
        self.attrs = a
        self.kernel, weights = _experts(a, weight_format, isa)
        self.exact = _experts(a, "f32", isa)
        rng = np.random.default_rng(rows)
        self.adapters = _adapters(rng, weights)
        self.values, self.weights = weights, [draw(rng, tuple(int(d) for d in v.type.shape)) for v in weights]
        ids = np.array([rng.permutation(a.experts)[: a.top_k] for _ in range(rows)], np.int32)
        ids[rng.random(ids.shape) < 0.2] = -1
        self.rows = [draw(rng, (rows, a.hidden)), ids, rng.random((rows, a.top_k), np.float32)]
        self.biases = [draw(rng, (a.experts, 2 * a.intermediate)), draw(rng, (a.experts, a.hidden))] * a.bias
        self.of_row = rng.integers(-1, len(self.adapters), rows).astype(np.int32)
        self.of_row[rows // 2] = 2

    def run(self, rows: slice, threads: int, adapted: bool = True) -> np.ndarray:
        """The result of some rows."""
        data = [packed(w, v)[0] for w, v in zip(self.weights, self.values, strict=True)]
        return self._call(self.kernel, data, rows, threads, adapted)

    def _call(
        self, kernel: CompiledKernel, data: list[np.ndarray], rows: slice, threads: int, adapted: bool
    ) -> np.ndarray:
        some = [part[rows] for part in self.rows]
        n, a = len(some[0]), self.attrs
        scratch = n * a.top_k * (packing.padded_columns(a.intermediate, "q8") + 2 * _rank(self.adapters))
        with_them = _rows_of(self.adapters, self.of_row[rows], scratch) if adapted else None
        inputs = [*some, *data, *self.biases]
        return kernel(inputs, [(n, a.hidden)], rows=n, threads=threads, adapted=with_them)[0]

    def merged(self, adapter: int) -> np.ndarray:
        """The result of all rows with the adapter added to the weights."""
        pairs = self.adapters[adapter] if adapter >= 0 else [None, None]
        kernel, values = self.exact
        data = []
        for w, own, value, pair in zip(self.weights, self.values, values, pairs, strict=True):
            numbers = packed(w, own)[1] + (pair.delta if pair else 0)
            data.append(packed(numbers.astype(np.float32), value)[0])
        return self._call(kernel, data, slice(None), 1, adapted=False)


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("attrs", [EXPERTS, OAI], ids=lambda a: a.function)
@pytest.mark.parametrize("rows", [1, 3, 8, 11, ROWS])
def test_experts_as_with_merged_weights(isa, attrs, rows):
    """f32 sums in another order."""
    call = ExpertsCall(attrs, "f32", isa, rows)
    y = call.run(slice(None), 2)
    for adapter in range(-1, len(call.adapters)):
        mine = call.of_row == adapter
        want = call.merged(adapter)[mine]
        assert (np.abs(y[mine] - want) <= 2e-5 * np.abs(want).max(initial=1)).all(), adapter
    np.testing.assert_array_equal(y, call.run(slice(None), 1))
    np.testing.assert_array_equal(y[call.of_row < 0], call.run(slice(None), 2, adapted=False)[call.of_row < 0])


@pytest.mark.parametrize("isa", thorough_isas())
@pytest.mark.parametrize("weight_format", ["q4", "bf16", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 8, ROWS])
def test_coarse_experts_get_the_same_added(isa, weight_format, rows):
    """As with merged weights but for activations, which are rounded to 8 bits, twice one after the other, or to bf16
    where they meet the base's weights. What is added is made of activations that are not rounded."""
    call = ExpertsCall(EXPERTS, weight_format, isa, rows)
    y, base = call.run(slice(None), 2), call.run(slice(None), 2, adapted=False)
    assert (np.abs(y - base)[call.of_row == 2].max(axis=1, initial=0) > 0).all()
    np.testing.assert_array_equal(y[call.of_row < 0], base[call.of_row < 0])
    np.testing.assert_array_equal(y, call.run(slice(None), 1))
    for adapter in range(len(call.adapters)):
        mine = call.of_row == adapter
        want = call.merged(adapter)[mine]
        error = np.linalg.norm(y[mine] - want)
        assert error <= 0.02 * np.linalg.norm(want), adapter


@pytest.mark.parametrize("weight_format", ["f32", "q4"])
def test_a_few_tokens_get_what_each_would_get_alone(weight_format):
    """Bit for bit, whichever adapters the others have."""
    isa = isas_here()[-1]
    call = ExpertsCall(EXPERTS, weight_format, isa, cpu_isa(isa).few_tokens)
    y = call.run(slice(None), 2)
    for t in range(len(y)):
        np.testing.assert_array_equal(y[t : t + 1], call.run(slice(t, t + 1), 2))
