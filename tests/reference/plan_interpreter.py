"""A plain, slow interpreter of Plans: the meaning of every op kind, written straight from ir/ops.py.

It shares no code with the frontend or the backends, so that agreement with either says something.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Plan, Value, ValueKind


class PlanInterpreter:
    """Runs steps of a plan, folded or not, in float32 with the states of all slots."""

    def __init__(self, plan: Plan, checkpoint: Any) -> None:
        self.plan = plan
        self.dims = plan.max_dims()
        self.weights: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        for value in plan.values:
            shape = [d if isinstance(d, int) else self.dims[d] for d in value.type.shape]
            if value.kind is ValueKind.WEIGHT:
                self.weights[value.id] = _as_f32(checkpoint.read(value)).reshape(shape)
            elif value.kind is ValueKind.CONST:
                self.weights[value.id] = torch.tensor(value.data, dtype=torch.float32).reshape(shape)
            elif value.kind is ValueKind.STATE:
                self.states[value.id] = torch.zeros(shape)

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int] | None = None,
        logit_rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits f32[R, vocab] of the rows ``logit_rows`` (all by default)."""
        tokens = len(ids)
        rows = range(tokens) if logit_rows is None else logit_rows
        step = _Step(
            torch.tensor(list(positions)),
            torch.tensor([0] * tokens if slots is None else list(slots)),
            torch.tensor(list(rows)),
        )
        env: dict[str, Tensor] = {**self.weights, **self.states}
        for value in self.plan.values:
            if value.kind is ValueKind.INPUT:
                env[value.id] = torch.tensor(list(ids)) if value.fqn == "ids" else step.positions
        for call in self.plan.calls:
            template = self.plan.template(call.template)
            local = {p: env[a] for p, a in zip(template.params, call.args, strict=True)}
            values = template.value_map()
            for op in template.ops:
                _run(op, local, values, step)
            for name, given in zip(template.results, call.results, strict=True):
                env[given] = local[name]
        (logits,) = (v.id for v in self.plan.values if v.kind is ValueKind.OUTPUT)
        return env[logits].reshape(len(step.rows), -1)


class _Step:
    def __init__(self, positions: Tensor, slots: Tensor, rows: Tensor) -> None:
        self.positions = positions
        self.slots = slots
        self.rows = rows


def _as_f32(numbers: np.ndarray) -> Tensor:
    if numbers.dtype == np.uint16:
        return torch.from_numpy(numbers.copy()).view(torch.bfloat16).float()
    return torch.from_numpy(numbers.copy()).float()


def _run(op: Op, env: dict[str, Tensor], values: dict[str, Value], step: _Step) -> None:
    inputs = [env[v] for v in op.inputs]
    if op.kind in ("slice", "concat"):
        # These look at the last axis of the declared shape.
        inputs = [
            x.reshape(len(x), *(int(d) for d in values[v].type.shape[1:]))
            for x, v in zip(inputs, op.inputs, strict=True)
        ]
    made = _KINDS[op.kind](op.attrs, inputs, step)
    outputs = made if isinstance(made, tuple) else (made,)
    for name, tensor in zip(op.outputs, outputs, strict=True):
        env[name] = tensor


def _embed(a: ops.Embed, x: list[Tensor], step: _Step) -> Tensor:
    return x[1][x[0]] * a.scale


def _rms_norm(a: ops.RmsNorm, x: list[Tensor], step: _Step) -> Tensor:
    runs = x[0].reshape(len(x[0]), a.groups, a.width)
    normed = runs / torch.sqrt((runs * runs).mean(-1, keepdim=True) + a.eps)
    return (normed * (x[1] + a.weight_offset)).reshape(x[0].shape)


def _layer_norm(a: ops.LayerNorm, x: list[Tensor], step: _Step) -> Tensor:
    apart = x[0].reshape(-1, a.width) - x[0].reshape(-1, a.width).mean(-1, keepdim=True)
    return apart / torch.sqrt((apart * apart).mean(-1, keepdim=True) + a.eps) * x[1] + x[2]


def _linear(a: ops.Linear, x: list[Tensor], step: _Step) -> Tensor:
    assert x[1].shape == (a.out_features, a.in_features)
    y = x[0].reshape(-1, a.in_features) @ x[1].T
    return y + x[2] if a.bias else y


def _head_linear(a: ops.HeadLinear, x: list[Tensor], step: _Step) -> Tensor:
    return torch.einsum("thi,hoi->tho", x[0].reshape(-1, a.heads, a.in_features), x[1])


def _rope_table(a: ops.RopeTable, x: list[Tensor], step: _Step) -> tuple[Tensor, Tensor]:
    angles = x[0].float()[:, None] * x[1]
    assert angles.shape[1] * 2 == a.rotary_dim
    return angles.cos() * a.scaling, angles.sin() * a.scaling


def _rope(a: ops.Rope, x: list[Tensor], step: _Step) -> Tensor:
    source = x[0].reshape(-1, a.heads, a.head_dim)
    cos, sin = x[1][:, None], x[2][:, None]
    out = source.clone()
    h, o = a.rotary_dim // 2, a.offset
    pairs = torch.arange(h)
    first = o + (pairs if a.style == "half" else 2 * pairs)
    second = o + (h + pairs if a.style == "half" else 2 * pairs + 1)
    to_first, to_second = (o + pairs, o + h + pairs) if a.style != "interleaved" else (first, second)
    out[..., to_first] = source[..., first] * cos - source[..., second] * sin
    out[..., to_second] = source[..., second] * cos + source[..., first] * sin
    return out


def _kv_append(a: ops.KvAppend, x: list[Tensor], step: _Step) -> tuple[()]:
    rows = x[0].reshape(-1, a.heads, a.head_dim)
    for t, (slot, position) in enumerate(zip(step.slots, step.positions, strict=True)):
        x[1][slot, :, position] = rows[t]
    return ()


def _attention(a: ops.Attention, x: list[Tensor], step: _Step) -> Tensor:
    q, k_cache = x[0].reshape(-1, a.heads, a.head_dim), x[1]
    v_cache = k_cache[..., : a.v_head_dim] if a.shared_kv else x[2]
    sinks = x[-1] if a.sinks else None
    out = torch.zeros(len(q), a.heads, a.v_head_dim)
    for t, (slot, position) in enumerate(zip(step.slots.tolist(), step.positions.tolist(), strict=True)):
        start = max(0, position - a.window + 1) if a.window > 0 else 0
        for head in range(a.heads):
            kv = head // (a.heads // a.kv_heads)
            keys = k_cache[slot, kv, start : position + 1]
            scores = keys @ q[t, head] * a.scale
            if a.softcap > 0:
                scores = a.softcap * torch.tanh(scores / a.softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            p = torch.softmax(scores, 0)[: len(keys)]
            out[t, head] = p @ v_cache[slot, kv, start : position + 1]
    return out


def _slot_rows(step: _Step) -> list[tuple[int, list[int]]]:
    """Each run of rows of one slot."""
    runs: list[tuple[int, list[int]]] = []
    for t, slot in enumerate(step.slots.tolist()):
        if not runs or runs[-1][0] != slot:
            runs.append((slot, []))
        runs[-1][1].append(t)
    return runs


def _causal_conv(a: ops.CausalConv, x: list[Tensor], step: _Step) -> Tensor:
    rows, state = x[0].reshape(-1, a.channels), x[2]
    out = torch.zeros(len(rows), a.channels)
    for slot, run in _slot_rows(step):
        before = state[slot] * (0.0 if int(step.positions[run[0]]) == 0 else 1.0)
        window = torch.cat([before, rows[run]])
        for i, t in enumerate(run):
            y = (window[i : i + a.width] * x[1][:, 0].T).sum(0) + (x[3] if a.bias else 0.0)
            out[t] = _function(a.function, y) if a.function != "none" else y
        state[slot] = window[-(a.width - 1) :]
    return out


def _gated_delta(a: ops.GatedDelta, x: list[Tensor], step: _Step) -> Tensor:
    qkv, state = x[0].reshape(len(step.slots), -1), x[5]
    sizes = [a.k_heads * a.k_dim, a.k_heads * a.k_dim, a.v_heads * a.v_dim]
    q, k, v = (
        t.reshape(len(qkv), -1, t.shape[1] // n)
        for t, n in zip(qkv.split(sizes, 1), (a.k_heads, a.k_heads, a.v_heads), strict=True)
    )
    if a.l2_eps > 0:
        q, k = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + a.l2_eps) for t in (q, k))
    decay = torch.exp(-torch.exp(x[3]) * torch.log1p(torch.exp(x[1] + x[4])))
    beta = 1 / (1 + torch.exp(-x[2]))
    out = torch.zeros(len(qkv), a.v_heads, a.v_dim)
    for slot, run in _slot_rows(step):
        if int(step.positions[run[0]]) == 0:
            state[slot] = 0.0
        for t in run:
            for h in range(a.v_heads):
                of_key = h // (a.v_heads // a.k_heads)
                s = state[slot, h] * decay[t, h]
                s = s + torch.outer(k[t, of_key], beta[t, h] * (v[t, h] - k[t, of_key] @ s))
                state[slot, h] = s
                out[t, h] = a.scale * q[t, of_key] @ s
    return out


def _route(a: ops.Route, x: list[Tensor], step: _Step) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(x[0]), a.top_k, dtype=torch.int32)
    weights = torch.zeros(len(x[0]), a.top_k)
    for t, logits in enumerate(x[0]):
        scores = {"softmax": logits.softmax(0), "sigmoid": logits.sigmoid()}.get(a.scoring, logits)
        choice = scores + x[1] if a.bias else scores.clone()
        if a.groups > 1:
            size = a.experts // a.groups
            groups = choice.reshape(a.groups, size)
            best = groups.max(1)[0] if a.group_score == "max" else groups.sort(1)[0][:, -2:].sum(1)
            for g in sorted(range(a.groups), key=lambda g: (-float(best[g]), g))[a.top_groups :]:
                choice[g * size : (g + 1) * size] = -torch.inf if a.outside_groups == "never" else 0.0
        order = sorted(range(a.experts), key=lambda e: (-float(choice[e]), e))[: a.top_k]
        chosen = scores[order].softmax(0) if a.scoring == "topk_softmax" else scores[order]
        if a.scoring == "sparse_mixer":
            chosen = torch.tensor([_share(logits, order[: k + 1], a.jitter) for k in range(a.top_k)])
        if a.normalise:
            chosen = chosen / (chosen.sum() + a.norm_eps)
        ids[t] = torch.tensor(order, dtype=torch.int32)
        weights[t] = chosen * a.scaling
    return ids, weights


def _share(logits: Tensor, chosen: list[int], jitter: float) -> float:
    """Of the last chosen among those that are left and near it, as a sparse mixer weighs them."""
    best = logits[chosen[-1]]
    left = [logits[e] for e in range(len(logits)) if e not in chosen[:-1]]
    near = [s for s in left if not float(best - s) > 2 * jitter * max(abs(float(s)), float(best))]
    return 1 / sum(math.exp(s - best) for s in near)


def _function(name: str, gate: Tensor) -> Tensor:
    sigmoid = 1 / (1 + torch.exp(-gate))
    if name == "silu":
        return gate * sigmoid
    if name == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return {"relu": gate.clamp(min=0), "sigmoid": sigmoid, "tanh": torch.tanh(gate)}[name]


def _gated(name: str, gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    if name == "swiglu_oai":
        g = torch.minimum(gate, torch.tensor(limit))
        return (up.clamp(-limit, limit) + 1) * g / (1 + torch.exp(-alpha * g))
    return _function(name, gate) * up


def _moe_experts(a: ops.MoeExperts, x: list[Tensor], step: _Step) -> Tensor:
    tokens, ids, weights, gate_up, down = x[0].reshape(-1, a.hidden), *x[1:5]
    assert gate_up.shape == (a.experts, 2 * a.intermediate, a.hidden)
    assert down.shape == (a.experts, a.hidden, a.intermediate)
    out = torch.zeros_like(tokens)
    for t in range(len(tokens)):
        for k in range(a.top_k):
            e = int(ids[t, k])
            both = gate_up[e] @ tokens[t] + (x[5][e] if a.bias else 0.0)
            inner = _gated(a.function, both[: a.intermediate], both[a.intermediate :], a.alpha, a.limit)
            out[t] += weights[t, k] * (down[e] @ inner + (x[6][e] if a.bias else 0.0))
    return out


def _glu(a: ops.Glu, x: list[Tensor], step: _Step) -> Tensor:
    return _gated(a.function, x[0].reshape(x[1].shape), x[1], a.alpha, a.limit)


def _mul(a: ops.Mul, x: list[Tensor], step: _Step) -> Tensor:
    return (x[0].flatten(1) * x[1].flatten(1)).reshape(x[0].shape)


def _add(a: ops.Add, x: list[Tensor], step: _Step) -> Tensor:
    return x[0] + x[1].reshape(x[0].shape)


def _concat(a: ops.Concat, x: list[Tensor], step: _Step) -> Tensor:
    if x[0].dim() == 3:
        heads = max(t.shape[1] for t in x)
        x = [t.expand(-1, heads, -1) for t in x]
    return torch.cat(x, -1)


def _aten(a: ops.Aten, x: list[Tensor], step: _Step) -> tuple[Tensor, ...]:
    tokens = len(x[0])
    for tensor, shape in zip(x, a.input_shapes, strict=True):
        if "T" in shape:
            tokens = tensor.numel() // int(np.prod([d for d in shape if d != "T"]))
    inputs = [
        t.reshape([tokens if d == "T" else int(d) for d in shape]) for t, shape in zip(x, a.input_shapes, strict=True)
    ]
    made: list[Any] = []

    def argument(value: Any) -> Any:
        if isinstance(value, ops.AtenRef):
            return inputs[value.index] if value.source == "input" else made[value.index]
        if isinstance(value, tuple):
            return [argument(v) for v in value]
        if isinstance(value, str):
            return tokens if value == "T" else getattr(torch, value.removeprefix("torch."))
        return value

    for node in a.nodes:
        if node.target == "getitem":
            function: Callable[..., Any] = operator.getitem
        else:
            _, packet, overload = node.target.split(".")
            function = getattr(getattr(torch.ops.aten, packet), overload)
        result = function(*map(argument, node.args), **{k: argument(v) for k, v in node.kwargs})
        if isinstance(result, Tensor):
            assert list(result.shape) == [tokens if d == "T" else d for d in node.shape], node
            assert str(result.dtype) == f"torch.{node.dtype}", node
        made.append(result)
    return tuple(made[i].contiguous().reshape(tokens, -1) for i in a.results)


_KINDS: dict[str, Callable[[Any, list[Tensor], _Step], Any]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "head_linear": _head_linear,
    "rope_table": _rope_table,
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "causal_conv": _causal_conv,
    "gated_delta": _gated_delta,
    "route": _route,
    "moe_experts": _moe_experts,
    "glu": _glu,
    "activation": lambda a, x, step: _function(a.function, x[0]),
    "add": _add,
    "mul": _mul,
    "scale": lambda a, x, step: x[0] * a.factor,
    "slice": lambda a, x, step: x[0][..., a.start : a.stop],
    "concat": _concat,
    "select_rows": lambda a, x, step: x[0][step.rows],
    "transfer": lambda a, x, step: x[0],
    "aten": _aten,
}
