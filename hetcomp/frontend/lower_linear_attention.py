"""Handlers of the causal convolution and the gated delta rule, with the states that they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend.lower import Lowering, Ref
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType


def _state(low: Lowering, layer: int, part: str, *sizes: int) -> str:
    """A state of its own for every op, also where a layer has several of a kind."""
    name, number = f"l{layer}.cache.{part}", 1
    while name in low.builder.values:
        number += 1
        name = f"l{layer}.cache.{part}.{number}"
    type_ = TensorType(DType.F32, ("slots", *sizes))
    return low.builder.add_value(Value(name, type_, ValueKind.STATE, fqn=name))


def _rows(low: Lowering, node: object, width: int) -> str | None:
    """The value of a tensor whose memory is a row of ``width`` a token."""
    ref = low.ref(node)
    return ref.value if ref and lay.is_row_major(ref.layout) and lay.width(ref.layout) == width else None


def _causal_conv(low: Lowering, node: fx.Node) -> Ref | None:
    weight, bias = node.args[1:3]
    layer, function = int(node.args[3]), str(node.args[4])  # type: ignore[arg-type]
    if low.parameter(weight) is None or (bias is not None and low.parameter(bias) is None):
        return None
    kernel = low.weight(weight)
    channels, _, width = (int(d) for d in low.builder.values[kernel].type.shape)
    x = _rows(low, node.args[0], channels)
    if x is None or width < 2:  # a convolution over the row alone has no state
        return None
    inputs = [x, kernel, _state(low, layer, "conv", width - 1, channels)]
    if bias is not None:
        inputs.append(low.weight(bias))
    out = low.result(node)
    attrs = ops.CausalConv(channels, width, function, bias is not None)  # type: ignore[arg-type]
    low.builder.emit(attrs, inputs, [out.value], module_path(node), "attn.conv")
    return out


def _gated_delta(low: Lowering, node: fx.Node) -> Ref | None:
    layer, k_heads, v_heads, k_dim, v_dim = (int(n) for n in node.args[5:10])  # type: ignore[arg-type]
    scale, l2_eps = (float(n) for n in node.args[10:12])  # type: ignore[arg-type]
    qkv = _rows(low, node.args[0], 2 * k_heads * k_dim + v_heads * v_dim)
    a, b = (_rows(low, n, v_heads) for n in node.args[1:3])
    if qkv is None or a is None or b is None or any(low.parameter(n) is None for n in node.args[3:5]):
        return None
    of_heads = [low.weight(n, (v_heads,)) for n in node.args[3:5]]
    state = _state(low, layer, "delta", v_heads, k_dim, v_dim)
    out = low.result(node)
    attrs = ops.GatedDelta(k_heads, v_heads, k_dim, v_dim, scale, l2_eps)
    low.builder.emit(attrs, [qkv, a, b, *of_heads, state], [out.value], module_path(node), "attn.delta")
    return out


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    "hetcomp.causal_conv": _causal_conv,
    "hetcomp.gated_delta": _gated_delta,
}
