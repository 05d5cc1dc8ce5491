"""Operand rules of single ops: what is right passes, each wrong operand is refused with its name."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from hetcomp.ir import op_types, ops
from hetcomp.ir.plan import Op
from hetcomp.ir.types import DType, Shape, TensorType


def f32(*shape: int | str) -> TensorType:
    return TensorType(DType.F32, shape)


def i32(*shape: int | str) -> TensorType:
    return TensorType(DType.I32, shape)


def problem(attrs: ops.Attrs, inputs: list[TensorType], outputs: list[TensorType]) -> str | None:
    names = tuple(f"i{n}" for n in range(len(inputs))), tuple(f"o{n}" for n in range(len(outputs)))
    return op_types.check(Op("op", attrs, *names), inputs, outputs)


EXPERTS = ops.MoeExperts(4, 2, 8, 6, bias=True)
EXPERT_INPUTS = [f32("T", 8), i32("T", 2), f32("T", 2), f32(4, 12, 8), f32(4, 8, 6), f32(4, 12), f32(4, 8)]
REGION = ops.Aten(
    (ops.AtenNode("aten.neg.default", (), (), "float32", (1, "T", 8)),), ((1, "T", 8),), ("float32",), (0,)
)

CACHE = ("slots", 2, "context", 8)
ATTENTION = ops.Attention(4, 2, 8, 8, 0.3)
Q8 = TensorType(DType.Q8, CACHE)

RIGHT = {
    "kv_append": (ops.KvAppend(2, 8), [f32("T", 2, 8), Q8], []),
    "attention": (ATTENTION, [f32("T", 4, 8), Q8, Q8], [f32("T", 4, 8)]),
    "embed": (ops.Embed(10, 8), [i32("T"), f32(10, 8)], [f32("T", 8)]),
    "rope_table": (ops.RopeTable(6), [i32("T"), f32(3)], [f32("T", 3), f32("T", 3)]),
    "route": (ops.Route(4, 2, "sigmoid", True, bias=True), [f32("T", 4), f32(4)], [i32("T", 2), f32("T", 2)]),
    "moe_experts": (EXPERTS, EXPERT_INPUTS, [f32("T", 8)]),
    "concat of a shared head": (ops.Concat(), [f32("T", 4, 6), f32("T", 1, 2)], [f32("T", 4, 8)]),
    "select_rows": (ops.SelectRows(), [f32("T", 8)], [f32("R", 8)]),
    "transfer": (ops.Transfer("cpu", "gpu:0"), [f32("T", 8)], [f32("T", 8)]),
    "aten": (REGION, [f32("T", 8)], [f32("T", 8)]),
}

WRONG = [
    ("kv_append", "i", 1, TensorType(DType.F16, CACHE), "cache is f16"),
    ("kv_append", "i", 1, TensorType(DType.Q8, ("slots", 2, "context", 16)), "cache has shape"),
    ("attention", "i", 2, f32(*CACHE), "key cache is q8"),
    ("attention", "i", 1, TensorType(DType.I32, CACHE), "key cache is i32"),
    ("embed", "i", 0, f32("T"), "ids is f32"),
    ("rope_table", "i", 0, f32("T"), "positions is f32"),
    ("rope_table", "i", 1, f32(6), "inv_freq has shape"),
    ("rope_table", "o", 1, f32("T", 6), "sin is"),
    ("route", "i", 1, f32(2), "bias "),
    ("route", "o", 0, f32("T", 2), "ids is f32"),
    ("moe_experts", "i", 1, f32("T", 2), "ids is f32"),
    ("moe_experts", "i", 5, f32(4, 6), "gate_up_bias has shape"),
    ("moe_experts", "i", 6, f32(4, 12), "down_bias has shape"),
    ("moe_experts", "o", 0, f32("R", 8), "expected T rows"),
    ("concat of a shared head", "i", 1, f32("T", 2, 2), "neither 1 head nor 4"),
    ("concat of a shared head", "o", 0, f32("T", 4, 7), "last axis of 8"),
    ("select_rows", "o", 0, f32("T", 8), "expected R rows"),
    ("select_rows", "o", 0, f32("R", 4), "expected 8 elements"),
    ("transfer", "o", 0, f32("T", 4), "expected f32[T, 8]"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_right_operands_pass(name: str):
    assert problem(*RIGHT[name]) is None


@pytest.mark.parametrize(("name", "side", "index", "type_", "words"), WRONG)
def test_wrong_operands_are_named(name: str, side: str, index: int, type_: TensorType, words: str):
    attrs, inputs, outputs = RIGHT[name]
    changed = {"i": list(inputs), "o": list(outputs)}
    changed[side][index] = type_
    found = problem(attrs, changed["i"], changed["o"])
    assert found is not None
    assert words in found


def test_a_region_hands_out_nodes_that_it_has():
    beyond = ops.Aten(REGION.nodes, REGION.input_shapes, REGION.input_dtypes, (1,))
    assert problem(beyond, [f32("T", 8)], [f32("T", 8)]) == "hands out node 1 of 1"
    assert problem(REGION, [f32("T", 8)] * 2, [f32("T", 8)]) is not None


def test_every_kind_has_a_rule():
    union = get_args(get_args(ops.Attrs)[0])
    kinds = {next(f.default for f in fields(attrs) if f.name == "kind") for attrs in union}
    assert len(kinds) == len(union)
    assert kinds == set(op_types._RULES)


@pytest.mark.parametrize("shape", [("T", 8), ("T", 2, 4)])
def test_heads_may_be_read_as_one_row(shape: Shape):
    assert problem(ops.Linear(8, 4), [TensorType(DType.F32, shape), f32(4, 8)], [f32("T", 4)]) is None
