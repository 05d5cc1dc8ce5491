"""What the com.microsoft ops of onnxruntime-genai's graphs become (onnxruntime's docs/ContribOperators.md)."""

from __future__ import annotations

import re

import torch
from torch import fx

from hetcomp.frontend.onnx.evaluate import Weight
from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.handlers import product_with_bias
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.packed_weights import Packed
from hetcomp.frontend.onnx.parameters import Parameter
from hetcomp.frontend.onnx.rope_frequencies import RopeFrequencies, fit, rounding_of
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


def _layer_norm(w: Writer, node: Node) -> fx.Node:
    refuse(node, axis=(-1, len(w.run.shape(node.inputs[0])) - 1))
    eps = float(node.get("epsilon", 1e-5))
    return _normed(w, w.activation(node.inputs[0]), node.inputs[1], node.input(2), eps)


def _normed(w: Writer, x: fx.Node, weight: str, bias: str, eps: float) -> fx.Node:
    width = [int(x.meta["val"].shape[-1])]
    return w.call(aten.layer_norm.default, x, width, w.parameter(weight), w.parameter(bias) if bias else None, eps)


def _skip_norm(w: Writer, node: Node) -> tuple[fx.Node | None, ...]:
    simple = node.op.endswith("SimplifiedLayerNormalization")
    refuse_inputs(node, bias=3 if simple else 4)
    scope = w.scope
    w.scope = _layer_before(w, node)
    total = w.call(aten.add.Tensor, w.activation(node.inputs[0]), w.activation(node.inputs[1]))
    # The builder counts the last norm as one of a layer that is not there.
    layer = layer_of(scope)
    w.scope = scope if layer is None or layer < w.layers else scope.replace(f"layers.{layer}.", "")
    eps = float(node.get("epsilon", 1e-5))
    if simple:
        normed = w.call(hetcomp.rms_norm.default, total, w.parameter(node.inputs[2]), eps, 0.0)
    else:
        normed = _normed(w, total, node.inputs[2], node.input(3), eps)
    return normed, None, None, total


def _layer_before(w: Writer, node: Node) -> str:
    """Path of the layer whose result the sum before a norm takes up: the builder names the sum after the norm."""
    scopes = [w.producers[v].scope for v in node.inputs[:2] if v in w.producers]
    layers = [found[1] for found in map(_LAYER.match, scopes) if found]
    return max(layers, key=lambda path: layer_of(path) or 0, default=w.scope)


# ---------------------------------------------------------------- attention


def _group_query_attention(w: Writer, node: Node) -> fx.Node:
    refuse(node, causal=(1,), smooth_softmax=(0, -1), sliding_window_cache=(0, 1), qk_output=(0,))
    refuse(node, k_quant_type=("NONE",), v_quant_type=("NONE",))
    refuse_inputs(node, attention_bias=10, k_scale=12, v_scale=13, query_seqlens=16)
    _check_lengths(w, node)
    heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    q, k, v = _by_head(w, node, heads, kv_heads)
    dim = int(q.meta["val"].shape[-1])
    q, k = _norms_of_heads(w, node, q, k)
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


def _norms_of_heads(w: Writer, node: Node, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Queries and keys, normed where the op has weights for that."""
    if not node.input(14):
        refuse_inputs(node, k_norm_weight=15)
        return q, k
    both, made, scope = float(node.get("qk_norm_epsilon", 1e-6)), [], w.scope
    for x, letter, index in ((q, "q", 14), (k, "k", 15)):
        w.scope = f"{scope}.{letter}_norm"
        eps = float(node.get(f"{letter}_norm_epsilon", both))
        made.append(w.call(hetcomp.rms_norm.default, x, w.parameter(node.inputs[index]), eps, 0.0))
    w.scope = scope
    return made[0], made[1]


def _table(w: Writer, node: Node) -> tuple[RopeFrequencies, int]:
    """Frequencies of the caches of cosines and sines, and the width that they rotate."""
    cos, sin = (w.run.values[v] for v in node.inputs[7:9])
    if cos.is_meta or cos.shape != sin.shape or cos.ndim != 2:
        raise NotComputable("has tables of cosines and sines that are not known")
    key = (node.inputs[7], node.inputs[8])
    if key not in w.fitted:
        constants = [t for t in w.run.values.values() if not t.is_meta and t.numel() == cos.shape[1]]
        # The angles of a rounded table say more the farther they are apart.
        rows = len(cos) if rounding_of(cos) else _FITTED_ROWS
        table = fit(cos[:rows], sin[:rows], 0, constants)
        table.check(cos[-_FITTED_ROWS:], sin[-_FITTED_ROWS:], max(0, len(cos) - _FITTED_ROWS))
        w.fitted[key] = table
    return w.fitted[key], 2 * int(cos.shape[1])


# ---------------------------------------------------------------- quantised weights


def packed_parameter(w: Writer, packed: Packed) -> Parameter:
    """A quantised weight. Raises NotComputable if what is stored for it does not fit together."""
    packed.described("", w.graph.initialisers)
    return w.parameters.of(Weight(packed.codes), packed.shape, w.scope, packed)


def _matmul_nbits(w: Writer, node: Node) -> fx.Node:
    refuse(node, weight_prepacked=(0,))
    shape = (int(node.attributes["N"]), int(node.attributes["K"]))
    names = node.inputs[1], node.inputs[2], node.input(3), node.input(4)
    packed = Packed(shape, int(node.get("bits", 4)), int(node.attributes["block_size"]), *names)
    weight = w.placeholder(packed_parameter(w, packed))
    return product_with_bias(w, node, weight, node.input(5))


def _gather_quantised(w: Writer, node: Node) -> fx.Node:
    data, bits = w.run.weights.get(node.inputs[0]), int(node.get("bits", 4))
    shape = w.run.shape(node.inputs[0])
    stored = None if data is None else w.graph.initialisers[data.name].dtype
    if data is None or len(shape) != 2 or stored != "U8" or node.inputs[1] not in w.nodes:
        raise NotComputable("is no table of bytes that tokens choose rows of, which is what hetcomp compiles")
    refuse(node, gather_axis=(0,), quantize_axis=(1, -1))
    names = data.name, node.inputs[2], node.input(3)
    packed = Packed((shape[0], shape[1] * 8 // bits), bits, int(node.get("block_size", 128)), *names)
    table = w.placeholder(packed_parameter(w, packed))
    w.embedding = w.call(aten.embedding.default, table, w.activation(node.inputs[1]))
    return w.embedding


HANDLERS: dict[str, Handler] = {
    "com.microsoft.GatherBlockQuantized": _gather_quantised,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "LayerNormalization": _layer_norm,
    "com.microsoft.SkipLayerNormalization": _skip_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm,
}
