"""What causal convolutions and the gated delta rule become: onnxruntime's and ONNX's ops, and hetcomp's own."""

from __future__ import annotations

import torch
from torch import fx

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.linear_attention_op import CAUSAL_CONV, check_state
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.to_fx import Handler, Writer
from hetcomp.frontend.plan_builder import layer_of

aten = torch.ops.aten
hetcomp = torch.ops.hetcomp
_FUNCTIONS = {"silu": "silu", "swish": "silu", "none": "none"}


def _causal_conv_with_state(w: Writer, node: Node) -> fx.Node:
    check_state(node.input(3), w.graph, w.producers, w.run.values)
    kind = str(node.get("activation", "none"))
    if kind not in _FUNCTIONS:
        raise NotComputable(f"has activation={kind}; hetcomp compiles {', '.join(_FUNCTIONS)}")
    x = w.activation(node.inputs[0])
    if not node.get("channels_last", 0):
        x = w.call(aten.permute.default, x, [0, 2, 1])
    made = _convolved(w, x, node.inputs[1], node.input(2), _FUNCTIONS[kind])
    return made if node.get("channels_last", 0) else w.call(aten.permute.default, made, [0, 2, 1])


def _causal_conv(w: Writer, node: Node) -> fx.Node:
    x = w.activation(node.inputs[0])
    return _convolved(w, x, node.inputs[1], node.input(2), str(node.attributes["function"]))


def _convolved(w: Writer, x: fx.Node, weight: str, bias: str, function: str) -> fx.Node:
    given = w.parameter(weight), w.parameter(bias) if bias else None
    # A layer may have a convolution and nothing that counts it.
    layer = layer_of(w.scope)
    return w.call(hetcomp.causal_conv.default, x, *given, w.layer() if layer is None else layer, function)


def _gated_delta(w: Writer, node: Node) -> fx.Node:
    """Queries, keys and values come in one, or one after the other."""
    a = node.attributes
    *rows, of_decay, of_rate = (w.activation(v) for v in node.inputs[:-2])
    if len(rows) > 1:
        widths = [w.run.values[v].numel() // w.run.tokens for v in node.inputs[: len(rows)]]
        flat = [w.view(x, (1, w.run.tokens, width)) for x, width in zip(rows, widths, strict=True)]
        rows = [w.call(aten.cat.default, flat, -1)]
    a_log = w.placeholder(w.known_parameter(node.inputs[-2], log_of=int(a.get("a_log_of", 0))))
    gates = of_decay, of_rate, a_log, w.parameter(node.inputs[-1])
    sizes = [int(a[name]) for name in ("k_heads", "v_heads", "k_dim", "v_dim")]
    numbers = float(a["scale"]), float(a["l2_eps"])
    made = w.call(hetcomp.gated_delta.default, *rows, *gates, w.layer(), *sizes, *numbers)
    w.layers_done += 1
    return w.view(made, w.run.shape(node.outputs[0]))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(CAUSAL_CONV, _causal_conv_with_state),
    "hetcomp.CausalConv": _causal_conv,
    "hetcomp.GatedDelta": _gated_delta,
}
