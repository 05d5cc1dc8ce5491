"""Handlers of norms that the Plan has a kind for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend.lower import Lowering, Ref
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir import ops


def _rms_norm(low: Lowering, node: fx.Node) -> Ref | None:
    x = low.ref(node.args[0])
    if x is None or low.parameter(node.args[1]) is None:
        return None
    weight = low.weight(node.args[1])
    width = int(low.builder.values[weight].type.shape[0])
    last = x.layout[-1]
    if last.size != width or (width > 1 and last.stride != 1):
        return None
    shape = low.builder.values[x.value].type.shape
    out = Ref(low.builder.act(shape), x.layout)
    eps, offset = (float(a) for a in node.args[2:4])  # type: ignore[arg-type]
    attrs = ops.RmsNorm(width, eps, lay.width(x.layout) // width, offset)
    low.builder.emit(attrs, [x.value, weight], [out.value], module_path(node))
    return out


def _layer_norm(low: Lowering, node: fx.Node) -> Ref | None:
    x, shape = low.ref(node.args[0]), node.args[1]
    weight, bias, eps = (
        node.args[i] if len(node.args) > i else node.kwargs.get(name, default)
        for i, name, default in ((2, "weight", None), (3, "bias", None), (4, "eps", 1e-5))
    )
    if x is None or not lay.is_row_major(x.layout) or shape != [lay.width(x.layout)]:
        return None
    if low.parameter(weight) is None or low.parameter(bias) is None:
        return None
    out = low.result(node)
    attrs = ops.LayerNorm(lay.width(x.layout), float(eps))  # type: ignore[arg-type]
    low.builder.emit(attrs, [x.value, low.weight(weight), low.weight(bias)], [out.value], module_path(node))
    return out


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    "aten.layer_norm": _layer_norm,
    "hetcomp.rms_norm": _rms_norm,
}
