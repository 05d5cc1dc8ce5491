"""What adapters add on a GPU: kernels, interpreted, against numpy in float64, rows of a step with different
adapters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from hetcomp.adapters.packed_pairs import pack_pairs, packed_rank
from hetcomp.adapters.pair_stack import PairStack
from hetcomp.backends import packing
from hetcomp.backends.adapted_ops import gpu_shape_of
from hetcomp.backends.gpu.kernels import GpuRequest
from hetcomp.backends.gpu.low_rank import PairTables
from hetcomp.ir.ops import HeadLinear, Linear, MoeExperts
from hetcomp.ir.plan import Value
from tests.reference.experts_case import expert_weights
from tests.reference.kernel_harness import activation, weight
from tests.reference.kernel_numbers import draw, packed
from tests.reference.triton_harness import StepAdapters, request, run

SLOTS, RANKS = 3, (3, 17, 0)  # of the adapters in the slots; 0: that one leaves the weight alone
Doubles = npt.NDArray[np.float64]


class Loaded:
    """Random pairs of some weights in the slots of a GPU's memory, as the runtime puts them there."""

    def __init__(self, values: list[Value], rows: int) -> None:
        rng = np.random.default_rng(5)
        self.of_row = rng.integers(-1, SLOTS, rows).astype(np.int32)
        self.deltas: dict[tuple[str, int], Doubles] = {}  # by weight and slot: [matrices, rows, columns]
        table = np.zeros((len(values) + 1, SLOTS, 4), np.int64)
        data = b""
        for i, value in enumerate(values):
            shape = gpu_shape_of(value)
            for slot, rank in enumerate(RANKS):
                if not rank:
                    continue
                a = draw(rng, (shape.matrices, rank, shape.columns))
                b = draw(rng, (shape.matrices, shape.rows, rank))
                if shape.number_bytes == 2:
                    a, b = (packing.to_f32(packing.to_bf16_bits(n)) for n in (a, b))
                stack = PairStack(a, b, 0.5 + slot, True)
                self.deltas[value.id, slot] = stack.scale * (b.astype(np.float64) @ a.astype(np.float64))
                scale = np.array([stack.scale], np.float32).view(np.int32)[0]
                parts = [part.tobytes() for part in pack_pairs(stack, shape)]
                starts = [len(data), len(data) + len(parts[0])]
                data += b"".join(parts)
                table[i, slot] = [*(start // shape.number_bytes for start in starts), packed_rank(rank), scale]
        ids = [value.id for value in values]
        numbers = "fp32" if gpu_shape_of(values[0]).number_bytes == 4 else "bf16"
        offsets = {id: i * SLOTS * 32 for i, id in enumerate(ids)}
        tables = PairTables(offsets, dict.fromkeys(ids, numbers), len(ids) * SLOTS * 32, 20, SLOTS)
        self.pairs = tables.of("T", *ids)
        self.step = StepAdapters(self.of_row, np.frombuffer(data, np.uint8), table)

    def delta(self, value: Value, row: int) -> Doubles:
        """What the adapter of a row adds to a weight."""
        nothing = np.zeros(tuple(int(d) for d in value.type.shape))
        found = self.deltas.get((value.id, int(self.of_row[row])))
        return nothing if found is None else found.reshape(nothing.shape)


def bound(weight_format: str, exact: bool) -> float:
    """Of the largest number: f32 sums, or activations and h rounded to bf16, 2^-9 each, and sums of them."""
    return 3e-6 if exact or weight_format == "f32" else 2e-2


def check(asked: GpuRequest, arrays: list, want: Doubles, loaded: Loaded, rows: int, exact: bool, form: str) -> None:
    asked = replace(asked, pairs=loaded.pairs)
    grid = rows if exact and rows <= 8 else rows + 5
    (y,) = run(asked, arrays, [(want.shape, np.float32)], rows=rows, grid_rows=grid, adapters=loaded.step)
    assert np.abs(y - want).max() <= bound(form, exact and rows <= 8) * np.abs(want).max()


ROWS = [(1, True), (7, True), (12, True), (40, False)]


@pytest.mark.parametrize(("rows", "exact"), ROWS)
@pytest.mark.parametrize("form", ["f32", "q4"])
def test_linears_of_rows_with_different_adapters(form, rows, exact):
    rng = np.random.default_rng(rows)
    value = weight("w", (37, 75), form, packing.PANELS)
    data, w = packed(draw(rng, (37, 75)), value)
    x, b = draw(rng, (rows, 75)), draw(rng, (37,))
    loaded = Loaded([value], rows)
    asked = request(
        Linear(75, 37, True),
        [activation("x", "T", 75), value, activation("b", 37)],
        [activation("y", "T", 37)],
        {"T": 100},
        rows if exact else None,
    )
    want = np.stack([(w + loaded.delta(value, t)) @ x[t].astype(np.float64) + b for t in range(rows)])
    check(asked, [x, data, b], want, loaded, rows, exact, form)


@pytest.mark.parametrize(("rows", "exact"), ROWS)
def test_heads_have_pairs_of_their_own(rows, exact):
    rng = np.random.default_rng(rows)
    value = weight("w", (3, 20, 33), "f32", packing.PANELS)
    data, w = packed(draw(rng, (3, 20, 33)), value)
    x = draw(rng, (rows, 3, 33))
    loaded = Loaded([value], rows)
    operands = [activation("x", "T", 3, 33), value]
    asked = request(HeadLinear(3, 33, 20), operands, [activation("y", "T", 3, 20)], {"T": 100}, rows if exact else None)
    want = np.stack([np.einsum("hnk,hk->hn", w + loaded.delta(value, t), x[t].astype(np.float64)) for t in range(rows)])
    check(asked, [x, data], want, loaded, rows, exact, "f32")


@pytest.mark.parametrize(("rows", "exact"), [(1, True), (7, True), (40, False)])
@pytest.mark.parametrize("form", ["f32", "q4"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_experts_of_rows_with_different_adapters(form, rows, exact, elsewhere):
    """``elsewhere``: half of the experts are here, in another order; pairs are numbered as all of them."""
    a = MoeExperts(experts=6, top_k=3, hidden=40, intermediate=21)
    rng = np.random.default_rng(rows)
    values = list(expert_weights(a, form))
    stored = [packed(draw(rng, tuple(int(d) for d in v.type.shape)), v) for v in values]
    x, weights = draw(rng, (rows, a.hidden)), rng.random((rows, a.top_k), np.float32)
    ids = np.stack([rng.permutation(a.experts)[: a.top_k] for _ in range(rows)]).astype(np.int32)
    here = np.arange(a.experts)[::-2] if elsewhere else np.arange(a.experts)
    resident = np.full(a.experts, -1, np.int32)
    resident[here] = np.arange(len(here))
    loaded = Loaded(values, rows)
    want = np.zeros((rows, a.hidden))
    for t in range(rows):
        up, down = (w + loaded.delta(v, t) for v, (_, w) in zip(values, stored, strict=True))
        for expert, share in zip(ids[t], weights[t], strict=True):
            gate, linear = np.split(up[expert] @ x[t].astype(np.float64), 2)
            want[t] += (resident[expert] >= 0) * share * (down[expert] @ (gate / (1 + np.exp(-gate)) * linear))
    some = [replace(v, type=replace(v.type, shape=(len(here), *v.type.shape[1:]))) for v in values]
    operands = [activation("x", "T", a.hidden), activation("i", "T", 3), activation("r", "T", 3), *some]
    operands += [activation("resident", a.experts)] * elsewhere
    arrays = [x, ids, weights, *(d.reshape(a.experts, -1)[here].reshape(-1) for d, _ in stored)]
    arrays += [resident] * elsewhere
    asked = request(
        a, operands, [activation("y", "T", a.hidden)], {"T": 100}, rows if exact else None, resident=elsewhere
    )
    check(asked, arrays, want, loaded, rows, exact, form)
