"""Shapes of what onnxruntime's contrib ops and hetcomp's own make, which are not tried on numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.linear_attention_op import (
    CAUSAL_CONV,
    LINEAR_ATTENTION,
    causal_conv_shapes,
    linear_attention_shapes,
)
from hetcomp.frontend.onnx.not_computable import NotComputable

Maybe = Tensor | None


def _matmul_nbits(node: Node, x: Tensor, *rest: Maybe) -> Tensor:
    if x.shape[-1] != int(node.attributes["K"]):
        raise NotComputable(f"multiplies rows of {x.shape[-1]} with a matrix of K={node.attributes['K']}")
    return x.new_empty((*x.shape[:-1], int(node.attributes["N"])))


def _gather(node: Node, data: Tensor, index: Tensor, scales: Tensor, zeros: Maybe = None) -> Tensor:
    width = data.shape[1] * 8 // int(node.get("bits", 4))
    return scales.new_empty((*index.shape, width), device="meta")


def _attention(
    node: Node, q: Tensor, k: Maybe, v: Maybe, past_k: Maybe, past_v: Maybe, *rest: Maybe
) -> tuple[Tensor, ...]:
    heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
    if q.ndim != 3:
        raise NotComputable(f"has queries of shape {list(q.shape)}; expected [batch, tokens, heads * head_dim]")
    rows = heads if k is not None else heads + 2 * kv_heads
    dim = q.shape[-1] // rows
    seen = q.shape[1] + (0 if past_k is None else past_k.shape[2])
    cache = q.new_empty((q.shape[0], kv_heads, seen, dim))
    return q.new_empty((*q.shape[:2], heads * dim)), cache, cache


def _skip_norm(node: Node, x: Tensor, skip: Tensor, *rest: Maybe) -> tuple[Maybe, ...]:
    return x, None, None, x


def _same(node: Node, x: Tensor, *rest: Maybe) -> Tensor:
    return x


# ---------------------------------------------------------------- of graphs that hetcomp exported


def _rope_table(node: Node, positions: Tensor) -> tuple[Tensor, ...]:
    made = positions.new_empty((*positions.shape, int(node.attributes["width"])), dtype=torch.float32, device="meta")
    return made, made


def _kv_append(node: Node, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return k, v


def _rows_of_heads(node: Node, q: Tensor, k: Tensor, v: Tensor, *rest: Maybe) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _latent_attention(node: Node, q: Tensor, *rest: Maybe) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], int(node.attributes["v_dim"])))


def _gated_delta(node: Node, qkv: Tensor, *rest: Maybe) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], int(node.attributes["v_heads"]), int(node.attributes["v_dim"])))


def _route(node: Node, logits: Tensor, bias: Maybe = None) -> tuple[Tensor, ...]:
    shape = (logits.shape[:-1].numel(), int(node.attributes["top_k"]))
    return logits.new_empty(shape, dtype=torch.int64, device="meta"), logits.new_empty(shape, device="meta")


SHAPES: dict[str, Callable[..., Tensor | tuple[Maybe, ...]]] = {
    **dict.fromkeys(CAUSAL_CONV, causal_conv_shapes),
    **dict.fromkeys(LINEAR_ATTENTION, linear_attention_shapes),
    "RotaryEmbedding": _same,
    "com.microsoft.RotaryEmbedding": _same,
    "com.microsoft.GatherBlockQuantized": _gather,
    "com.microsoft.GroupQueryAttention": _attention,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.MoE": _same,
    "com.microsoft.QMoE": _same,
    "com.microsoft.SkipLayerNormalization": _skip_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm,
    "hetcomp.Attention": _rows_of_heads,
    "hetcomp.CausalConv": _same,
    "hetcomp.GatedDelta": _gated_delta,
    "hetcomp.KvAppend": _kv_append,
    "hetcomp.MlaAttention": _latent_attention,
    "hetcomp.MoeExperts": _same,
    "hetcomp.RmsNorm": _same,
    "hetcomp.Rope": _same,
    "hetcomp.RopeTable": _rope_table,
    "hetcomp.Route": _route,
}
