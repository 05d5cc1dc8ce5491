"""GPU kernels of moe_experts, interpreted, against numpy in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hetcomp.backends import packing
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.types import TensorType
from tests.reference.experts_case import ExpertsCase, expert_weights
from tests.reference.kernel_harness import activation
from tests.reference.triton_harness import request, run

SILU = MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
EVEN = MoeExperts(experts=4, top_k=2, hidden=128, intermediate=64)
OAI = MoeExperts(
    experts=5, top_k=2, hidden=20, intermediate=37, function="swiglu_oai", alpha=1.702, limit=2.0, bias=True
)
WIDE = MoeExperts(experts=2, top_k=2, hidden=272, intermediate=264)  # more than a K block, in panels that end in one
OTHERS = [
    MoeExperts(experts=3, top_k=1, hidden=18, intermediate=16, function="gelu", bias=True),
    MoeExperts(experts=3, top_k=3, hidden=18, intermediate=5, function="gelu_tanh"),
    MoeExperts(experts=9, top_k=2, hidden=18, intermediate=20, function="relu"),
]


def _request(a: MoeExperts, weight_format: str, rows: int | None, here: int | None = None, tokens: int = 100):
    operands = [activation("x", "T", a.hidden), activation("i", "T", a.top_k), activation("r", "T", a.top_k)]
    operands += [_of(v, here or a.experts) for v in expert_weights(a, weight_format)]
    operands += [activation("gb", a.experts, 2 * a.intermediate), activation("db", a.experts, a.hidden)] * a.bias
    operands += [] if here is None else [activation("resident", a.experts)]
    return request(a, operands, [activation("y", "T", a.hidden)], {"T": tokens}, rows, here is not None)


def _of(value, experts: int):
    """The weight with so many experts."""
    shape = experts, *value.type.shape[1:]
    return dataclasses.replace(value, type=TensorType(value.type.dtype, shape, value.type.layout))


def _case(a: MoeExperts, weight_format: str, rows: int, hot: bool, exact: bool) -> ExpertsCase:
    """A GEMM rounds activations and weights to bf16, as AMX does; but beside f32 weights."""
    by = "float" if exact or weight_format == "f32" else "amx_bf16"
    return ExpertsCase(a, weight_format, rows, hot, rows, by, rounded=True)


def _check(a: MoeExperts, weight_format: str, rows: int, exact: bool, hot: bool = False, tokens: int = 100) -> None:
    case = _case(a, weight_format, rows, hot, exact)
    asked = _request(a, weight_format, rows if exact else None, tokens=tokens)
    grid_rows = rows if exact else rows + 9
    (y,) = run(asked, case.inputs, [((rows, a.hidden), np.float32)], rows=rows, grid_rows=grid_rows)
    assert (np.abs(y - case.want) <= case.bound).all()


@pytest.mark.parametrize(("rows", "exact"), [(1, True), (3, True), (0, False), (1, False), (40, False)])
@pytest.mark.parametrize("weight_format", packing.FORMATS)
def test_moe_experts(weight_format, rows, exact):
    _check(SILU, weight_format, rows, exact)


@pytest.mark.parametrize(
    ("attrs", "weight_format"),
    [
        (EVEN, "bf16"),
        (EVEN, "q4"),
        (OAI, "bf16"),
        (OAI, "mxfp4"),
        (WIDE, "q4k+q6k"),
        (WIDE, "q4z"),
        (EVEN, "q4:order"),
        (EVEN, "q8+q4z:order"),
        *((a, "f32") for a in OTHERS),
    ],
)
@pytest.mark.parametrize(("rows", "exact"), [(2, True), (13, False)])
def test_sizes_and_functions(attrs, weight_format, rows, exact):
    _check(attrs, weight_format, rows, exact)


def test_a_hot_expert_of_many_tiles():
    _check(SILU, "q4", 100, False, hot=True)


@pytest.mark.parametrize("weight_format", ["q4", "bf16"])
def test_tiles_of_many_rows(weight_format):
    """Tiles of 128 rows, full ones and some with few rows."""
    _check(SILU, weight_format, 140, False, hot=True, tokens=200)


def test_a_token_may_name_one_expert_twice():
    for rows, exact in ((2, True), (5, False)):
        case = _case(SILU, "f32", rows, False, exact)
        case.inputs[1][...] = 4
        asked = _request(SILU, "f32", rows if exact else None)
        (y,) = run(asked, case.inputs, [((rows, SILU.hidden), np.float32)], rows=rows)
        alone = [*case.inputs]
        alone[2] = np.zeros_like(alone[2])
        alone[2][:, 0] = case.inputs[2].sum(axis=1)
        (single,) = run(asked, alone, [((rows, SILU.hidden), np.float32)], rows=rows)
        np.testing.assert_allclose(y, single, rtol=1e-5, atol=1e-5 * np.abs(single).max())


@pytest.mark.parametrize("attrs", [SILU, OAI], ids=["silu", "oai"])
@pytest.mark.parametrize(("rows", "exact"), [(2, True), (13, False)])
def test_experts_that_lie_elsewhere_add_nothing(attrs, rows, exact):
    """Half of the experts here, in another order; what the others would add is left out."""
    case = _case(attrs, "q4", rows, False, exact)
    here = np.arange(attrs.experts)[::-2]
    resident = np.full(attrs.experts, -1, np.int32)
    resident[here] = np.arange(len(here))
    x, ids, weights, gate_up, down, *biases = case.inputs
    some = [m.reshape(attrs.experts, -1)[here].reshape(-1) for m in (gate_up, down)]
    asked = _request(attrs, "q4", rows if exact else None, len(here))
    operands = [x, ids, weights, *some, *(b[here] for b in biases), resident]
    (y,) = run(asked, operands, [((rows, attrs.hidden), np.float32)], rows=rows)
    all_here = _request(attrs, "q4", rows if exact else None)
    masked = np.where(resident[ids] >= 0, weights, np.float32(0))
    (want,) = run(all_here, [x, ids, masked, *case.inputs[3:]], [((rows, attrs.hidden), np.float32)], rows=rows)
    np.testing.assert_array_equal(y, want)
    assert np.abs(y - case.want).max() > 0.1
