"""What the com.microsoft ops of onnxruntime-genai's graphs become (onnxruntime's docs/ContribOperators.md)."""

from __future__ import annotations

import math
import re

import torch
from torch import fx

from hetcomp.frontend.onnx.evaluate import Weight
from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.handlers import product_with_bias
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.packed_weights import Packed
from hetcomp.frontend.onnx.rope_frequencies import RopeFrequencies, fit
from hetcomp.frontend.onnx.to_fx import Handler, Writer
from hetcomp.frontend.plan_builder import layer_of

aten = torch.ops.aten
hetcomp = torch.ops.hetcomp
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_FITTED_ROWS = 256


def refuse(node: Node, **expected: tuple[object, ...]) -> None:
    """Raises NotComputable if an attribute that is there has none of the values that are expected."""
    for name, values in expected.items():
        if node.get(name, values[0]) not in values:
            raise NotComputable(f"has {name}={node.attributes[name]}; hetcomp compiles {' or '.join(map(str, values))}")


def refuse_inputs(node: Node, **indices: int) -> None:
    """Raises NotComputable if an optional operand is there that hetcomp does not know."""
    for name, index in indices.items():
        if node.input(index):
            raise NotComputable(f"has an operand {name}, which hetcomp does not compile")


# ---------------------------------------------------------------- norms


def _skip_norm(w: Writer, node: Node) -> tuple[fx.Node | None, ...]:
    refuse_inputs(node, bias=3)
    scope = w.scope
    w.scope = _layer_before(w, node)
    total = w.call(aten.add.Tensor, w.activation(node.inputs[0]), w.activation(node.inputs[1]))
    # The builder counts the last norm as one of a layer that is not there.
    layer = layer_of(scope)
    w.scope = scope if layer is None or layer < w.layers else scope.replace(f"layers.{layer}.", "")
    eps = float(node.get("epsilon", 1e-5))
    normed = w.call(hetcomp.rms_norm.default, total, w.parameter(node.inputs[2]), eps, 0.0)
    return normed, None, None, total


def _layer_before(w: Writer, node: Node) -> str:
    """Path of the layer whose result the sum before a norm takes up: the builder names the sum after the norm."""
    scopes = [w.producers[v].scope for v in node.inputs[:2] if v in w.producers]
    layers = [found[1] for found in map(_LAYER.match, scopes) if found]
    return max(layers, key=lambda path: layer_of(path) or 0, default=w.scope)


# ---------------------------------------------------------------- attention


def _group_query_attention(w: Writer, node: Node) -> fx.Node:
    refuse(node, causal=(1,), smooth_softmax=(0, -1), sliding_window_cache=(0,), qk_output=(0,))
    refuse(node, k_quant_type=("NONE",), v_quant_type=("NONE",))
    refuse_inputs(node, attention_bias=10, k_scale=12, v_scale=13, q_norm_weight=14, k_norm_weight=15, query_seqlens=16)
    _check_lengths(w, node)
    heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    q, k, v = _by_head(w, node, heads, kv_heads)
    dim = int(q.meta["val"].shape[-1])
    if node.get("do_rotary", 0):
        table, width = _table(w, node)
        cos, sin = w.rope_table(table.inv_freq, table.scaling)
        style = "interleaved" if node.get("rotary_interleaved", 0) else "half"
        q, k = (w.call(hetcomp.rope.default, x, cos, sin, width, style, 1) for x in (q, k))
    caches = w.call(hetcomp.kv_append.default, k, v, w.layer(), w.context)
    sinks = w.parameter(node.inputs[11]) if node.input(11) else None
    # An attribute of 0 stands for none.
    scale = float(node.get("scale", 0.0)) or dim**-0.5
    window, softcap = max(0, int(node.get("local_window_size", -1))), float(node.get("softcap", 0.0))
    given = q, w.take(caches, 0), w.take(caches, 1), sinks
    mixed = w.call(hetcomp.attention.default, *given, w.layer(), scale, window, softcap)
    w.layers_done += 1
    return w.view(mixed, w.run.shape(node.outputs[0]))


def _check_lengths(w: Writer, node: Node) -> None:
    """Raises NotComputable unless the lengths are those of a single sequence that is attended to as a whole."""
    for value, want in ((node.inputs[5], w.run.seen - 1), (node.inputs[6], w.run.seen)):
        if w.run.number(value) != want:
            raise NotComputable(f"takes {value} for a length, which is not that of the sequence")
    if node.input(9):
        positions = w.run.values[node.inputs[9]]
        if positions.is_meta or positions.reshape(-1).tolist() != list(range(w.run.past, w.run.seen)):
            raise NotComputable(f"takes {node.inputs[9]} for positions, which are not those of the sequence")


def _by_head(w: Writer, node: Node, heads: int, kv_heads: int) -> list[fx.Node]:
    """Queries, keys and values [1, heads, T, head_dim], also where they come in one row."""
    parts = [w.activation(node.inputs[0])]
    counts = [heads, kv_heads, kv_heads]
    if node.input(1):
        parts += [w.activation(v) for v in node.inputs[1:3]]
    else:
        dim = int(parts[0].meta["val"].shape[-1]) // (heads + 2 * kv_heads)
        whole = w.call(aten.split_with_sizes.default, parts[0], [count * dim for count in counts], -1)
        parts = [w.take(whole, i) for i in range(3)]
    out = []
    for part, count in zip(parts, counts, strict=True):
        dim = int(part.meta["val"].shape[-1]) // count
        split = w.view(part, (1, w.run.tokens, count, dim))
        out.append(w.call(aten.permute.default, split, [0, 2, 1, 3]))
    return out


def _table(w: Writer, node: Node) -> tuple[RopeFrequencies, int]:
    """Frequencies of the caches of cosines and sines, and the width that they rotate."""
    cos, sin = (w.run.values[v] for v in node.inputs[7:9])
    if cos.is_meta or cos.shape != sin.shape or cos.ndim != 2:
        raise NotComputable("has tables of cosines and sines that are not known")
    key = (node.inputs[7], node.inputs[8])
    if key not in w.fitted:
        constants = [t for t in w.run.values.values() if not t.is_meta and t.numel() == cos.shape[1]]
        table = fit(cos[:_FITTED_ROWS], sin[:_FITTED_ROWS], 0, constants)
        table.check(cos[-_FITTED_ROWS:], sin[-_FITTED_ROWS:], max(0, len(cos) - _FITTED_ROWS))
        w.fitted[key] = table
    return w.fitted[key], 2 * int(cos.shape[1])


# ---------------------------------------------------------------- quantised weights


def _packed(w: Writer, packed: Packed) -> fx.Node:
    """The placeholder of a quantised weight. Raises NotComputable if what is stored for it does not fit together."""
    packed.described("", w.graph.initialisers)
    return w.placeholder(w.parameters.of(Weight(packed.codes), packed.shape, w.scope, packed))


def _matmul_nbits(w: Writer, node: Node) -> fx.Node:
    refuse(node, weight_prepacked=(0,))
    shape = (int(node.attributes["N"]), int(node.attributes["K"]))
    names = node.inputs[1], node.inputs[2], node.input(3)
    if node.input(4):
        raise NotComputable("has columns in an order of their own (g_idx), which hetcomp does not read from ONNX")
    weight = _packed(w, Packed(shape, int(node.get("bits", 4)), int(node.attributes["block_size"]), *names))
    return product_with_bias(w, node, weight, node.input(5))


def _gather_quantised(w: Writer, node: Node) -> fx.Node:
    data = w.graph.initialisers.get(node.inputs[0])
    bits = int(node.get("bits", 4))
    if data is None or len(data.shape) != 2 or data.dtype != "U8" or node.inputs[1] not in w.nodes:
        raise NotComputable("is no table of bytes that tokens choose rows of, which is what hetcomp compiles")
    refuse(node, gather_axis=(0,), quantize_axis=(1, -1))
    shape = (data.shape[0], data.shape[1] * 8 // bits)
    names = node.inputs[0], node.inputs[2], node.input(3)
    table = _packed(w, Packed(shape, bits, int(node.get("block_size", 128)), *names))
    w.embedding = w.call(aten.embedding.default, table, w.activation(node.inputs[1]))
    return w.embedding


# ---------------------------------------------------------------- mixture of experts


def _moe(w: Writer, node: Node) -> fx.Node:
    refuse_inputs(node, fc3_experts_weights=6, fc3_experts_bias=7)
    names = node.inputs[2], node.inputs[4]
    weights = [w.parameter(name) for name in names]
    return _experts(w, node, weights, (node.input(3), node.input(5)))


def _qmoe(w: Writer, node: Node) -> fx.Node:
    refuse(node, quant_type=("int",), weights_prepacked=(-1, 0))
    refuse_inputs(node, fc3_experts_weights=8, fc3_scales=9, fc3_experts_bias=10, router_weights=14)
    if node.get("weights_prepacked", -1) == -1 and w.prepacked_for:
        raise NotComputable(
            f"has weights in an order of {w.prepacked_for}'s own, as genai_config.json says; export the model for cpu"
        )
    hidden = w.run.shape(node.inputs[0])[-1]
    bits = int(node.get("expert_weight_bits", 4))
    weights = []
    for index, (codes, scales, zeros) in enumerate(((2, 3, 11), (5, 6, 12))):
        each = int(node.get(f"fc{index + 1}_expert_weight_bits", bits))
        shape = w.run.shape(node.inputs[codes])
        columns = hidden if index == 0 else shape[-1] * 8 // each
        packed = Packed(
            (*shape[:2], columns),
            each,
            int(node.get("block_size", 0)) or columns,
            node.inputs[codes],
            node.inputs[scales],
            node.input(zeros),
        )
        weights.append(_packed(w, packed))
    return _experts(w, node, weights, (node.input(4), node.input(7)))


def _experts(w: Writer, node: Node, weights: list[fx.Node], biases: tuple[str, str]) -> fx.Node:
    refuse(node, use_sparse_mixer=(0,), swiglu_limit_after_activation=(0,))
    function, alpha, limit = _activation(node)
    up, down = (tuple(weight.meta["val"].shape) for weight in weights)
    if len(up) != 3 or len(down) != 3 or (up[0], up[1]) != (down[0], 2 * down[2]):
        raise NotComputable(f"has projections of shapes {list(up)} and {list(down)}, which do not fit together")
    scope = w.scope
    ids, chosen = _routed(w, node)
    # A module of its own, so that what is beside it in the layer is not taken for a part of the experts.
    w.scope = f"{scope}.experts"
    if bool(biases[0]) != bool(biases[1]):
        raise NotComputable("has a bias of one projection only, which hetcomp does not compile")
    given = [w.parameter(bias) if bias else None for bias in biases]
    x = w.activation(node.inputs[0])
    interleaved = int(node.get("swiglu_fusion", 0)) == 1
    return w.call(
        hetcomp.moe_experts.default, x, ids, chosen, *weights, *given, function, alpha, limit, False, interleaved
    )


def _activation(node: Node) -> tuple[str, float, float]:
    """(function, alpha, limit) as ir.ops.MoeExperts has them."""
    refuse(node, activation_type=("swiglu",), swiglu_fusion=(1, 2))
    if "activation_type" not in node.attributes or "swiglu_fusion" not in node.attributes:
        raise NotComputable("has experts without a gate, which hetcomp does not compile")
    alpha, beta = (float(node.get(f"activation_{n}", d)) for n, d in (("alpha", 1.0), ("beta", 0.0)))
    limit = float(node.get("swiglu_limit", math.inf))
    if (alpha, beta) == (1.0, 0.0) and math.isinf(limit):
        return "silu", 0.0, 0.0
    if beta == 1.0 and math.isfinite(limit):
        return "swiglu_oai", alpha, limit
    raise NotComputable(f"computes SwiGLU with alpha {alpha}, beta {beta} and limit {limit}, which hetcomp does not")


def _routed(w: Writer, node: Node) -> tuple[fx.Node, fx.Node]:
    """ids and weights [T, k]: softmax over all experts, of which the best k are taken."""
    logits = w.activation(node.inputs[1])
    experts = int(logits.meta["val"].shape[-1])
    flat = w.view(logits, (w.run.tokens, experts))
    scores = w.call(aten._softmax.default, flat, -1, False)
    best = w.call(aten.topk.default, scores, int(node.get("k", 1)), -1)
    weights = w.take(best, 0)
    if node.get("normalize_routing_weights", 0):
        total = w.call(aten.sum.dim_IntList, weights, [-1], True)
        weights = w.call(aten.div.Tensor, weights, total)
    return w.take(best, 1), weights


HANDLERS: dict[str, Handler] = {
    "com.microsoft.GatherBlockQuantized": _gather_quantised,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.MoE": _moe,
    "com.microsoft.QMoE": _qmoe,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm,
}
