"""The ``hetcomp::`` ops that a trace shows in place of what hooks.py replaces.

They exist for torch.export only: schemas and shapes, no computation. Tensors keep torch's shapes, a batch
dimension of 1 included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor",
    "rope_table": "(Tensor positions, int table, int width) -> (Tensor, Tensor)",
    "rope": "(Tensor x, Tensor cos, Tensor sin, int rotary_dim, str style, int heads_axis) -> Tensor",
    # Returns the caches after the write, as attention reads them; ``context`` is their length.
    "kv_append": "(Tensor k, Tensor v, int layer, int context) -> (Tensor, Tensor)",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, int window, "
    "float softcap) -> Tensor",
    "mla_attention": "(Tensor q, Tensor latent, Tensor k_rot, Tensor kv_b, int layer, float scale, "
    "int nope_dim, int v_dim, float softcap) -> Tensor",
    # Their states are the layer's: what the step's rows of a slot continue from.
    "causal_conv": "(Tensor x, Tensor weight, Tensor? bias, int layer, str function) -> Tensor",
    "gated_delta": "(Tensor qkv, Tensor a, Tensor b, Tensor a_log, Tensor dt_bias, int layer, int k_heads, "
    "int v_heads, int k_dim, int v_dim, float scale, float l2_eps) -> Tensor",
    # Fields as those of ir.ops.Route; ids and weights [tokens, top_k].
    "route": "(Tensor logits, Tensor? bias, int top_k, str scoring, bool normalise, float norm_eps, int groups, "
    "int top_groups, str group_score, str outside_groups, float scaling, float jitter) -> (Tensor, Tensor)",
    "moe_experts": "(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str function, float alpha, float limit, bool transposed, "
    "bool interleaved) -> Tensor",
}


def _rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    return torch.empty_like(x)


def _rope_table(positions: Tensor, table: int, width: int) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, width)
    return (
        positions.new_empty(shape, dtype=torch.float32),
        positions.new_empty(shape, dtype=torch.float32),
    )


def _rope(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, style: str, heads_axis: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kv_append(k: Tensor, v: Tensor, layer: int, context: int) -> tuple[Tensor, Tensor]:
    return (
        k.new_empty((k.shape[0], k.shape[1], context, k.shape[3])),
        v.new_empty((v.shape[0], v.shape[1], context, v.shape[3])),
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _mla_attention(
    q: Tensor,
    latent: Tensor,
    k_rot: Tensor,
    kv_b: Tensor,
    layer: int,
    scale: float,
    nope_dim: int,
    v_dim: int,
    softcap: float,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v_dim))


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, function: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gated_delta(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    layer: int,
    k_heads: int,
    v_heads: int,
    k_dim: int,
    v_dim: int,
    scale: float,
    l2_eps: float,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], v_heads, v_dim))


def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: bool,
    norm_eps: float,
    groups: int,
    top_groups: int,
    group_score: str,
    outside_groups: str,
    scaling: float,
    jitter: float,
) -> tuple[Tensor, Tensor]:
    rows = logits.flatten(0, -2).shape[0]
    return logits.new_empty((rows, top_k), dtype=torch.int64), logits.new_empty((rows, top_k))


def _moe_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    function: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
) -> Tensor:
    return torch.empty_like(x)


_FAKES: dict[str, Callable[..., object]] = {
    "rms_norm": _rms_norm,
    "rope_table": _rope_table,
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "mla_attention": _mla_attention,
    "causal_conv": _causal_conv,
    "gated_delta": _gated_delta,
    "route": _route,
    "moe_experts": _moe_experts,
}

_library = torch.library.Library("hetcomp", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hetcomp::{_name}", _FAKES[_name], lib=_library)
