"""Recognises routers by behaviour: the region between router logits and the experts' ids and weights.

The region is run on random numbers and the parameters of ir.ops.Route are fitted until both agree. A router
that no candidate reproduces stays as it is and becomes an aten region.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hetcomp.ir.ops import Route

_ROWS = 193  # enough that every group and many combinations of experts are chosen
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Router:
    """A recognised router: its parameters, the node of the logits and that of the selection bias."""

    route: Route
    logits: fx.Node
    bias: fx.Node | None


def route_reference(logits: Tensor, bias: Tensor | None, r: Route) -> tuple[Tensor, Tensor]:
    """ids int64[T, top_k], weights f32[T, top_k] as ir.ops.Route defines them."""
    if r.scoring == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1) if r.scoring == "softmax" else logits
    choice = scores if bias is None else scores + bias
    if r.groups > 1:
        grouped = choice.view(-1, r.groups, r.experts // r.groups)
        best = grouped.amax(-1) if r.group_score == "max" else grouped.topk(2, -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(r.top_groups, -1)[1], 1.0).bool()
        outside = ~kept[..., None].expand_as(grouped).reshape_as(choice)
        choice = choice.masked_fill(outside, float("-inf") if r.outside_groups == "never" else 0.0)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True)[1][:, : r.top_k]
    weights = scores.gather(1, ids)
    if r.scoring == "topk_softmax":
        weights = weights.softmax(-1)
    elif r.scoring == "sparse_mixer":
        weights = _sparse_mixer_weights(logits, ids, r.jitter)
    if r.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + r.norm_eps)
    return ids, weights * r.scaling


def _sparse_mixer_weights(logits: Tensor, ids: Tensor, jitter: float) -> Tensor:
    left, weights = logits, []
    for k in range(ids.shape[-1]):
        chosen = ids[:, k : k + 1]
        best = logits.gather(1, chosen)
        far = (best - logits) / logits.abs().maximum(best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(weights, -1)


def find_routers(graph: fx.Graph, config: object) -> dict[fx.Node, Router]:
    """Recognised routers by the moe_experts node that they feed."""
    out: dict[fx.Node, Router] = {}
    fitted: dict[str, Route | None] = {}
    for node in graph.nodes:
        if node.target is not torch.ops.hetcomp.moe_experts.default:
            continue
        region = _region(node)
        if region is None:
            continue
        nodes, logits, bias = region
        key = _signature(nodes, logits, bias, node)
        if key not in fitted:
            fitted[key] = _fit(nodes, logits, bias, node, config)
        route = fitted[key]
        if route is not None:
            out[node] = Router(route, logits, bias)
    return out


def _is_logits(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.linear.default


def _region(moe: fx.Node) -> tuple[list[fx.Node], fx.Node, fx.Node | None] | None:
    """Nodes between one linear (and one buffer at most) and the ids and weights of ``moe``, in order."""
    members: set[fx.Node] = set()
    outside: set[fx.Node] = set()
    todo = [n for n in moe.args[1:3] if isinstance(n, fx.Node)]
    while todo:
        node = todo.pop()
        if node in members or node in outside:
            continue
        if node.op != "call_function" or _is_logits(node) or str(node.target).startswith("hetcomp."):
            outside.add(node)
        elif "sym_size" not in str(node.target):
            members.add(node)
            todo.extend(node.all_input_nodes)
    logits = [n for n in outside if _is_logits(n)]
    buffers = [n for n in outside if n.op == "placeholder"]
    if len(logits) != 1 or len(buffers) > 1 or len(logits) + len(buffers) != len(outside):
        return None
    return [n for n in moe.graph.nodes if n in members], logits[0], buffers[0] if buffers else None


def _signature(nodes: list[fx.Node], logits: fx.Node, bias: fx.Node | None, moe: fx.Node) -> str:
    index: dict[fx.Node, str] = {logits: "logits"} | {n: f"n{i}" for i, n in enumerate(nodes)}
    if bias is not None:
        index[bias] = "bias"
    lines = [
        f"{n.target}{fx.node.map_arg((n.args, tuple(n.kwargs.items())), lambda a: index.get(a, 'T'))}" for n in nodes
    ]
    ends = [index[n] for n in moe.args[1:3] if isinstance(n, fx.Node)]
    return "\n".join([str(logits.meta["val"].shape[-1]), *lines, *ends])


def _fit(nodes: list[fx.Node], logits: fx.Node, bias: fx.Node | None, moe: fx.Node, config: object) -> Route | None:
    experts = int(logits.meta["val"].shape[-1])
    top_k = int(moe.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(_ROWS, experts, generator=generator) * 2.0
    # Wide enough that some biased scores are negative: tells -inf from 0 outside the groups.
    offsets = torch.randn(experts, generator=generator) * 0.7 if bias is not None else None
    try:
        ids, weights = _run(nodes, logits, bias, moe, scores, offsets)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    if ids.shape != (_ROWS, top_k) or weights.shape != (_ROWS, top_k):
        return None
    candidates = list(_candidates(experts, top_k, bias is not None, config))
    if any(n.target is torch.ops.aten.topk.default and n.args[0] is logits for n in nodes):
        # Softmax over the chosen logits and softmax over all, normalised, are the same numbers: the choice
        # by logits tells which of them it is.
        candidates.sort(key=lambda r: r.scoring != "topk_softmax")
    for candidate in candidates:
        if _agree((ids, weights), route_reference(scores, offsets, candidate)):
            return candidate
    return None


def _agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    ids_a, order_a = torch.sort(a[0], dim=-1)
    ids_b, order_b = torch.sort(b[0], dim=-1)
    return bool(torch.equal(ids_a, ids_b)) and torch.allclose(
        a[1].float().gather(1, order_a), b[1].gather(1, order_b), rtol=_TOLERANCE, atol=1e-7
    )


def _run(
    nodes: list[fx.Node],
    logits: fx.Node,
    bias: fx.Node | None,
    moe: fx.Node,
    scores: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = [_ROWS if isinstance(d, torch.SymInt) else d for d in logits.meta["val"].shape]
    env: dict[fx.Node, Any] = {logits: scores.view(shape)}
    if bias is not None:
        env[bias] = offsets
    for node in nodes:
        args = fx.node.map_arg(node.args, lambda n: env.get(n, _ROWS))
        kwargs = fx.node.map_arg(dict(node.kwargs), lambda n: env.get(n, _ROWS))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    ids, weights = (env[n] for n in moe.args[1:3] if isinstance(n, fx.Node))
    return ids, weights


def _numbers(config: object, *names: str) -> list[float]:
    found = (getattr(config, n, None) for n in names)
    return [float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _sparse_mixers(experts: int, top_k: int, config: object) -> Iterator[Route]:
    for jitter in dict.fromkeys([*_numbers(config, "router_jitter_noise"), 0.01]):
        yield Route(experts, top_k, "sparse_mixer", normalise=False, jitter=jitter)


def _candidates(experts: int, top_k: int, bias: bool, config: object) -> Iterator[Route]:
    """Route parameters that the config makes plausible, simple ones first."""
    scalings = dict.fromkeys([1.0, *_numbers(config, "routed_scaling_factor", "moe_routed_scaling_factor")])
    groups = [(1, 1)]
    for n, k in itertools.product(
        _numbers(config, "n_group", "num_expert_groups"), _numbers(config, "topk_group", "topk_groups")
    ):
        if 1 < n <= experts and experts % int(n) == 0 and k <= n:
            groups.append((int(n), int(k)))
    for scoring, (n, k), scaling in itertools.product(("softmax", "sigmoid", "topk_softmax"), groups, scalings):
        # The models' own guard against an empty sum; it cannot be seen in float32 unless the sum is 0.
        eps = 1e-20 if scoring == "sigmoid" else 0.0
        norms = ((False, 0.0), (True, eps), (True, 1e-9), (True, 1e-6))
        if n == 1:
            kinds: tuple[tuple[str, str], ...] = (("max", "never"),)
        else:
            scores = ("top2", "max") if experts // n >= 2 else ("max",)
            kinds = tuple(itertools.product(scores, ("never", "zero")))
        for (normalise, norm_eps), (group_score, outside) in itertools.product(norms, kinds):
            yield Route(
                experts=experts,
                top_k=top_k,
                scoring=scoring,
                normalise=normalise,
                norm_eps=norm_eps,
                groups=n,
                top_groups=k,
                group_score=group_score,  # type: ignore[arg-type]
                outside_groups=outside,  # type: ignore[arg-type]
                scaling=scaling,
                bias=bias,
            )
    if not bias:
        yield from _sparse_mixers(experts, top_k, config)
