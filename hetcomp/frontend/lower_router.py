"""Handler of routers that come as one op, out of an exported ONNX graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend.lower import Lowering, Ref, Several
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir import ops
from hetcomp.ir.types import DType


def _route(low: Lowering, node: fx.Node) -> Several | None:
    logits, bias = low.ref(node.args[0]), node.args[1]
    if logits is None or not lay.is_row_major(logits.layout):
        return None
    top_k, scoring, normalise, norm_eps, groups, top_groups, group_score, outside, scaling, jitter = node.args[2:]
    attrs = ops.Route(
        experts=lay.width(logits.layout),
        top_k=int(top_k),  # type: ignore[arg-type]
        scoring=str(scoring),  # type: ignore[arg-type]
        normalise=bool(normalise),
        norm_eps=float(norm_eps),  # type: ignore[arg-type]
        groups=int(groups),  # type: ignore[arg-type]
        top_groups=int(top_groups),  # type: ignore[arg-type]
        group_score=str(group_score),  # type: ignore[arg-type]
        outside_groups=str(outside),  # type: ignore[arg-type]
        scaling=float(scaling),  # type: ignore[arg-type]
        bias=bias is not None,
        jitter=float(jitter),  # type: ignore[arg-type]
    )
    inputs = [logits.value] + ([low.weight(bias)] if bias is not None else [])
    outs = [low.builder.act((lay.ROWS, attrs.top_k), dtype) for dtype in (DType.I32, DType.F32)]
    low.builder.emit(attrs, inputs, outs, module_path(node), "moe.route")
    made = lay.natural((lay.ROWS, attrs.top_k))
    assert made is not None
    return Several(tuple(Ref(out, made) for out in outs))


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {"hetcomp.route": _route}
