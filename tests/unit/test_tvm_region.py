"""Aten regions through TVM against torch: odd ops, symbolic rows, integers and booleans, refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hetcomp.backends.protocol import KernelRequest
from hetcomp.backends.tvm_region_export import _interpreter
from hetcomp.errors import HetcompError
from hetcomp.ir.ops import Aten, AtenArg, AtenNode, AtenRef
from hetcomp.ir.types import DType
from tests.reference.tvm_harness import BACKEND, machine_isas, request, run, value

ISA = machine_isas()[-1]
X = (1, "T", 64)
F32 = "float32"
MEMORY = {"float32": DType.F32, "int64": DType.I32, "int32": DType.I32, "bool": DType.BOOL}
NUMPY = {DType.F32: np.float32, DType.I32: np.int32, DType.BOOL: np.bool_}
IN = [AtenRef("input", i) for i in range(3)]
NODE = [AtenRef("node", i) for i in range(6)]


def node(target: str, *args: AtenArg, shape=X, dtype: str = F32, **kwargs: AtenArg) -> AtenNode:
    return AtenNode(f"aten.{target}", args, tuple(kwargs.items()), dtype, shape)


def item(source: AtenRef, index: int, shape, dtype: str = F32) -> AtenNode:
    return AtenNode("getitem", (source, index), (), dtype, shape)


@dataclass
class Case:
    """A region: nodes, input shapes and dtypes, result nodes."""

    nodes: list[AtenNode]
    shapes: list[tuple[int | str, ...]]
    dtypes: list[str]
    results: list[int]

    def attrs(self) -> Aten:
        return Aten(tuple(self.nodes), tuple(self.shapes), tuple(self.dtypes), tuple(self.results))

    def ask(self, max_rows: int = 64) -> KernelRequest:
        """Values as lowering makes them: the batch dimension of 1 is not in the plan, int64 is i32 there."""
        ins = [
            value(f"x{i}", tuple(d for d in s if d != 1 or "T" not in s), MEMORY[t])
            for i, (s, t) in enumerate(zip(self.shapes, self.dtypes, strict=True))
        ]
        outs = [
            value(f"y{i}", tuple(d for d in self.nodes[r].shape if d != 1), MEMORY[self.nodes[r].dtype])
            for i, r in enumerate(self.results)
        ]
        return request(self.attrs(), ins, outs, ISA, {"T": max_rows})


def one(*nodes: AtenNode, shapes=None, dtypes=None, results=None) -> Case:
    shapes = shapes or [X]
    return Case(list(nodes), shapes, dtypes or [F32] * len(shapes), results or [len(nodes) - 1])


CASES = {
    "cumsum over tokens": one(node("cumsum.default", IN[0], 1)),
    "clamp": one(node("clamp.default", IN[0], -0.5, 0.7)),
    "roll over tokens": one(node("roll.default", IN[0], (1,), (1,))),
    "gelu": one(node("gelu.default", IN[0])),
    "where": one(node("gt.Scalar", IN[0], 0.0, dtype="bool"), node("where.self", NODE[0], IN[0], IN[1]), shapes=[X, X]),
    "masked_fill by a mask of the plan": one(
        node("masked_fill.Scalar", IN[0], IN[1], -7.0), shapes=[X, X], dtypes=[F32, "bool"]
    ),
    "matmul": one(node("matmul.default", IN[0], IN[1], shape=(1, "T", 24)), shapes=[X, (64, 24)]),
    "einsum": one(node("einsum.default", "bth,hd->btd", (IN[0], IN[1]), shape=(1, "T", 24)), shapes=[X, (64, 24)]),
    "linear": one(node("linear.default", IN[0], IN[1], IN[2], shape=(1, "T", 24)), shapes=[X, (24, 64), (24,)]),
    "layer_norm": one(node("layer_norm.default", IN[0], (64,), IN[1], IN[2], 1e-5), shapes=[X, (64,), (64,)]),
    "softmax and top-k": one(
        node("softmax.int", IN[0], -1),
        node("topk.default", NODE[0], 4, shape=(), dtype="tuple"),
        item(NODE[1], 0, (1, "T", 4)),
        item(NODE[1], 1, (1, "T", 4), "int64"),
        results=[2, 3],
    ),
    "sort": one(
        node("sort.default", IN[0], -1, True, shape=(), dtype="tuple"),
        item(NODE[0], 0, X),
        item(NODE[0], 1, X, "int64"),
        results=[1, 2],
    ),
    "heads permuted and back": one(
        node("reshape.default", IN[0], (1, "T", 4, 16), shape=(1, "T", 4, 16)),
        node("permute.default", NODE[0], (0, 2, 1, 3), shape=(1, 4, "T", 16)),
        node("cumsum.default", NODE[1], 2, shape=(1, 4, "T", 16)),
        node("permute.default", NODE[2], (0, 2, 1, 3), shape=(1, "T", 4, 16)),
        node("reshape.default", NODE[3], (1, "T", 64)),
    ),
    "gather by ids of the plan": one(
        node("gather.default", IN[0], -1, IN[1], shape=(1, "T", 4)),
        shapes=[X, (1, "T", 4)],
        dtypes=[F32, "int64"],
    ),
    "integer arithmetic": one(
        node("mul.Scalar", IN[0], 3, shape=(1, "T"), dtype="int64"),
        node("add.Tensor", NODE[0], IN[0], shape=(1, "T"), dtype="int64"),
        shapes=[(1, "T")],
        dtypes=["int64"],
    ),
    "one_hot": one(
        node("one_hot.default", IN[0], 8, shape=(1, "T", 8), dtype="int64"),
        shapes=[(1, "T")],
        dtypes=["int64"],
    ),
    "argmax": one(node("argmax.default", IN[0], -1, shape=(1, "T"), dtype="int64")),
    "tokens against tokens": one(
        node("matmul.default", IN[0], IN[1]),
        node("transpose.int", NODE[0], 1, 2, shape=(1, 64, "T")),
        node("matmul.default", IN[0], NODE[1], shape=(1, "T", "T")),
        node("softmax.int", NODE[2], -1, shape=(1, "T", "T")),
        node("matmul.default", NODE[3], IN[0]),
        shapes=[X, (64, 64)],
    ),
    "positions made inside": one(
        node("arange.default", "T", shape=("T",), dtype="int64"),
        node("unsqueeze.default", NODE[0], 1, shape=("T", 1), dtype="int64"),
        node("add.Tensor", IN[0], NODE[1]),
    ),
    "a result twice and one inside": one(node("relu.default", IN[0]), node("silu.default", NODE[0]), results=[0, 1, 0]),
    "an input handed on": one(node("clone.default", IN[0])),
}


def _tensor(shape, dtype: str, rows: int) -> torch.Tensor:
    size = [rows if d == "T" else d for d in shape]
    if dtype == "int64":
        return torch.randint(0, 5, size)
    return torch.rand(size) > 0.5 if dtype == "bool" else torch.randn(size)


@pytest.mark.parametrize("name", CASES)
def test_region_equals_torch(name: str):
    """With 1, 5 and the largest number of rows; the harness checks the memory around outputs and
    workspace."""
    case = CASES[name]
    ask = case.ask()
    kernel = BACKEND.emit(ask)
    assert kernel.workspace_bytes == BACKEND.workspace_bytes(ask)
    torch.manual_seed(0)
    attrs = case.attrs()
    wanted = tuple(case.nodes[r].dtype for r in case.results)
    for rows in (1, 5, 64):
        tensors = [_tensor(s, t, rows) for s, t in zip(case.shapes, case.dtypes, strict=True)]
        want = _interpreter(attrs, wanted, ["T"])(*tensors)
        arrays = [t.numpy().astype(NUMPY[v.type.dtype]) for t, v in zip(tensors, ask.inputs, strict=True)]
        outs = [(tuple(w.shape), NUMPY[v.type.dtype]) for w, v in zip(want, ask.outputs, strict=True)]
        got = run(kernel, ISA, arrays, outs, rows, threads=2)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g.astype(np.float64), w.double().numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", machine_isas())
def test_a_region_runs_on_every_instruction_set_and_repeatedly(isa):
    case = CASES["softmax and top-k"]
    ask = case.ask()
    ask = KernelRequest(ask.op, ask.inputs, ask.outputs, isa, ask.dims)
    kernel = BACKEND.emit(ask)
    x = torch.randn(1, 7, 64)
    values, ids = run(
        kernel, isa, [x.numpy()], [((1, 7, 4), np.float32), ((1, 7, 4), np.int32)], 7, threads=3, repeat=50
    )
    want = x.softmax(-1).topk(4)
    np.testing.assert_allclose(values, want.values.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(ids, want.indices.numpy())


def test_top_k_indices_stay_in_range_with_nan():
    kernel = BACKEND.emit(CASES["softmax and top-k"].ask())
    x = np.full((1, 3, 64), np.nan, np.float32)
    _, ids = run(kernel, ISA, [x], [((1, 3, 4), np.float32), ((1, 3, 4), np.int32)], 3)
    assert ids.min() >= 0 and ids.max() < 64


def test_workspace_grows_with_the_largest_number_of_rows():
    small, large = CASES["layer_norm"].ask(64), CASES["layer_norm"].ask(640)
    assert 0 < BACKEND.workspace_bytes(small) < BACKEND.workspace_bytes(large)


@pytest.mark.parametrize(
    "case",
    [
        one(
            node("fft_rfft.default", IN[0], shape=(1, "T", 33), dtype="complex64"),
            node("abs.default", NODE[0]),
        ),
        one(node("no_such_op.default", IN[0])),
        one(node("matmul.default", IN[0], IN[0])),
        one(node("nonzero.default", IN[0], shape=("T", 3), dtype="int64")),
    ],
    ids=["TVM lacks it", "torch lacks it", "shapes do not fit", "size depends on values"],
)
def test_what_cannot_be_compiled_is_named_with_its_module(case: Case):
    target = case.nodes[0].target.replace(".", r"\.")
    with pytest.raises(HetcompError, match=rf"TVM cannot compile {target}.* at model\.layers\.0\.test: \S"):
        BACKEND.emit(case.ask())


def test_a_weight_in_another_format_is_refused():
    case = CASES["matmul"]
    ask = case.ask()
    weight = value("w", (64, 24), format="bf16")
    with pytest.raises(HetcompError, match="reads the weight w in format bf16"):
        BACKEND.emit(KernelRequest(ask.op, (ask.inputs[0], weight), ask.outputs, ISA, ask.dims))
