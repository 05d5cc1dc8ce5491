"""RMS norms that are spelled out: found by their mean, tried on random numbers, replaced by hetcomp.RmsNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from hetcomp.frontend.onnx.decimals import decimal
from hetcomp.frontend.onnx.evaluate import Run
from hetcomp.frontend.onnx.graph import Graph, Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.regions import Region, Regions

_NATIVE = frozenset({"RMSNormalization", "com.microsoft.SimplifiedLayerNormalization"})
# From the mean of squares to the norm: each is the only reader of the one before.
_STEPS = frozenset({"Add", "Sqrt", "Reciprocal", "Div", "Pow", "Mul", "Cast"})
_TOLERANCE = 1e-5
_FARTHEST = 10


def replace_norms(graph: Graph, run: Run) -> Graph:
    """The graph with hetcomp.RmsNorm (x, weight; eps, weight_offset) for each RMS norm of the last axis."""
    regions = Regions(graph, run)
    new: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in _NATIVE and run.is_activation(node.inputs[0]):
            if int(node.get("axis", -1)) in (-1, len(run.shape(node.inputs[0])) - 1):
                eps = float(node.get("epsilon", 1e-5))
                new[node.outputs[0]] = [_norm(node, node.inputs[0], node.inputs[1], node.outputs[0], eps)]
        elif node.op == "ReduceMean" and run.is_activation(node.outputs[0]):
            found = _spelled_out(regions, node)
            if found is not None:
                new[found.outputs[0]] = [found]
    return graph.replaced(new, graph.outputs)


def _norm(node: Node, x: str, weight: str, result: str, eps: float) -> Node:
    attributes = {"eps": decimal(eps), "weight_offset": 0.0}
    return Node(node.name, "hetcomp.RmsNorm", (x, weight), (result,), attributes, node.scope)


def _spelled_out(regions: Regions, mean: Node) -> Node | None:
    square = regions.producers.get(mean.inputs[0])
    if square is None or square.op not in ("Pow", "Mul") or not regions.run.is_activation(square.inputs[0]):
        return None
    x = square.inputs[0]
    while (before := regions.producers.get(x)) is not None and before.op == "Cast":
        x = before.inputs[0]
    product = _product_with_weight(regions, mean.outputs[0])
    if product is None:
        return None
    node, weight = product
    result = node.outputs[0]
    region = regions.between({x, weight}, result)
    if region is None or set(region.sources) != {x, weight}:
        return None
    eps = _fitted(regions.run, region, x, weight)
    return None if eps is None else _norm(node, x, weight, result, eps)


def _product_with_weight(regions: Regions, value: str) -> tuple[Node, str] | None:
    """The product, behind a mean of squares, with a weight of one axis."""
    for _ in range(_FARTHEST):
        readers = [n for n in regions.consumers.get(value, []) if n.op in _STEPS]
        if not readers:
            return None
        node = readers[0]
        weight = next((v for v in node.inputs if v in regions.run.weights and _is_row(regions.run, v)), None)
        if node.op == "Mul" and weight is not None:
            return node, weight
        value = node.outputs[0]
    return None


def _is_row(run: Run, value: str) -> bool:
    shape = run.shape(value)
    return len(shape) == 1 and shape[0] > 1


def _fitted(run: Run, region: Region, x: str, weight: str) -> float | None:
    """The epsilon with which an RMS norm gives the region's numbers; None if none of its constants is one."""
    generator = torch.Generator().manual_seed(1)
    shape = run.shape(x)
    numbers = torch.randn(shape, generator=generator)
    # Half of the rows small enough that epsilon shows in the result.
    numbers[..., ::2, :] *= 1e-3
    scale = torch.rand(run.shape(weight), generator=generator) + 0.5
    if scale.shape[0] != shape[-1]:
        return None
    try:
        want = run.trial(region.nodes, {x: numbers, weight: scale})[region.result]
    except NotComputable:
        return None
    constants = {run.number(v) for node in region.nodes for v in node.inputs if v}
    for eps in sorted(c for c in constants if c is not None and 0 < c < 1e-2):
        if _close(want, numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps) * scale):
            return eps
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
