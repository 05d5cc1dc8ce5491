"""What the ops of hetcomp's own domain become: those that recognisers put into a graph, and those of exported ones."""

from __future__ import annotations

import torch
from torch import fx

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.to_fx import Handler, Writer

hetcomp = torch.ops.hetcomp


def _rms_norm(w: Writer, node: Node) -> fx.Node:
    numbers = float(node.attributes["eps"]), float(node.attributes["weight_offset"])
    return w.call(hetcomp.rms_norm.default, w.activation(node.inputs[0]), w.parameter(node.inputs[1]), *numbers)


def _rope_table(w: Writer, node: Node) -> tuple[fx.Node, ...]:
    a = node.attributes
    return w.rope_table(a["inv_freq"], float(a["scaling"]), int(a.get("width", 0)), node.scope)


def _rope(w: Writer, node: Node) -> fx.Node:
    x, cos, sin = (w.activation(v) for v in node.inputs)
    rotary_dim, style = int(node.attributes["rotary_dim"]), str(node.attributes["style"])
    shape, dim = w.run.shape(node.outputs[0]), int(node.attributes["head_dim"])
    if len(shape) == 3:
        x = w.view(x, (*shape[:2], shape[2] // dim, dim))
        return w.view(w.call(hetcomp.rope.default, x, cos, sin, rotary_dim, style, 2), shape)
    heads_axis = 1 if shape[2] == w.run.tokens else 2
    return w.call(hetcomp.rope.default, x, cos, sin, rotary_dim, style, heads_axis)


def _kv_append(w: Writer, node: Node) -> tuple[fx.Node, ...]:
    k, v = (w.activation(v) for v in node.inputs)
    caches = w.call(hetcomp.kv_append.default, k, v, w.layer(), w.context)
    return w.take(caches, 0), w.take(caches, 1)


def _attention(w: Writer, node: Node) -> fx.Node:
    q, k, v = (w.activation(v) for v in node.inputs[:3])
    sinks = w.parameter(node.inputs[3]) if node.input(3) else None
    numbers = float(node.attributes["scale"]), int(node.attributes["window"]), float(node.attributes["softcap"])
    made = w.call(hetcomp.attention.default, q, k, v, sinks, w.layer(), *numbers)
    w.layers_done += 1
    return made


def _mla_attention(w: Writer, node: Node) -> fx.Node:
    q, latent, rotated = (w.activation(v) for v in node.inputs[:3])
    given = q, latent, rotated, w.parameter(node.inputs[3])
    dims = int(node.attributes["nope_dim"]), int(node.attributes["v_dim"])
    layer, scale, softcap = w.layer(), float(node.attributes["scale"]), float(node.attributes["softcap"])
    made = w.call(hetcomp.mla_attention.default, *given, layer, scale, *dims, softcap)
    w.layers_done += 1
    return made


def _route(w: Writer, node: Node) -> tuple[fx.Node, ...]:
    a = node.attributes
    made = w.call(
        hetcomp.route.default,
        w.activation(node.inputs[0]),
        w.parameter(node.inputs[1]) if node.input(1) else None,
        int(a["top_k"]),
        str(a["scoring"]),
        bool(a["normalise"]),
        float(a["norm_eps"]),
        int(a["groups"]),
        int(a["top_groups"]),
        str(a["group_score"]),
        str(a["outside_groups"]),
        float(a["scaling"]),
        float(a.get("jitter", 0.0)),
    )
    return w.take(made, 0), w.take(made, 1)


def _moe_experts(w: Writer, node: Node) -> fx.Node:
    a = node.attributes
    x, ids, chosen = (w.activation(v) for v in node.inputs[:3])
    gate_up, down, *biases = (w.parameter(v) for v in node.inputs[3:])
    return w.call(
        hetcomp.moe_experts.default,
        *(x, ids, chosen, gate_up, down),
        *(biases or (None, None)),
        str(a["function"]),
        float(a["alpha"]),
        float(a["limit"]),
        bool(a["transposed"]),
        bool(a["interleaved"]),
    )


HANDLERS: dict[str, Handler] = {
    "hetcomp.Attention": _attention,
    "hetcomp.KvAppend": _kv_append,
    "hetcomp.MlaAttention": _mla_attention,
    "hetcomp.MoeExperts": _moe_experts,
    "hetcomp.RmsNorm": _rms_norm,
    "hetcomp.Rope": _rope,
    "hetcomp.RopeTable": _rope_table,
    "hetcomp.Route": _route,
}
