"""What each ONNX op becomes in the torch graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.to_fx import Handler, Writer
from hetcomp.frontend.onnx.torch_ops import axes_of, sizes_of_split, slices

aten = torch.ops.aten


# ---------------------------------------------------------------- linear algebra


def _gather(w: Writer, node: Node) -> fx.Node:
    table, index = node.inputs[:2]
    if table in w.run.weights and index in w.nodes and int(node.get("axis", 0)) == 0:
        w.embedding = w.call(aten.embedding.default, w.parameter(table), w.activation(index))
        return w.embedding
    raise NotComputable("takes rows out of activations, which hetcomp does not compile")


def _matmul(w: Writer, node: Node) -> fx.Node:
    x, weight = node.inputs
    if weight not in w.run.weights or len(w.run.shape(weight)) != 2:
        return w.call(aten.matmul.default, w.activation(x), w.activation(weight))
    return product_with_bias(w, node, w.parameter(weight, transposed=True), "")


def _gemm(w: Writer, node: Node) -> fx.Node:
    if node.get("transA", 0) or float(node.get("alpha", 1.0)) != 1.0 or float(node.get("beta", 1.0)) != 1.0:
        raise NotComputable("scales or transposes its operands, which hetcomp does not compile")
    weight = w.parameter(node.inputs[1], transposed=not node.get("transB", 0))
    return product_with_bias(w, node, weight, node.input(2))


def product_with_bias(w: Writer, node: Node, weight: fx.Node, bias: str) -> fx.Node:
    """A product with a weight and its bias. Without one, the vector that the only reader of the product adds is it."""
    if not bias:
        bias = _added_by_only_reader(w, node)
        w.absorbed[node.outputs[0]] = bias
    return w.call(aten.linear.default, w.activation(node.inputs[0]), weight, w.parameter(bias) if bias else None)


def _added_by_only_reader(w: Writer, node: Node) -> str:
    """The weight of one axis that is added to what ``node`` makes; empty if there is none."""
    readers = w.consumers.get(node.outputs[0], [])
    if len(readers) != 1 or readers[0].op != "Add" or node.outputs[0] in w.graph.outputs:
        return ""
    return next((v for v in readers[0].inputs if v in w.run.weights and len(w.run.shape(v)) == 1), "")


# ---------------------------------------------------------------- elementwise


def _arithmetic(name: str) -> Handler:
    tensor = getattr(aten, name).Tensor

    def handler(w: Writer, node: Node) -> fx.Node:
        a, b = node.inputs
        if name == "add" and (a in w.run.weights or b in w.run.weights):
            x, bias = (b, a) if a in w.run.weights else (a, b)
            if w.absorbed.get(x) == bias:
                return w.activation(x)
        for x, other in ((a, b), (b, a)):
            number = None if other in w.nodes else w.run.number(other)
            if number is None:
                continue
            if x == a or name in ("add", "mul"):
                return w.call(tensor, w.activation(x), number)
            turned = w.call((aten.reciprocal if name == "div" else aten.neg).default, w.activation(x))
            return w.call((aten.mul if name == "div" else aten.add).Tensor, turned, number)
        if name == "mul":
            gated = _silu(w, node)
            if gated is not None:
                return gated
        return w.call(tensor, w.activation(a), w.activation(b))

    return handler


def _silu(w: Writer, node: Node) -> fx.Node | None:
    """x * sigmoid(x)."""
    for x, other in (node.inputs, node.inputs[::-1]):
        maker = w.producers.get(other)
        if maker is not None and maker.op == "Sigmoid" and maker.inputs[0] == x:
            return w.call(aten.silu.default, w.activation(x))
    return None


def _unary(target: Any) -> Handler:  # noqa: ANN401 - an overload
    return lambda w, node: w.call(target, w.activation(node.inputs[0]))


def _pow(w: Writer, node: Node) -> fx.Node:
    exponent = w.run.number(node.inputs[1])
    if exponent is None:
        raise NotComputable("has an exponent that is not a known number")
    return w.call(aten.pow.Tensor_Scalar, w.activation(node.inputs[0]), exponent)


def _gelu(w: Writer, node: Node) -> fx.Node:
    approximate = str(node.get("approximate", "none"))
    return w.call(aten.gelu.default, w.activation(node.inputs[0]), approximate=approximate)


def _swish(w: Writer, node: Node) -> fx.Node:
    if float(node.get("alpha", 1.0)) != 1.0:
        raise NotComputable("has another alpha than 1")
    return w.call(aten.silu.default, w.activation(node.inputs[0]))


def _softmax(w: Writer, node: Node) -> fx.Node:
    return w.call(aten._softmax.default, w.activation(node.inputs[0]), int(node.get("axis", -1)), False)


def _reduce(target: Any) -> Handler:  # noqa: ANN401 - an overload
    def handler(w: Writer, node: Node) -> fx.Node:
        x = node.inputs[0]
        axes = axes_of(node, w.run.values.get(node.input(1)), list(range(len(w.run.shape(x)))))
        return w.call(target, w.activation(x), axes, bool(node.get("keepdims", 1)))

    return handler


# ---------------------------------------------------------------- views


def _same(w: Writer, node: Node) -> fx.Node:
    return w.activation(node.inputs[0])


def _cast(w: Writer, node: Node) -> fx.Node:
    x = w.activation(node.inputs[0])
    dtype = w.run.values[node.outputs[0]].dtype
    return x if x.meta["val"].dtype == dtype else w.call(aten._to_copy.default, x)


def _view(w: Writer, node: Node) -> fx.Node:
    return w.view(w.activation(node.inputs[0]), w.run.shape(node.outputs[0]))


def _transpose(w: Writer, node: Node) -> fx.Node:
    x = w.activation(node.inputs[0])
    order = [int(p) for p in node.get("perm", range(x.meta["val"].ndim)[::-1])]
    return w.call(aten.permute.default, x, order)


def _expand(w: Writer, node: Node) -> fx.Node:
    if w.run.shape(node.inputs[0]) != w.run.shape(node.outputs[0]):
        raise NotComputable("repeats activations, which hetcomp does not compile")
    return w.activation(node.inputs[0])


def _slice(w: Writer, node: Node) -> fx.Node:
    x = w.activation(node.inputs[0])
    given = w.run.values[node.inputs[0]]
    for axis, start, stop, step in slices(node, given, tuple(w.run.values.get(v) for v in node.inputs[1:])):
        if (start, stop, step) == (0, given.shape[axis], 1):
            continue
        if given.shape[axis] == w.run.tokens:
            raise NotComputable("leaves out tokens, which hetcomp does not compile")
        x = w.call(aten.slice.Tensor, x, axis, start, stop, step)
    return x


def _split(w: Writer, node: Node) -> tuple[fx.Node, ...]:
    x = w.activation(node.inputs[0])
    axis, sizes = sizes_of_split(node, w.run.values[node.inputs[0]], w.run.values.get(node.input(1)))
    parts = w.call(aten.split_with_sizes.default, x, sizes, axis)
    return tuple(w.take(parts, i) for i in range(len(sizes)))


def _concat(w: Writer, node: Node) -> fx.Node:
    return w.call(aten.cat.default, [w.activation(v) for v in node.inputs], int(node.attributes["axis"]))


HANDLERS: dict[str, Handler] = {
    "Add": _arithmetic("add"),
    "Cast": _cast,
    "CastLike": _same,
    "Concat": _concat,
    "Div": _arithmetic("div"),
    "Dropout": _same,
    "Erf": _unary(aten.erf.default),
    "Exp": _unary(aten.exp.default),
    "Expand": _expand,
    "Flatten": _view,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": _same,
    "MatMul": _matmul,
    "Mul": _arithmetic("mul"),
    "Neg": _unary(aten.neg.default),
    "Pow": _pow,
    "ReduceMean": _reduce(aten.mean.dim),
    "ReduceSum": _reduce(aten.sum.dim_IntList),
    "Relu": _unary(aten.relu.default),
    "Reshape": _view,
    "Sigmoid": _unary(aten.sigmoid.default),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _unary(aten.sqrt.default),
    "Squeeze": _view,
    "Sub": _arithmetic("sub"),
    "Swish": _swish,
    "Tanh": _unary(aten.tanh.default),
    "Transpose": _transpose,
    "Unsqueeze": _view,
}
