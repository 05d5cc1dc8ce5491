"""The gated delta rule around LinearAttention: what norms queries and keys before it and makes decay and rate, tried on
random numbers; in their place stands hetcomp.GatedDelta, which has them inside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.decimals import decimal
from hetcomp.frontend.onnx.evaluate import Run
from hetcomp.frontend.onnx.graph import Attributes, Graph, Node
from hetcomp.frontend.onnx.linear_attention_op import LINEAR_ATTENTION, Heads, check_state, heads_of
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.regions import Region, Regions

_TOLERANCE = 1e-5
# What is divided by a length without an epsilon: less than the square of any number that counts, more than the least
# number of float32, so that zeros stay zeros.
_NO_EPSILON = 1e-30
# Rows of the trials: long, and so short that an epsilon of 1e-6, or of 1e-12, shows.
_LENGTHS = (1.0, 1e-3, 1e-6)


@dataclass(frozen=True)
class _Normed:
    """Queries or keys are ``scale * source / sqrt(sum(source^2) + eps)`` by head; without an
    eps ``scale * source``."""

    source: str
    scale: float
    eps: float


@dataclass(frozen=True)
class _Decay:
    """-exp(a_log) * softplus(a + dt_bias), where a_log is ``weight``, or the logarithm of it times ``log_of``."""

    a: str
    weight: str
    dt_bias: str
    log_of: int


def replace_linear_attention(graph: Graph, run: Run, origin: str) -> Graph:
    """The graph with hetcomp.GatedDelta for each LinearAttention. Raises HetcompError naming one that computes another
    rule, or whose decay, rate, queries or keys are made in a way that hetcomp does not know."""
    regions = Regions(graph, run)
    new: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in LINEAR_ATTENTION and run.is_activation(node.outputs[0]):
            try:
                new[node.outputs[0]] = [_gated_delta(regions, node)]
            except NotComputable as error:
                raise HetcompError(f"{origin}: {node} {error}") from error
    return graph.replaced(new, graph.outputs[:1])


def _gated_delta(regions: Regions, node: Node) -> Node:
    run = regions.run
    check_state(node.input(3), regions.graph, regions.producers, run.values)
    if not node.input(4) or not node.input(5):
        raise NotComputable("has no decay or no beta")
    heads = heads_of(node, *(run.shape(v) for v in node.inputs[:3]))
    q, k = (_normed(regions, value, heads) for value in node.inputs[:2])
    if k.scale != 1.0 or k.eps != q.eps:
        raise NotComputable("has keys that are scaled, or normed in another way than queries")
    decay, b = _decay(regions, node.inputs[4], heads.v_heads), _rate(regions, node.inputs[5], heads.v_heads)
    k_heads = run.values[q.source].numel() // (run.tokens * heads.k_dim)
    scale = (float(node.get("scale", 0.0)) or heads.k_dim**-0.5) * q.scale
    attributes = Attributes(
        {"k_heads": k_heads, "v_heads": heads.v_heads, "k_dim": heads.k_dim, "v_dim": heads.v_dim}
        | {"scale": scale, "l2_eps": q.eps, "a_log_of": decay.log_of}
    )
    rows = _together(regions, (q.source, k.source, node.inputs[2]))
    inputs = *rows, decay.a, b, decay.weight, decay.dt_bias
    return Node(node.name, "hetcomp.GatedDelta", inputs, node.outputs[:1], attributes, node.scope)


def _activations(run: Run, region: Region) -> list[str]:
    return [v for v in region.sources if run.is_activation(v)]


def _single(regions: Regions, value: str, also: int = 0) -> Iterator[tuple[Region, str]]:
    """Regions behind ``value`` that one activation with a row a token goes into, and that activation. also: known
    numbers of so many elements are asked for what makes them."""

    def opened(v: str) -> bool:
        known = regions.run.values.get(v)
        return v in regions.producers and known is not None and not known.is_meta and known.numel() == also > 1

    for region in regions.behind([value], opened):
        found = _activations(regions.run, region)
        if len(found) == 1 and regions.run.shape(found[0])[:2] == (1, regions.run.tokens):
            yield region, found[0]


# ---------------------------------------------------------------- queries and keys


def _normed(regions: Regions, value: str, heads: Heads) -> _Normed:
    """What ``value`` is behind its norm. The farthest that fits is taken."""
    found = _Normed(value, 1.0, 0.0)
    for region, x in _single(regions, value):
        if set(region.sources) != {x}:
            break
        try:
            fitted = _fitted_norm(regions.run, region, x, heads)
        except NotComputable:
            break
        found = fitted or found
    return found


def _fitted_norm(run: Run, region: Region, x: str, heads: Heads) -> _Normed | None:
    """The norm that gives the region's numbers. Queries of one head may come several times, one after the other."""
    shape, dim = run.shape(x), heads.k_dim
    count = run.values[x].numel() // (run.tokens * dim)
    if run.values[x].numel() % (run.tokens * dim) or not count or heads.k_heads % count:
        return None
    numbers = torch.randn(run.tokens, count, dim, generator=torch.Generator().manual_seed(7))
    numbers *= torch.tensor(_LENGTHS)[torch.arange(run.tokens) % len(_LENGTHS)][:, None, None]
    made = run.trial(region.nodes, {x: numbers.reshape(shape)})[region.result]
    if made.numel() != run.tokens * heads.k_heads * dim:
        return None
    want = made.reshape(run.tokens, heads.k_heads, dim)
    numbers = numbers.repeat_interleave(heads.k_heads // count, 1)
    constants = {run.number(v) for node in region.nodes for v in node.inputs if v}
    known = sorted(abs(c) for c in constants if c)
    small = [c for c in known if c < 1e-2]
    for eps in (0.0, _NO_EPSILON, *small, *(c * dim for c in small)):
        plain = numbers * torch.rsqrt(numbers.pow(2).sum(-1, keepdim=True) + eps) if eps else numbers
        ratio = float(want[0, 0] @ plain[0, 0] / (plain[0, 0] @ plain[0, 0]))
        near = [s for s in (1.0, dim**-0.5, *known) if abs(s - ratio) <= _TOLERANCE * abs(ratio)]
        scale = near[0] if near else decimal(ratio)
        if ratio and _close(want, scale * plain):
            return _Normed(x, scale, decimal(eps))
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """By the largest number of each row: rows differ much in length."""
    most = b.abs().amax(-1, keepdim=True)
    return a.shape == b.shape and bool(((a - b).abs() <= _TOLERANCE * most).all())


def _together(regions: Regions, parts: tuple[str, str, str]) -> tuple[str, ...]:
    """What queries, keys and values are cut out of, if it is they one after the other; else themselves."""
    run = regions.run
    for region in regions.behind(parts, lambda v: False):
        found = region.sources
        if len(found) != 1:
            continue
        shape = run.shape(found[0])
        if len(shape) != 3 or shape[:2] != (1, run.tokens):
            return parts
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        try:
            made = run.trial(region.nodes, {found[0]: numbers})
        except NotComputable:
            return parts
        joined = torch.cat([made[p].reshape(1, run.tokens, -1) for p in parts], -1)
        return found if torch.equal(joined, numbers) else parts
    return parts


# ---------------------------------------------------------------- decay and rate


def _decay(regions: Regions, value: str, heads: int) -> _Decay:
    run = regions.run
    if run.values[value].numel() != run.tokens * heads:
        raise NotComputable("has a decay for each dimension of the keys; hetcomp compiles one a head")
    for region, a in _single(regions, value, heads):
        weights = [v for v in region.sources if v in run.weights and run.values[v].numel() == heads]
        if len(weights) != 2 or len(region.sources) != 3:
            continue
        try:
            found = next(
                (d for pair in itertools.permutations(weights) if (d := _fitted_decay(run, region, a, *pair))), None
            )
        except NotComputable:
            break
        if found is not None:
            _check_sign(run, found)
            return found
    raise NotComputable("has a decay that is not -exp(a_log) * softplus(a + dt_bias)")


def _fitted_decay(run: Run, region: Region, a: str, weight: str, dt_bias: str) -> _Decay | None:
    generator = torch.Generator().manual_seed(11)
    given = {v: torch.randn(run.shape(v), generator=generator) for v in (a, weight, dt_bias)}
    made = run.trial(region.nodes, given)[region.result].reshape(run.tokens, -1)
    x, w = given[a].reshape(run.tokens, -1), given[weight].reshape(-1)
    soft = functional.softplus(x + given[dt_bias].reshape(-1))
    for log_of, want in ((0, -w.exp() * soft), (-1, w * soft), (1, -w * soft)):
        if torch.allclose(made, want, rtol=_TOLERANCE, atol=_TOLERANCE):
            return _Decay(a, weight, dt_bias, log_of)
    return None


def _check_sign(run: Run, decay: _Decay) -> None:
    known = run.values[decay.weight]
    if decay.log_of and not known.is_meta and not bool((known * decay.log_of > 0).all()):
        raise NotComputable(f"has a state that does not decay by {decay.weight}, but stays or grows")


def _rate(regions: Regions, value: str, heads: int) -> str:
    """What the rate is the sigmoid of."""
    run = regions.run
    if run.values[value].numel() != run.tokens * heads:
        raise NotComputable("has one beta for all heads; hetcomp compiles one a head")
    for region, b in _single(regions, value):
        if region.sources != (b,) or run.values[b].numel() != run.tokens * heads:
            break
        numbers = torch.randn(run.shape(b), generator=torch.Generator().manual_seed(13))
        try:
            made = run.trial(region.nodes, {b: numbers})[region.result].reshape(-1)
        except NotComputable:
            break
        if torch.allclose(made, numbers.sigmoid().reshape(-1), rtol=_TOLERANCE, atol=_TOLERANCE):
            return b
    raise NotComputable("has a beta that is not the sigmoid of something")
