"""Handlers of causal convolutions and the gated delta rule, whose states the op itself reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend.lower import Lowering, Ref
from hetcomp.frontend.trace import module_path
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, Shape, TensorType


def _state(low: Lowering, layer: int, part: str, shape: Shape) -> str:
    """A state of its own for every op, also where a layer has several of a kind."""
    name, number = f"l{layer}.state.{part}", 1
    while name in low.builder.values:
        number += 1
        name = f"l{layer}.state.{part}.{number}"
    value = Value(name, TensorType(DType.F32, ("slots", *shape)), ValueKind.STATE, fqn=name)
    return low.builder.add_value(value)


def _rows(low: Lowering, node: object) -> Ref | None:
    """The tensor behind ``node`` if it lies a row a token."""
    ref = low.ref(node)
    return ref if ref is not None and lay.is_row_major(ref.layout) else None


def _causal_conv(low: Lowering, node: fx.Node) -> Ref | None:
    x, bias = _rows(low, node.args[0]), node.args[2]
    if x is None:
        return None
    weight = low.weight(node.args[1])
    channels, _, width = (int(d) for d in low.builder.values[weight].type.shape)
    attrs = ops.CausalConv(channels, width, str(node.args[4]), bias is not None)  # type: ignore[arg-type]
    state = _state(low, int(node.args[3]), "conv", (width - 1, channels))  # type: ignore[arg-type]
    inputs = [x.value, weight, state] + ([low.weight(bias)] if bias is not None else [])
    out = low.result(node)
    low.builder.emit(attrs, inputs, [out.value], module_path(node), "attn.conv")
    return out


def _gated_delta(low: Lowering, node: fx.Node) -> Ref | None:
    rows = [_rows(low, n) for n in node.args[:3]]
    if any(r is None for r in rows):
        return None
    k_heads, v_heads, k_dim, v_dim = (int(a) for a in node.args[6:10])  # type: ignore[arg-type]
    scale, l2_eps = (float(a) for a in node.args[10:12])  # type: ignore[arg-type]
    weights = [low.weight(n, (v_heads,)) for n in node.args[3:5]]
    state = _state(low, int(node.args[5]), "delta", (v_heads, k_dim, v_dim))  # type: ignore[arg-type]
    out = low.result(node)
    attrs = ops.GatedDelta(k_heads, v_heads, k_dim, v_dim, scale, l2_eps)
    inputs = [*(r.value for r in rows if r), *weights, state]
    low.builder.emit(attrs, inputs, [out.value], module_path(node), "attn.core")
    return out


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    "hetcomp.causal_conv": _causal_conv,
    "hetcomp.gated_delta": _gated_delta,
}
