"""ONNX's Attention in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.not_computable import NotComputable

Maybe = Tensor | None


def attention(
    node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Maybe = None, past_k: Maybe = None, past_v: Maybe = None
) -> tuple[Tensor, ...]:
    """Of opset 23, on q [B, H, T, D] and k, v [B, kv_heads, T, D]; also what it leaves of keys and values."""
    if q.ndim != 4 or node.get("softcap", 0.0) or node.get("qk_matmul_output_mode", 0):
        raise NotComputable("has queries that are not [batch, heads, tokens, head_dim], or caps scores")
    keys, values = (new if old is None else torch.cat([old, new], 2) for new, old in ((k, past_k), (v, past_v)))
    group = q.shape[1] // keys.shape[1]
    scores = q @ keys.repeat_interleave(group, 1).mT * (node.get("scale", 0.0) or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if node.get("is_causal", 0):
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ values.repeat_interleave(group, 1), keys, values
