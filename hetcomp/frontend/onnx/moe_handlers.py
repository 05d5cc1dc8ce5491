"""What onnxruntime's MoE and QMoE become (onnxruntime's docs/ContribOperators.md)."""

from __future__ import annotations

import math

import torch
from torch import fx

from hetcomp.frontend.onnx.contrib_handlers import packed_parameter, refuse, refuse_inputs
from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.packed_weights import Packed
from hetcomp.frontend.onnx.parameters import Parameter
from hetcomp.frontend.onnx.to_fx import Handler, Writer

aten = torch.ops.aten
hetcomp = torch.ops.hetcomp
# Of a sparse mixer, which has no attribute for it: what Phi-MoE's models have.
_JITTER = 0.01
# By activation_type what is between FC1 and the product with FC3; onnxruntime's gelu is the one by tanh.
_GATES = {"silu": "silu", "gelu": "gelu_tanh", "relu": "relu"}


def _moe(w: Writer, node: Node) -> fx.Node:
    weights = [w.known_parameter(node.inputs[index]) for index in (2, 4)]
    third = w.known_parameter(node.inputs[6]) if node.input(6) else None
    return _experts(w, node, weights, third, (node.input(3), node.input(5), node.input(7)))


def _qmoe(w: Writer, node: Node) -> fx.Node:
    refuse(node, quant_type=("int",), weights_prepacked=(-1, 0))
    refuse_inputs(node, router_weights=14)
    if node.get("weights_prepacked", -1) == -1 and w.prepacked_for:
        raise NotComputable(
            f"has weights in an order of {w.prepacked_for}'s own, as genai_config.json says; export the model for cpu"
        )
    weights = [_packed(w, node, 1, 2, 11), _packed(w, node, 2, 5, 12)]
    third = _packed(w, node, 3, 8, 13) if node.input(8) else None
    return _experts(w, node, weights, third, (node.input(4), node.input(7), node.input(10)))


def _packed(w: Writer, node: Node, number: int, codes: int, zeros: int) -> Parameter:
    """The weights FC<number>, whose codes and zero points are these operands; scales stand behind codes."""
    bits = int(node.get(f"fc{number}_expert_weight_bits", node.get("expert_weight_bits", 4)))
    shape = w.run.shape(node.inputs[codes])
    columns = shape[-1] * 8 // bits if number == 2 else w.run.shape(node.inputs[0])[-1]
    block = int(node.get("block_size", 0)) or columns
    names = node.inputs[codes], node.inputs[codes + 1], node.input(zeros)
    return packed_parameter(w, Packed((*shape[:2], columns), bits, block, *names))


def _experts(
    w: Writer, node: Node, weights: list[Parameter], third: Parameter | None, biases: tuple[str, str, str]
) -> fx.Node:
    refuse(node, swiglu_limit_after_activation=(0,))
    function, alpha, limit = _activation(node, third is not None)
    first, down = weights
    if third is not None and first.shape != third.shape:
        raise NotComputable(f"has FC1 of shape {list(first.shape)} and FC3 of {list(third.shape)}; expected the same")
    up = first if third is None else w.parameters.pair(first, third)
    if len(up.shape) != 3 or len(down.shape) != 3 or (up.shape[0], up.shape[1]) != (down.shape[0], 2 * down.shape[2]):
        raise NotComputable(
            f"has projections of shapes {list(up.shape)} and {list(down.shape)}, which do not fit together"
        )
    given = _biases(w, biases, third is not None)
    scope = w.scope
    ids, chosen = _routed(w, node)
    # A module of its own, so that what is beside it in the layer is not taken for a part of the experts.
    w.scope = f"{scope}.experts"
    x = w.activation(node.inputs[0])
    interleaved = int(node.get("swiglu_fusion", 0)) == 1
    operands = x, ids, chosen, w.placeholder(up), w.placeholder(down), *given
    return w.call(hetcomp.moe_experts.default, *operands, function, alpha, limit, False, interleaved)


def _biases(w: Writer, names: tuple[str, str, str], apart: bool) -> list[fx.Node | None]:
    """Those of gate and up in one, and of down. ``apart``: FC3 has one of its own."""
    first, down, third = names
    if not bool(first) == bool(down) or bool(third) != (apart and bool(first)):
        raise NotComputable("has biases of some projections only, which hetcomp does not compile")
    if not first:
        return [None, None]
    up = w.known_parameter(first)
    if apart:
        up = w.parameters.pair(up, w.known_parameter(third))
    return [w.placeholder(up), w.parameter(down)]


def _activation(node: Node, apart: bool) -> tuple[str, float, float]:
    """(function, alpha, limit) as ir.ops.MoeExperts has them. ``apart``: gate and up are FC1 and FC3."""
    kind = str(node.get("activation_type", "relu"))
    if apart and kind in _GATES:
        return _GATES[kind], 0.0, 0.0
    refuse(node, activation_type=("swiglu", *_GATES) if apart else ("swiglu",))
    if kind != "swiglu" or (not apart and not node.get("swiglu_fusion", 0)):
        raise NotComputable("has experts without a gate, which hetcomp does not compile")
    refuse(node, swiglu_fusion=(0,) if apart else (1, 2))
    alpha, beta = (float(node.get(f"activation_{n}", d)) for n, d in (("alpha", 1.0), ("beta", 0.0)))
    limit = float(node.get("swiglu_limit", math.inf))
    if (alpha, beta) == (1.0, 0.0) and math.isinf(limit):
        return "silu", 0.0, 0.0
    if beta == 1.0 and math.isfinite(limit):
        return "swiglu_oai", alpha, limit
    raise NotComputable(f"computes SwiGLU with alpha {alpha}, beta {beta} and limit {limit}, which hetcomp does not")


def _routed(w: Writer, node: Node) -> tuple[fx.Node, fx.Node]:
    """ids and weights [T, k]: a sparse mixer's, or softmax over all experts, of which the best k are taken."""
    logits, best = w.activation(node.inputs[1]), int(node.get("k", 1))
    flat = w.view(logits, (w.run.tokens, int(logits.meta["val"].shape[-1])))
    if node.get("use_sparse_mixer", 0):
        refuse(node, k=(2,), normalize_routing_weights=(0,))
        rest = (False, 0.0, 1, 1, "max", "never", 1.0, _JITTER)
        made = w.call(hetcomp.route.default, flat, None, best, "sparse_mixer", *rest)
        return w.take(made, 0), w.take(made, 1)
    scores = w.call(aten._softmax.default, flat, -1, False)
    chosen = w.call(aten.topk.default, scores, best, -1)
    weights = w.take(chosen, 0)
    if node.get("normalize_routing_weights", 0):
        total = w.call(aten.sum.dim_IntList, weights, [-1], True)
        weights = w.call(aten.div.Tensor, weights, total)
    return w.take(chosen, 1), weights


HANDLERS: dict[str, Handler] = {"com.microsoft.MoE": _moe, "com.microsoft.QMoE": _qmoe}
