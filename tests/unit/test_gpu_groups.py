"""Groups of ops on a GPU: fused kernels, interpreted, against numpy in float64, and what is grouped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from hetcomp.backends import packing
from hetcomp.backends.gpu.groups import GpuGroup, group_ops
from hetcomp.ir import ops
from hetcomp.ir.layouts import with_act_order
from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Op, Value
from hetcomp.ir.types import DType, TensorType
from tests.reference.cache_blocks import cache_block
from tests.reference.experts_case import expert_weights
from tests.reference.group_harness import Arrays, run_groups
from tests.reference.kernel_harness import Step, activation, cache, weight
from tests.reference.kernel_numbers import EPS, Doubles, dot_error, draw, packed

DIMS = {"T": 100, "R": 100, "slots": 2, "context": 16}
NORM_EPS = 1e-3  # large enough to be missed


class Graph:
    """Ops, values and arrays, built up by name: an op's result is called like the op."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows = rows
        self.rng = np.random.default_rng(seed)
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.arrays: Arrays = {}
        self.numbers: dict[str, Doubles] = {}

    def given(self, name: str, *shape: int, spread: float = 1.0) -> str:
        """An activation that the step has."""
        array = draw(self.rng, (self.rows, *shape)) * np.float32(spread)
        self._declare(activation(name, "T", *shape), array, array)
        return name

    def plain(self, name: str, *shape: int) -> str:
        """A weight that is not packed."""
        array = draw(self.rng, shape)
        self._declare(activation(name, *shape), array, array)
        return name

    def packed(self, value: Value) -> str:
        """A weight in its format."""
        data, means = packed(draw(self.rng, tuple(int(d) for d in value.type.shape)), value)
        self._declare(value, data, means)
        return value.id

    def _declare(self, value: Value, array, numbers) -> None:
        self.values[value.id], self.arrays[value.id] = value, array
        self.numbers[value.id] = numbers.astype(np.float64)

    def op(self, name: str, attrs: Attrs, inputs: Sequence[str], *shape: int) -> str:
        """An op with one result."""
        self.values[name] = activation(name, "T", *shape)
        self.ops.append(Op(name, attrs, tuple(inputs), (name,)))
        return name

    def linear(self, name: str, x: str, out: int, k: int, weight_format: str, bias: bool = False) -> str:
        """A linear with a weight of its own, whose columns have an order where ``:order`` is behind the format."""
        form, _, ordered = weight_format.partition(":")
        layout = with_act_order(packing.PANELS) if ordered else packing.PANELS
        w = self.packed(weight(f"{name}.w", (out, k), form, layout))
        operands = [x, w, *([self.plain(f"{name}.b", out)] if bias else [])]
        return self.op(name, ops.Linear(k, out, bias), operands, out)

    def norm(self, name: str, x: str, width: int) -> str:
        """A norm of whole rows with a weight of its own."""
        return self.op(name, ops.RmsNorm(width, NORM_EPS, 1, 0.5), [x, self.plain(f"{name}.w", width)], width)

    def dims(self) -> dict[str, int]:
        """DIMS, and what a block of the caches takes."""
        return {**DIMS, "cache_block": cache_block(list(self.values.values()))}

    def groups(self, *wanted: str) -> tuple[GpuGroup, ...]:
        """The ops in groups for exactly so many rows."""
        return group_ops(self.ops, self.values, wanted, DIMS, self.rows)

    def run(self, *wanted: str) -> Arrays:
        """The grouped ops' values."""
        return run_groups(self.groups(*wanted), self.values, self.arrays, self.rows)

    def normed(self, x: str, weight_name: str) -> Doubles:
        """What the norm of x is."""
        numbers = self.numbers[x]
        factor = 1 / np.sqrt((numbers**2).mean(axis=1, keepdims=True) + NORM_EPS)
        return numbers * factor * (self.numbers[weight_name] + 0.5)


def covered(groups: Sequence[GpuGroup]) -> list[tuple[str, ...]]:
    return [tuple(op.id for op in group.ops) for group in groups]


def launches(groups: Sequence[GpuGroup]) -> int:
    return sum(len(group.code.launches) for group in groups)


def norm_error(k: int, magnitude: Doubles) -> Doubles:
    """A product's error after a norm: the sum of squares is a sum of k terms, too, and the root halves its error; two
    more roundings a term."""
    return 2 * dot_error(k, magnitude)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("weight_format", "k", "bias"),
    [("q4", 300, True), ("bf16", 33, False), ("fp8", 1030, True), ("q4z:order", 96, True)],
)
def test_norm_and_linears_are_one_launch(weight_format, k, bias, rows):
    g = Graph(rows)
    x = g.given("x", k, spread=0.02)  # the sum of squares is about as large as eps
    n = g.norm("norm", x, k)
    sizes = {"q": 70, "k": 17, "v": 32, "z": 5}
    for name, out in sizes.items():
        g.linear(name, n, out, k, weight_format, bias)
    groups = g.groups(*sizes)
    assert covered(groups) == [("norm", "q", "k", "v", "z")] and launches(groups) == 1
    made = g.run(*sizes)
    normed = g.normed(x, "norm.w")
    for name in sizes:
        w, b = g.numbers[f"{name}.w"], g.numbers[f"{name}.b"] if bias else 0.0
        magnitude = np.abs(normed) @ np.abs(w.T) + np.abs(b)
        assert (np.abs(made[name] - (normed @ w.T + b)) <= norm_error(k, magnitude)).all(), name


@pytest.mark.parametrize("weight_format", packing.FORMATS)
def test_norm_and_linear_in_every_format(weight_format):
    g = Graph(2)
    g.linear("y", g.norm("norm", g.given("x", 129), 129), 37, 129, weight_format)
    assert launches(g.groups("y")) == 1
    normed, w = g.normed("x", "norm.w"), g.numbers["y.w"]
    assert (np.abs(g.run("y")["y"] - normed @ w.T) <= norm_error(129, np.abs(normed) @ np.abs(w.T))).all()


@pytest.mark.parametrize(("rows", "k", "out"), [(1, 300, 20), (3, 40, 100), (8, 64, 64)])
def test_a_norm_that_others_want_is_written_by_a_linear(rows, k, out):
    """Also where the launch has fewer programs than the norm has columns, or more."""
    g = Graph(rows)
    g.linear("y", g.norm("norm", g.given("x", k), k), out, k, "q8")
    g.op("scaled", ops.Scale(2.0), ["norm"], k)
    groups = g.groups("y", "norm")
    assert covered(groups) == [("norm", "y"), ("scaled",)]
    made = g.run("y", "norm")
    want = g.normed("x", "norm.w")
    np.testing.assert_allclose(made["norm"], want, rtol=EPS * (4 + np.sqrt(k)))
    np.testing.assert_array_equal(made["scaled"], made["norm"] * np.float32(2))


def test_formats_and_biases_that_differ_are_launches_of_their_own():
    g = Graph(1)
    n = g.norm("norm", g.given("x", 32), 32)
    for name, weight_format, bias in (("a", "q4", False), ("b", "q8", False), ("c", "q4", True), ("d", "q4", False)):
        g.linear(name, n, 16, 32, weight_format, bias)
    for name in "efgh":
        g.linear(name, n, 16, 32, "q8")
    assert covered(g.groups(*"abcdefgh")) == [("norm", "a", "d"), ("b", "e", "f", "g"), ("c",), ("h",)]
    made, normed = g.run(*"abcdefgh"), g.normed("x", "norm.w")
    for name in "abcdefgh":
        want = normed @ g.numbers[f"{name}.w"].T + (g.numbers["c.b"] if name == "c" else 0)
        np.testing.assert_allclose(made[name], want, rtol=1e-5, atol=1e-4)


def test_norms_that_a_gemv_does_not_do():
    """For many rows, of heads, in front of something else, or in front of a head of very many panels."""
    for rows in (9, None):
        g = Graph(9)
        g.linear("y", g.norm("norm", g.given("x", 32), 32), 16, 32, "f32")
        assert covered(group_ops(g.ops, g.values, ("y",), DIMS, rows)) == [("norm",), ("y",)]
    g = Graph(1)
    heads = g.op("norm", ops.RmsNorm(16, 1e-6, 2), [g.given("x", 32), g.plain("w", 16)], 32)
    g.linear("y", heads, 16, 32, "f32")
    assert covered(g.groups("y")) == [("norm",), ("y",)]
    g = Graph(1)
    n = g.norm("norm", g.given("x", 32), 32)
    g.op("scaled", ops.Scale(2.0), [n], 32)
    assert covered(g.groups("scaled")) == [("norm",), ("scaled",)]
    g = Graph(1)
    big = replace(weight("w", (2048 * 16 + 1, 32), "f32", packing.PANELS), format="f32")
    g.values["w"] = big
    g.op("y", ops.Linear(32, 2048 * 16 + 1), [g.norm("norm", g.given("x", 32), 32), "w"], 2048 * 16 + 1)
    assert covered(g.groups("y")) == [("norm",), ("y",)]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("weight_format", "bias"), [("q4", True), ("f32", False)])
def test_linear_and_additions_are_one_launch(weight_format, bias, rows):
    k, out = 100, 45
    g = Graph(rows)
    y = g.linear("y", g.given("x", k), out, k, weight_format, bias)
    sum_ = g.op("sum", ops.Add(), [g.given("r", out), y], out)
    g.op("more", ops.Add(), [sum_, g.given("s", out)], out)
    groups = g.groups("more")
    assert covered(groups) == [("y", "sum", "more")] and launches(groups) == 1
    assert groups[0].outputs == ("more",)
    n = g.numbers
    b = n["y.b"] if bias else np.zeros(out)
    want = n["x"] @ n["y.w"].T + b + n["r"] + n["s"]
    magnitude = np.abs(n["x"]) @ np.abs(n["y.w"].T) + np.abs(b) + np.abs(n["r"]) + np.abs(n["s"])
    assert (np.abs(g.run("more")["more"] - want) <= dot_error(k, magnitude)).all()


def test_a_sum_on_the_way_that_others_read_is_written():
    g = Graph(1)
    y = g.linear("y", g.given("x", 16), 16, 16, "f32")
    sum_ = g.op("sum", ops.Add(), [g.given("r", 16), y], 16)
    g.op("more", ops.Add(), [sum_, g.given("s", 16)], 16)
    assert covered(g.groups("more", "sum")) == [("y", "sum"), ("more",)]
    assert covered(g.groups("more", "y")) == [("y",), ("sum",), ("more",)]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("weight_format", "function", "bias"), [("q4", "silu", False), ("fp8", "swiglu_oai", True)])
def test_gate_up_and_glu_are_one_launch(weight_format, function, bias, rows):
    k, width = 70, 21
    g = Graph(rows)
    n = g.norm("norm", g.given("x", k), k)
    gate, up = (g.linear(name, n, width, k, weight_format, bias) for name in ("gate", "up"))
    g.op("act", ops.Glu(width, function, 1.702, 2.0), [gate, up], width)
    g.linear("y", "act", k, width, weight_format)
    g.op("out", ops.Add(), ["x", "y"], k)
    groups = g.groups("out")
    assert covered(groups) == [("norm", "gate", "up", "act"), ("y", "out")] and launches(groups) == 2
    made, normed = g.run("out"), g.normed("x", "norm.w")
    a, b = (normed @ g.numbers[f"{p}.w"].T + (g.numbers[f"{p}.b"] if bias else 0) for p in ("gate", "up"))
    if function == "silu":
        want = a / (1 + np.exp(-a)) * b
    else:
        a = np.minimum(a, 2)
        want = (np.clip(b, -2, 2) + 1) * a / (1 + np.exp(-1.702 * a))
    np.testing.assert_allclose(made["act"], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_gate_and_up_with_orders_of_columns_are_a_launch_and_their_glu_another():
    """For each has an order of its own, and one that has none is a launch by itself."""
    g = Graph(2)
    n = g.norm("norm", g.given("x", 32), 32)
    for name, weight_format in (("gate", "q8:order"), ("up", "q8:order"), ("z", "q8")):
        g.linear(name, n, 21, 32, weight_format)
    g.op("act", ops.Glu(21), ["gate", "up"], 21)
    assert covered(g.groups("act", "z")) == [("norm", "gate", "up"), ("z",), ("act",)]
    normed = g.normed("x", "norm.w")
    a, b = (normed @ g.numbers[f"{name}.w"].T for name in ("gate", "up"))
    want = a / (1 + np.exp(-a)) * b
    np.testing.assert_allclose(g.run("act", "z")["act"], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weight_format", ["q4", "f32"])
def test_experts_do_the_norm_and_the_additions(weight_format, rows):
    """As DeepSeek has them: router, experts, then a shared expert whose result is added to theirs."""
    a = ops.MoeExperts(experts=7, top_k=3, hidden=33, intermediate=21)
    g = Graph(rows)
    n = g.norm("norm", g.given("x", a.hidden), a.hidden)
    g.linear("logits", n, a.experts, a.hidden, "f32")
    route = ops.Route(a.experts, a.top_k, "softmax", True)
    g.values |= {"ids": _ids("ids", a.top_k), "weights": activation("weights", "T", a.top_k)}
    g.ops.append(Op("route", route, ("logits",), ("ids", "weights")))
    matrices = [g.packed(value) for value in expert_weights(a, weight_format)]
    g.op("moe", a, [n, "ids", "weights", *matrices], a.hidden)
    g.linear("shared", n, a.hidden, a.hidden, weight_format)
    g.op("sum", ops.Add(), ["moe", "shared"], a.hidden)
    g.op("out", ops.Add(), ["x", "sum"], a.hidden)
    groups = g.groups("out", "ids", "weights")
    expected = [("norm", "logits"), ("route",), ("shared",), ("moe", "sum", "out")]
    if weight_format == "f32":
        expected = [("norm", "logits", "shared"), ("route",), ("moe", "sum", "out")]
    assert covered(groups) == expected
    made, alone = g.run("out"), g.run(*g.values)  # everything wanted: nothing is left out
    np.testing.assert_array_equal(made["ids"], alone["ids"])
    np.testing.assert_allclose(made["out"], alone["out"], rtol=1e-5, atol=2e-5 * np.abs(alone["out"]).max())


HEADS = {
    # Norms (of "heads", of the whole "row", none), rotation of the queries, width of v, cache.
    "qwen": ("heads", ops.Rope(6, 20, 20), 20, DType.BF16),
    "olmoe": ("row", ops.Rope(5, 16, 16), 16, DType.F32),
    "gpt-oss": (None, ops.Rope(4, 36, 36), 40, DType.F32),
    "glm": ("heads", ops.Rope(6, 20, 10), 12, DType.F32),
    "pairs": (None, ops.Rope(2, 24, 12, offset=8, style="interleaved"), 24, DType.F32),
    "pairs-to-halves": ("row", ops.Rope(2, 9, 8, offset=1, style="interleaved_to_half"), 9, DType.F32),
}


def _heads_graph(name: str, rows: int) -> Graph:
    norms, q, v_dim, dtype = HEADS[name]
    g = Graph(rows)
    kv_heads = 1 if q.heads == 5 else 2
    for array in ("cos", "sin"):
        g.given(array, q.rotary_dim // 2)
    x = {"q": g.given("q", q.heads, q.head_dim), "k": g.given("k", kv_heads, q.head_dim)}
    for of, heads in (("q", q.heads), ("k", kv_heads)):
        groups = heads if norms == "heads" else 1
        attrs = ops.RmsNorm(heads * q.head_dim // groups, NORM_EPS, groups, 0.25)
        if norms:
            x[of] = g.op(f"{of}_norm", attrs, [of, g.plain(f"{of}_norm.w", attrs.width)], heads, q.head_dim)
    g.op("q_rope", q, [x["q"], "cos", "sin"], q.heads, q.head_dim)
    g.op("k_rope", replace(q, heads=kv_heads), [x["k"], "cos", "sin"], kv_heads, q.head_dim)
    for of, dim in (("k_rope", q.head_dim), ("v", v_dim)):
        state = f"{of}_cache"
        g.values[state] = cache(state, dtype, kv_heads, dim)
        bits = np.uint16 if dtype is DType.BF16 else np.float32
        g.arrays[state] = np.zeros((DIMS["slots"], kv_heads, DIMS["context"], dim), bits)
    g.given("v", kv_heads, v_dim)
    for of, dim in (("k_rope", q.head_dim), ("v", v_dim)):
        g.ops.append(Op(f"{of}_append", ops.KvAppend(kv_heads, dim), (of, f"{of}_cache"), ()))
    a = ops.Attention(q.heads, kv_heads, q.head_dim, v_dim, 0.3)
    g.op("y", a, ["q_rope", "k_rope_cache", "v_cache"], q.heads, v_dim)
    return g


@pytest.mark.parametrize(("rows", "exact"), [(1, True), (3, True), (5, False)])
@pytest.mark.parametrize("name", HEADS)
def test_norms_rotations_and_caches_are_one_launch(name, rows, exact):
    step = Step(np.arange(rows, dtype=np.int32) + 3, np.arange(rows, dtype=np.int32) % 2, None, DIMS["context"])

    def made(*wanted: str) -> tuple[Sequence[GpuGroup], Arrays]:
        g = _heads_graph(name, rows)
        groups = group_ops(g.ops, g.values, ("y", *wanted), g.dims(), rows if exact else None)
        count = sum(op.kind != "attention" for op in g.ops)
        assert len(groups) == (len(g.ops) if "k_rope" in wanted else 2)
        assert "k_rope" in wanted or (len(groups[0].ops) == count and launches(groups[:1]) == 1)
        heads = [group for group in groups if group.ops[0].kind != "attention"]
        return heads, run_groups(heads, g.values, g.arrays, rows, step)

    (_, fused), (_, alone) = made("q_rope"), made("q_rope", "k_rope")
    if not exact and "q_rope bf16" in (only := made()[1]):  # attention rounds it anyway
        np.testing.assert_array_equal(only["q_rope bf16"], packing.to_bf16_bits(fused["q_rope"]))
    # A sum of squares in another order, by a half; two roundings more.
    tolerance = {"rtol": EPS * 8, "atol": EPS * 8 * 4}
    np.testing.assert_allclose(fused["q_rope"], alone["q_rope"], **tolerance)
    for state in ("k_rope_cache", "v_cache"):
        numbers = [packing.to_f32(a[state]) for a in (fused, alone)]
        assert np.any(numbers[0])
        bf16 = 2.0**-7 if fused[state].dtype == np.uint16 and state != "v_cache" else 0.0
        np.testing.assert_allclose(*numbers, rtol=EPS * 8 + bf16, atol=EPS * 8 * 4)


def test_heads_that_differ_are_launches_of_their_own():
    def groups(change) -> int:
        g = _heads_graph("qwen", 1)
        g.ops = [change(op) for op in g.ops]
        return len(group_ops(g.ops, g.values, ("y",), g.dims(), 1))

    def other_rotation(op: Op) -> Op:
        return replace(op, attrs=replace(op.attrs, rotary_dim=10)) if op.id == "k_rope" else op

    def no_norm(op: Op) -> Op:
        return replace(op, inputs=("k", "cos", "sin")) if op.id == "k_rope" else op

    assert groups(lambda op: op) == 2
    assert groups(other_rotation) == 7
    assert groups(no_norm) == 7


@pytest.mark.parametrize("rows", [1, 9, 20])
def test_an_addition_and_its_norm_are_one_launch(rows):
    width = 301
    g = Graph(rows)
    g.op("sum", ops.Add(), [g.given("a", width), g.given("b", width)], width)
    g.norm("norm", "sum", width)
    groups = group_ops(g.ops, g.values, ("norm",), DIMS, rows if rows < 20 else None)
    assert covered(groups) == [("sum", "norm")] and launches(groups) == 1
    made = run_groups(groups, g.values, g.arrays, rows)
    np.testing.assert_array_equal(made["sum"], g.arrays["a"] + g.arrays["b"])
    g.numbers["sum"] = made["sum"].astype(np.float64)
    np.testing.assert_allclose(made["norm"], g.normed("sum", "norm.w"), rtol=EPS * (4 + np.sqrt(width)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("weight_format", "k", "bias"), [("f32", 192, True), ("bf16", 640, False), ("q8", 1024, True)])
def test_a_router_in_parts_and_its_route(weight_format, k, bias, rows):
    experts, top_k = 19, 3
    g = Graph(rows)
    n = g.norm("norm", g.given("x", k), k)
    g.linear("logits", n, experts, k, weight_format, bias)
    g.values |= {"ids": _ids("ids", top_k), "weights": activation("weights", "T", top_k)}
    operands = ["logits", *([g.plain("selection", experts)] if bias else [])]
    attrs = ops.Route(experts, top_k, "sigmoid", True, bias=bias)
    g.ops.append(Op("route", attrs, tuple(operands), ("ids", "weights")))
    groups = g.groups("ids", "weights")
    assert covered(groups) == [("norm", "logits", "route")] and launches(groups) == 2
    product = groups[0].code.launches[0]
    assert product.grid[2].programs(rows) > 1
    alone = g.groups("ids", "weights", "logits")
    assert covered(alone) == [("norm", "logits"), ("route",)]
    got, want = g.run("ids", "weights"), g.run("ids", "weights", "logits")
    normed, w = g.normed("x", "norm.w"), g.numbers["logits.w"]
    magnitude = np.abs(normed) @ np.abs(w.T)
    exact = normed @ w.T + (g.numbers["logits.b"] if bias else 0)
    assert (np.abs(want["logits"] - exact) <= norm_error(k, magnitude + 1)).all()
    np.testing.assert_array_equal(got["ids"], want["ids"])
    np.testing.assert_allclose(got["weights"], want["weights"], rtol=1e-4)


def _ids(name: str, top_k: int) -> Value:
    return replace(activation(name, "T", top_k), type=TensorType(DType.I32, ("T", top_k)))


@pytest.mark.parametrize(("rows", "wanted"), [(2, "y"), (20, "y"), (20, "glu")])
def test_a_norm_and_its_gate_are_one_launch(rows, wanted):
    """As behind linear attention: heads are normed, and multiplied by a function of another linear's result."""
    heads, dim, out = 3, 10, 48
    g = Graph(rows)
    x, z = g.given("x", heads * dim), g.given("z", heads * dim)
    attrs = ops.RmsNorm(dim, NORM_EPS, heads, 0.5)
    g.op("norm", attrs, [x, g.plain("norm.w", dim)], heads * dim)
    g.op("glu", ops.Glu(heads * dim), [z, "norm"], heads * dim)
    g.linear("y", "glu", out, heads * dim, "q8")
    groups = group_ops(g.ops, g.values, (wanted, "y"), DIMS, rows if rows < 20 else None)
    assert covered(groups)[0] == ("norm", "glu") and launches(groups[:1]) == 1
    made = run_groups(groups, g.values, g.arrays, rows)
    runs = g.numbers["x"].reshape(rows, heads, dim)
    normed = runs / np.sqrt((runs**2).mean(axis=2, keepdims=True) + NORM_EPS) * (g.numbers["norm.w"] + 0.5)
    gate = g.numbers["z"]
    want = normed.reshape(rows, -1) * gate / (1 + np.exp(-gate))
    if rows == 20 and wanted == "y":  # the linear alone reads it, as bf16
        assert "glu" not in made
        numbers, error = packing.to_f32(made["glu bf16"]), 2.0**-8 + 4e-6
    else:
        numbers, error = made["glu"], 4e-6
    np.testing.assert_allclose(numbers, want, rtol=error, atol=1e-7)


def test_a_gate_that_is_no_product_of_the_norm_is_left_alone():
    g = Graph(1)
    x = g.given("x", 30)
    for name, read in (("n", "up"), ("m", "gate"), ("k", "both")):
        g.op(name, ops.RmsNorm(10, NORM_EPS, 3), [x, g.plain(f"{name}.w", 10)], 30)
        pair = {"up": ["x", "n"], "gate": ["m", "x"], "both": ["k", "k"]}[read]
        attrs = ops.Glu(30, "swiglu_oai", 1.7, 7.0) if read == "up" else ops.Glu(30)
        g.op(f"{name}.y", attrs, pair, 30)
    groups = g.groups("n.y", "m.y", "k.y")
    assert all(len(group.ops) == 1 for group in groups)


@pytest.mark.parametrize(("summed", "rows"), [(True, 20), (False, 20), (False, 9)])
def test_what_is_multiplied_as_bf16_is_written_so(summed, rows):
    """A norm that a router reads too, a glu that only a linear reads: the same numbers as where all is kept as f32."""
    width, out = 64, 48

    def made(*wanted: str) -> tuple[tuple[GpuGroup, ...], Arrays]:
        g = Graph(rows)
        x = g.given("x", width)
        n = g.norm("norm", g.op("sum", ops.Add(), [x, g.given("z", width)], width) if summed else x, width)
        g.linear("router", n, 16, width, "f32")
        for name in ("gate", "up"):
            g.linear(name, n, out, width, "q8")
        g.op("glu", ops.Glu(out), ["gate", "up"], out)
        g.linear("down", "glu", width, out, "q4")
        last = g.norm("last", "down", width)
        g.linear("y", last, 16, width, "bf16")
        groups = group_ops(g.ops, g.values, ("router", "y", *wanted), DIMS, rows if rows < 20 else None)
        return groups, run_groups(groups, g.values, g.arrays, rows)

    (groups, narrow), (_, wide) = made(), made("norm", "glu", "last")
    own = {v.id: v for group in groups for v in group.own}
    assert set(own) == {"norm bf16", "glu bf16", "last bf16"}
    assert all(v.type.dtype is DType.BF16 for v in own.values())
    assert {"norm", "glu", "last"} & set(narrow) == {"norm"}
    assert not any(launch.kernel.function == "round_rows" for group in groups for launch in group.code.launches)
    for value in ("norm", "glu", "last"):
        np.testing.assert_array_equal(narrow[f"{value} bf16"], packing.to_bf16_bits(wide[value]))
    for value in ("router", "y"):
        np.testing.assert_array_equal(narrow[value], wide[value])
