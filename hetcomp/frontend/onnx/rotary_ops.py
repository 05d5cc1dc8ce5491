"""RotaryEmbedding, of ONNX's opset 23 and of onnxruntime, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.not_computable import NotComputable

Maybe = Tensor | None


def rotary(node: Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Maybe = None) -> Tensor:
    """ONNX's RotaryEmbedding of opset 23: x [B, H, T, D], or [B, T, H * D] with num_heads; caches [rows, D / 2]."""
    flat = x.ndim == 3
    if flat:
        x = x.reshape(*x.shape[:2], int(node.get("num_heads", 0)), -1).transpose(1, 2)
    if positions is not None:
        cos, sin = (table[positions.reshape(-1).long()].unsqueeze(0) for table in (cos, sin))
    width = int(node.get("rotary_embedding_dim", 0)) or x.shape[-1]
    cos, sin = (table[..., : width // 2].unsqueeze(1) for table in (cos, sin))
    turned, rest = x[..., :width], x[..., width:]
    if node.get("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        made = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    made = torch.cat([made, rest], -1)
    return made.transpose(1, 2).flatten(-2) if flat else made


def microsoft_rotary(node: Node, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The contrib op: positions come first, as one number for all that follow or as all of them."""
    tokens = x.shape[-2]
    if positions.numel() == 1:
        positions = positions.reshape(-1) + torch.arange(tokens)
    heads = int(node.get("num_heads", 0))
    if x.ndim == 3 and not heads:
        heads = x.shape[-1] // (2 * cos.shape[-1])
    attributes = {**node.attributes, "num_heads": heads}
    if node.get("scale", 1.0) != 1.0 or node.get("is_packed_batching", 0):
        raise NotComputable("scales or packs, which hetcomp does not know")
    return rotary(Node(node.name, node.op, node.inputs, node.outputs, attributes), x, cos, sin, positions)
