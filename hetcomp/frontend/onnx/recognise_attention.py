"""Attention that is spelled out: found by its softmax, tried on random numbers, replaced by hetcomp's ops.

Masks are not read but computed, for a step behind some positions and for a token far behind: what they let through says
whether attention is causal, and how far it reaches back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.evaluate import Run
from hetcomp.frontend.onnx.graph import Attributes, Graph, Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.regions import Region, Regions

_TOLERANCE = 1e-4
_BEHIND_SOFTMAX = frozenset({"Cast", "Dropout", "Identity", "Where"})
_VIEWS = frozenset({"Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Tile", "Cast", "Identity", "Mul", "Div"})
_SEEN = -1e4  # what is added to a score is less where a mask hides it


@dataclass(frozen=True)
class _Operands:
    """q [1, heads, T, D]; what is appended to the caches, [1, kv_heads, T, D] each; the caches before."""

    q: str
    k: str
    v: str
    past: tuple[str, ...]


def replace_attention(graph: Graph, run: Run, far: Sequence[Run], origin: str) -> Graph:
    """The graph with hetcomp.KvAppend and hetcomp.Attention for each attention. far: runs whose last token
    sees many positions, a different number in each. Raises HetcompError naming a softmax that is no attention that
    hetcomp knows."""
    regions = Regions(graph, run)
    new: dict[str, list[Node]] = {}
    for node in graph.nodes:
        spelled_out = node.op == "Softmax" and run.shape(node.outputs[0])[-1:] == (run.seen,)
        if not (spelled_out or node.op == "Attention") or not run.is_activation(node.outputs[0]):
            continue
        try:
            result, made = _attention(regions, far, node)
        except NotComputable as error:
            raise HetcompError(f"{origin}: the attention of {node} {error}; hetcomp cannot compile it") from error
        new[result] = made
    return graph.replaced(new, graph.outputs[:1])


def _attention(regions: Regions, far: Sequence[Run], softmax: Node) -> tuple[str, list[Node]]:
    run = regions.run
    if softmax.op == "Attention":
        result, operands = softmax.outputs[0], _operands_of_op(regions, softmax)
    else:
        product = _product_with_values(regions, softmax)
        result, operands = product.outputs[0], _operands(regions, softmax, product)
    region = regions.between({operands.q, operands.k, operands.v, *operands.past}, result)
    if region is None:
        raise NotComputable("depends on more than queries, keys, values and their caches")
    window = max(_window(run, each, region) for each in far)
    if any(_window(run, each, region) not in (window, 0 if each.seen <= window else window) for each in far):
        raise NotComputable("looks back differently far at different positions")
    scale, softcap = _fitted(run, region, operands, window)
    return result, _append_and_attend(
        softmax,
        (operands.q, operands.k, operands.v),
        result,
        {"scale": scale, "window": window, "softcap": softcap},
    )


def _append_and_attend(
    node: Node, operands: tuple[str, str, str], result: str, attributes: dict[str, float | int]
) -> list[Node]:
    """hetcomp.KvAppend (k, v) -> caches and hetcomp.Attention (q, caches) -> [1, T, heads, D] in place of ``node``;
    q, k, v and the result are [1, heads, T, D]."""
    q, k, v = operands
    caches, rows = (f"{result}:k", f"{result}:v"), f"{result}:rows"
    return [
        Node(node.name, "hetcomp.KvAppend", (k, v), caches, Attributes(), node.scope),
        Node(node.name, "hetcomp.Attention", (q, *caches), (rows,), Attributes(attributes), node.scope),
        Node(node.name, "Transpose", (rows,), (result,), Attributes(perm=[0, 2, 1, 3]), node.scope),
    ]


def _product_with_values(regions: Regions, softmax: Node) -> Node:
    value = softmax.outputs[0]
    for _ in range(6):
        readers = regions.consumers.get(value, [])
        product = next((n for n in readers if n.op == "MatMul" and n.inputs[0] == value), None)
        if product is not None:
            return product
        value = next((n.outputs[0] for n in readers if n.op in _BEHIND_SOFTMAX), "")
    raise NotComputable("is not multiplied with values")


def _operands(regions: Regions, softmax: Node, product: Node) -> _Operands:
    run = regions.run
    v, past_v = _appended(regions, product.inputs[1])
    scores = _scores(regions, softmax)
    sides = [_appended(regions, side) for side in scores.inputs]
    q, (k, past_k) = scores.inputs[0], sides[1]
    while (node := regions.producers.get(q)) is not None and node.op in ("Mul", "Div"):
        others = [i for i in node.inputs if run.number(i) is None]
        if len(others) != 1:
            break
        q = others[0]
    if len(run.shape(q)) != 4 or run.shape(q)[2] != run.tokens:
        raise NotComputable(f"has queries of shape {list(run.shape(q))}; expected [batch, heads, tokens, head_dim]")
    return _Operands(q, k, v, tuple(p for p in (past_k, past_v) if p))


def _operands_of_op(regions: Regions, node: Node) -> _Operands:
    """Of ONNX's Attention, which takes caches itself or finds them joined to keys and values."""
    if node.input(4):
        k, v, past = node.inputs[1], node.inputs[2], tuple(_cache(regions, p) for p in node.inputs[4:6])
        if not all(past):
            raise NotComputable("takes caches that are no inputs of the graph")
        return _Operands(node.inputs[0], k, v, past)
    (k, past_k), (v, past_v) = (_appended(regions, value) for value in node.inputs[1:3])
    return _Operands(node.inputs[0], k, v, tuple(p for p in (past_k, past_v) if p))


def _scores(regions: Regions, softmax: Node) -> Node:
    """The product of queries and keys that the softmax depends on."""
    todo = list(softmax.inputs)
    for _ in range(20):
        value = next((v for v in todo if regions.run.is_activation(v)), None)
        node = regions.producers.get(value or "")
        if node is None:
            break
        if node.op == "MatMul":
            return node
        todo = list(node.inputs)
    raise NotComputable("has no product of queries and keys")


def _appended(regions: Regions, value: str) -> tuple[str, str]:
    """What is appended to the cache that ``value`` is a view of, and that cache; without one, what ``value`` is a view
    of that has a row a token and head."""
    run = regions.run
    found = value
    while (node := regions.producers.get(value)) is not None:
        if len(run.shape(value)) == 4 and run.shape(value)[2] == run.tokens:
            found = value
        past = _cache(regions, node.inputs[0]) if node.op == "Concat" and len(node.inputs) == 2 else ""
        if past:
            return node.inputs[1], past
        sources = regions.unknown(node)
        if node.op not in _VIEWS or len(sources) != 1:
            break
        value = sources[0]
    if len(run.shape(value)) == 4 and run.shape(value)[2] == run.tokens:
        found = value
    return found, ""


def _cache(regions: Regions, value: str) -> str:
    """The cache among the graph's inputs that ``value`` is; empty if it is none."""
    while (node := regions.producers.get(value)) is not None and node.op in ("Cast", "Identity"):
        value = node.inputs[0]
    return value if value in regions.graph.inputs else ""


def _window(run: Run, far: Run, region: Region) -> int:
    """How many positions a token far behind attends to; 0: all of them."""
    hidden = torch.zeros(far.seen, dtype=torch.bool)
    for node in region.nodes:
        if node.op not in ("Add", "Where", "Attention"):
            continue
        for value in node.inputs:
            mask = far.values.get(value)
            if mask is None or mask.is_meta or mask.shape[-1:] != (far.seen,):
                continue
            row = mask.reshape(-1, far.seen)[-1]
            if node.op != "Where":
                hidden |= ~row if row.dtype == torch.bool else row < _SEEN
            elif value == node.inputs[0]:
                # Where the condition chooses the other operand than the one that has the scores.
                shown = [run.is_activation(v) for v in node.inputs[1:]]
                if shown == [True, False]:
                    hidden |= ~row.bool()
                elif shown == [False, True]:
                    hidden |= row.bool()
    if not hidden.any():
        return 0
    window = int((~hidden).sum())
    if not window or hidden[-window:].any():
        raise NotComputable("hides other positions than those before a window")
    return window


def _fitted(run: Run, region: Region, operands: _Operands, window: int) -> tuple[float, float]:
    """(scale, softcap) with which causal attention gives the region's numbers. Raises NotComputable."""
    generator = torch.Generator().manual_seed(3)
    given = {name: torch.randn(run.shape(name), generator=generator) for name in region.sources}
    want = run.trial(region.nodes, given)[region.result]
    q = given[operands.q]
    keys, values = (
        torch.cat([given[p] for p in operands.past[i : i + 1]] + [given[new]], 2)
        for i, new in enumerate((operands.k, operands.v))
    )
    constants = {run.number(v) for node in region.nodes for v in node.inputs if v}
    numbers = sorted({abs(c) for c in constants if c})
    base = [q.shape[-1] ** -0.5, 1.0]
    scales = dict.fromkeys([*base, *numbers, *(1 / n for n in numbers), *(n * n for n in numbers)])
    scales |= dict.fromkeys(1 / (n * n) for n in numbers)
    caps = [0.0, *(n for n in numbers if any(node.op == "Tanh" for node in region.nodes))]
    for cap in caps:
        for scale in scales:
            if math.isfinite(scale) and _close(want, attention_reference(q, keys, values, scale, window, cap)):
                return scale, cap
    raise NotComputable("does not compute softmax(q k) v over the positions up to the token's own")


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """ir.ops.Attention on q [1, heads, T, D] and keys, values [1, kv_heads, S, D], the last of which is q's."""
    group = q.shape[1] // keys.shape[1]
    scores = q @ keys.repeat_interleave(group, 1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    tokens, seen = scores.shape[-2:]
    distance = torch.arange(seen - tokens, seen)[:, None] - torch.arange(seen)
    hidden = (distance < 0) | (distance >= window if window else distance < 0)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values.repeat_interleave(group, 1)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
