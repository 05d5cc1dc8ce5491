"""What each node of a trace becomes in an exported ONNX graph: ops of ONNX's own, and hetcomp's in its domain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import fx

from hetcomp.errors import HetcompError
from hetcomp.frontend.traced_model import module_path

if TYPE_CHECKING:
    from hetcomp.frontend.onnx.export_graph import GraphExport

_Handler = Callable[["GraphExport", fx.Node], "list[str] | str"]


def shape_of(node: fx.Node) -> list[int]:
    """The shape of a node's tensor, -1 for the tokens."""
    return [d if isinstance(d, int) else -1 for d in node.meta["val"].shape]


def _view(g: GraphExport, node: fx.Node) -> str:
    return g.add(node, "Reshape", [g.value(node.args[0]), g.integers(shape_of(node))])


def _same(g: GraphExport, node: fx.Node) -> str:
    return g.value(node.args[0])


def _transpose(g: GraphExport, node: fx.Node) -> str:
    order = list(range(len(shape_of(node))))
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return g.add(node, "Transpose", [g.value(node.args[0])], perm=order)


def _permute(g: GraphExport, node: fx.Node) -> str:
    order = [int(i) % len(node.args[1]) for i in node.args[1]]  # type: ignore[union-attr, arg-type]
    return g.add(node, "Transpose", [g.value(node.args[0])], perm=order)


def _embedding(g: GraphExport, node: fx.Node) -> str:
    return g.add(node, "Gather", [g.value(node.args[0]), g.value(node.args[1])])


def _linear(g: GraphExport, node: fx.Node) -> str:
    x, weight = g.value(node.args[0]), g.value(node.args[1])
    turned = g.add(node, "Transpose", [weight], perm=[1, 0])
    made = g.add(node, "MatMul", [x, turned])
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return made if bias is None else g.add(node, "Add", [made, g.value(bias)])


def _binary(op: str) -> _Handler:
    def handler(g: GraphExport, node: fx.Node) -> str:
        if node.kwargs.get("alpha", 1) != 1:
            raise HetcompError(f"{module_path(node)}: {node.target} with a factor is not exported")
        return g.add(node, op, [g.value(a) if isinstance(a, fx.Node) else g.number(a) for a in node.args[:2]])

    return handler


def _unary(op: str) -> _Handler:
    return lambda g, node: g.add(node, op, [g.value(node.args[0])])


def _silu(g: GraphExport, node: fx.Node) -> str:
    x = g.value(node.args[0])
    return g.add(node, "Mul", [x, g.add(node, "Sigmoid", [x])])


def _gelu(g: GraphExport, node: fx.Node) -> str:
    approximate = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate", "none")
    return g.add(node, "Gelu", [g.value(node.args[0])], approximate=approximate)


def _slice(g: GraphExport, node: fx.Node) -> str:
    start, stop = (node.args[i] if len(node.args) > i else None for i in (2, 3))
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    step = int(node.args[4]) if len(node.args) > 4 else 1  # type: ignore[arg-type]
    if not isinstance(start or 0, int) or not isinstance(stop or 0, int):
        raise HetcompError(f"{module_path(node)}: {node.target} at a number of tokens is not exported")
    end = (1 << 62) if stop is None else stop
    bounds = [g.integers([int(n)]) for n in (start or 0, end, axis, step)]  # type: ignore[arg-type]
    return g.add(node, "Slice", [g.value(node.args[0]), *bounds])


def _cat(g: GraphExport, node: fx.Node) -> str:
    axis = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    return g.add(node, "Concat", [g.value(n) for n in node.args[0]], axis=axis)  # type: ignore[union-attr]


def _split(g: GraphExport, node: fx.Node) -> list[str]:
    axis = int(node.args[2]) if len(node.args) > 2 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    return g.add_several(node, "Split", [g.value(node.args[0]), g.integers(sizes)], len(sizes), axis=axis)


def _layer_norm(g: GraphExport, node: fx.Node) -> str:
    weight, bias = (node.args[i] if len(node.args) > i else node.kwargs.get(n) for i, n in ((2, "weight"), (3, "bias")))
    eps = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
    if weight is None:
        raise HetcompError(f"{module_path(node)}: a layer norm without weights is not exported")
    inputs = [g.value(node.args[0]), g.value(weight), *([g.value(bias)] if bias is not None else [])]
    return g.add(node, "LayerNormalization", inputs, axis=-1, epsilon=eps)


# ---------------------------------------------------------------- hetcomp's own


def _rms_norm(g: GraphExport, node: fx.Node) -> str:
    x, weight = g.value(node.args[0]), g.value(node.args[1])
    return g.add(node, "hetcomp.RmsNorm", [x, weight], eps=node.args[2], weight_offset=node.args[3])


def _rope_table(g: GraphExport, node: fx.Node) -> list[str]:
    table = g.traced.rope_tables[int(node.args[1])]  # type: ignore[arg-type]
    attributes = {"inv_freq": list(table.inv_freq), "scaling": table.scaling, "width": table.width}
    return g.add_several(node, "hetcomp.RopeTable", [g.value(node.args[0])], 2, **attributes)


def _rope(g: GraphExport, node: fx.Node) -> str:
    inputs = [g.value(a) for a in node.args[:3]]
    rotary_dim, style = node.args[3:5]
    return g.add(node, "hetcomp.Rope", inputs, rotary_dim=rotary_dim, style=style, head_dim=shape_of(node)[-1])


def _kv_append(g: GraphExport, node: fx.Node) -> list[str]:
    return g.add_several(node, "hetcomp.KvAppend", [g.value(a) for a in node.args[:2]], 2)


def _attention(g: GraphExport, node: fx.Node) -> str:
    inputs = [g.value(a) for a in node.args[:4] if a is not None]
    scale, window, softcap = node.args[5:8]
    return g.add(node, "hetcomp.Attention", inputs, scale=scale, window=window, softcap=softcap)


def _mla_attention(g: GraphExport, node: fx.Node) -> str:
    inputs = [g.value(a) for a in node.args[:4]]
    names = ("scale", "nope_dim", "v_dim", "softcap")
    return g.add(node, "hetcomp.MlaAttention", inputs, **dict(zip(names, node.args[5:9], strict=True)))


def _causal_conv(g: GraphExport, node: fx.Node) -> str:
    inputs = [g.value(a) for a in node.args[:3] if a is not None]
    return g.add(node, "hetcomp.CausalConv", inputs, function=node.args[4])


def _gated_delta(g: GraphExport, node: fx.Node) -> str:
    inputs = [g.value(a) for a in node.args[:5]]
    names = ("k_heads", "v_heads", "k_dim", "v_dim", "scale", "l2_eps")
    return g.add(node, "hetcomp.GatedDelta", inputs, **dict(zip(names, node.args[6:12], strict=True)))


def _moe_experts(g: GraphExport, node: fx.Node) -> str:
    router = g.routers.get(node)
    if router is None:
        raise HetcompError(f"{module_path(node)}: its router computes something that hetcomp has no op for")
    inputs = [g.value(router.logits)] + ([g.value(router.bias)] if router.bias is not None else [])
    fields = {k: v for k, v in asdict(router.route).items() if k not in ("experts", "bias", "kind")}
    ids, weights = g.add_several(router.logits, "hetcomp.Route", inputs, 2, **fields)
    operands = [g.value(node.args[0]), ids, weights, *(g.value(a) for a in node.args[3:7] if a is not None)]
    names = ("function", "alpha", "limit", "transposed", "interleaved")
    given = dict(zip(names, node.args[7:12], strict=True))
    return g.add(node, "hetcomp.MoeExperts", operands, **given)


def _getitem(g: GraphExport, node: fx.Node) -> str:
    return g.results[node.args[0]][node.args[1]]  # type: ignore[index]


HANDLERS: dict[str, _Handler] = {
    "aten.view": _view,
    "aten.reshape": _view,
    "aten._unsafe_view": _view,
    "aten.flatten": _view,
    "aten.unflatten": _view,
    "aten.unsqueeze": _view,
    "aten.squeeze": _view,
    "aten.contiguous": _same,
    "aten.clone": _same,
    "aten.transpose": _transpose,
    "aten.permute": _permute,
    "aten.embedding": _embedding,
    "aten.linear": _linear,
    "aten.layer_norm": _layer_norm,
    "aten.add": _binary("Add"),
    "aten.sub": _binary("Sub"),
    "aten.mul": _binary("Mul"),
    "aten.div": _binary("Div"),
    "aten.silu": _silu,
    "aten.gelu": _gelu,
    "aten.relu": _unary("Relu"),
    "aten.sigmoid": _unary("Sigmoid"),
    "aten.tanh": _unary("Tanh"),
    "aten.slice": _slice,
    "aten.cat": _cat,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.chunk": _split,
    "hetcomp.rms_norm": _rms_norm,
    "hetcomp.rope_table": _rope_table,
    "hetcomp.rope": _rope,
    "hetcomp.kv_append": _kv_append,
    "hetcomp.attention": _attention,
    "hetcomp.causal_conv": _causal_conv,
    "hetcomp.gated_delta": _gated_delta,
    "hetcomp.mla_attention": _mla_attention,
    "hetcomp.moe_experts": _moe_experts,
}


def handler_of(node: fx.Node) -> _Handler | None:
    """Of a node that calls something; None if it is not exported."""
    if node.target is operator.getitem:
        return _getitem
    return HANDLERS.get(".".join(str(node.target).split(".")[:2]))
