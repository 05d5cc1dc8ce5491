"""Handlers of the nodes that the Plan has a kind for. A handler returns what the node became, or None to
leave it to an aten region."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend import lower_attention, lower_linear_attention, lower_norms, lower_router
from hetcomp.frontend.lower import Lowering, Ref, RowsOnly, Several, memory_shape
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir import ops
from hetcomp.ir.plan import WeightSource
from hetcomp.ir.types import DType


def _arg(node: fx.Node, index: int, name: str, default: object = None) -> Any:  # noqa: ANN401 - as torch has it
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


# ---------------------------------------------------------------- views


def _view(low: Lowering, node: fx.Node) -> Ref | None:
    source = low.ref(node.args[0])
    made = lay.view(source.layout, low.dims(node)) if source else None
    return Ref(source.value, made) if source and made else None


def _unsqueeze(low: Lowering, node: fx.Node) -> Ref | RowsOnly | None:
    return _rows_only(low, node) or _view(low, node)


def _rows_only(low: Lowering, node: fx.Node) -> RowsOnly | None:
    """Ids or positions with more axes in front, as where images would have positions of several kinds."""
    source, dims = low.bound.get(node.args[0]), low.dims(node)  # type: ignore[arg-type]
    return source if isinstance(source, RowsOnly) and dims[-1] == lay.ROWS else None


def _same(low: Lowering, node: fx.Node) -> Ref | None:
    return low.ref(node.args[0])


def _cast(low: Lowering, node: fx.Node) -> Ref | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return low.ref(source) if source.meta["val"].dtype == node.meta["val"].dtype else None


def _transpose(low: Lowering, node: fx.Node) -> Ref | None:
    source = low.ref(node.args[0])
    if source is None:
        return None
    order = list(range(len(source.layout)))
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return Ref(source.value, lay.permute(source.layout, order))


def _permute(low: Lowering, node: fx.Node) -> Ref | None:
    source = low.ref(node.args[0])
    return Ref(source.value, lay.permute(source.layout, node.args[1])) if source else None  # type: ignore[arg-type]


# ---------------------------------------------------------------- linear algebra, embedding


def _embedding(low: Lowering, node: fx.Node) -> Ref | None:
    ids = low.bound.get(node.args[1])  # type: ignore[arg-type]
    if not isinstance(ids, RowsOnly) or low.parameter(node.args[0]) is None:
        return None
    table = low.weight(node.args[0])
    vocab, width = low.builder.values[table].type.shape
    out = low.result(node)
    attrs = ops.Embed(int(vocab), int(width))
    low.builder.emit(attrs, [ids.value, table], [out.value], module_path(node), "embed")
    return out


def _linear(low: Lowering, node: fx.Node) -> Ref | None:
    if low.parameter(node.args[1]) is None:
        return None
    x, bias = low.ref(node.args[0]), _arg(node, 2, "bias")
    if x is None or not lay.is_row_major(x.layout) or (bias is not None and low.parameter(bias) is None):
        return None
    weight = low.weight(node.args[1])
    rows, columns = (int(d) for d in low.builder.values[weight].type.shape)
    if lay.width(x.layout) != columns:
        return None
    inputs = [x.value, weight] + ([low.weight(bias)] if bias is not None else [])
    out = low.result(node)
    attrs = ops.Linear(columns, rows, bias is not None)
    low.builder.emit(attrs, inputs, [out.value], module_path(node))
    return out


# ---------------------------------------------------------------- mixture of experts


def _moe_experts(low: Lowering, node: fx.Node) -> Ref | None:
    x = low.ref(node.args[0])
    if x is None or not lay.is_row_major(x.layout):
        return None
    routed = _routed(low, node)
    if routed is None:
        return None
    gate_up, down, gate_up_bias, down_bias = node.args[3:7]
    transposed, interleaved = bool(node.args[10]), bool(node.args[11])
    assert isinstance(gate_up, fx.Node) and isinstance(down, fx.Node)
    experts, hidden = int(gate_up.meta["val"].shape[0]), lay.width(x.layout)
    intermediate = int(down.meta["val"].shape[1 if transposed else 2])
    attrs = ops.MoeExperts(
        experts=experts,
        top_k=int(node.args[1].meta["val"].shape[-1]),  # type: ignore[union-attr]
        hidden=hidden,
        intermediate=intermediate,
        function=str(node.args[7]),  # type: ignore[arg-type]
        alpha=float(node.args[8]),  # type: ignore[arg-type]
        limit=float(node.args[9]),  # type: ignore[arg-type]
        bias=gate_up_bias is not None,
    )
    inputs = [
        x.value,
        *routed,
        low.weight(gate_up, (experts, 2 * intermediate, hidden), _view_of(transposed, interleaved)),
        low.weight(down, (experts, hidden, intermediate), _view_of(transposed, False)),
    ]
    if gate_up_bias is not None:
        inputs.append(low.weight(gate_up_bias, view=_view_of(False, interleaved)))
        inputs.append(low.weight(down_bias))
    out = low.result(node)
    low.builder.emit(attrs, inputs, [out.value], module_path(node), "moe.experts")
    return out


def _view_of(transposed: bool, interleaved: bool) -> WeightSource | None:
    if not transposed and not interleaved:
        return None
    return WeightSource("plain", (), transpose=transposed, deinterleave=interleaved)


def _routed(low: Lowering, node: fx.Node) -> list[str] | None:
    """Values of ids and weights: a route op, or a region of the router's own aten ops."""
    router = low.routers.get(node)
    if router is None:
        from hetcomp.frontend.aten_regions import emit_region

        wanted = [n for n in node.args[1:3] if isinstance(n, fx.Node)]
        emit_region(low, [n for n in wanted if n in low.pending], narrow_integers=True)
        refs = [low.ref(n) for n in wanted]
        if len(refs) != 2 or any(r is None or not lay.is_row_major(r.layout) for r in refs):
            return None
        return [r.value for r in refs if r]
    logits = low.ref(router.logits)
    if logits is None or not lay.is_row_major(logits.layout):
        return None
    inputs = [logits.value] + ([low.weight(router.bias)] if router.bias is not None else [])
    ids = low.builder.act((lay.ROWS, router.route.top_k), DType.I32)
    weights = low.builder.act((lay.ROWS, router.route.top_k))
    origin = module_path(router.logits)
    low.builder.emit(router.route, inputs, [ids, weights], origin, "moe.route")
    return [ids, weights]


# ---------------------------------------------------------------- elementwise


def _activation(function: str) -> Callable[[Lowering, fx.Node], Ref | None]:
    def handler(low: Lowering, node: fx.Node) -> Ref | None:
        x = low.ref(node.args[0])
        name = function
        if function == "gelu" and _arg(node, 1, "approximate", "none") == "tanh":
            name = "gelu_tanh"
        if x is None or low.builder.values[x.value].type.dtype is not DType.F32:
            return None
        out = Ref(low.builder.act(low.builder.values[x.value].type.shape), x.layout)
        attrs = ops.Activation(name)  # type: ignore[arg-type]
        low.builder.emit(attrs, [x.value], [out.value], module_path(node))
        return out

    return handler


def _pair(low: Lowering, node: fx.Node) -> tuple[Ref, Ref] | None:
    if low.parameter(node.args[0]) or low.parameter(node.args[1]):
        return None
    a, b = low.ref(node.args[0]), low.ref(node.args[1])
    if a is None or b is None:
        return None
    types = [low.builder.values[r.value].type.dtype for r in (a, b)]
    return (a, b) if types == [DType.F32, DType.F32] else None


def _add(low: Lowering, node: fx.Node) -> Ref | None:
    if not isinstance(node.args[1], fx.Node) or node.kwargs.get("alpha", 1) != 1:
        return None
    pair = _pair(low, node)
    if pair is None or pair[0].layout != pair[1].layout:
        return _add_batchless(low, node, pair)
    a, b = pair
    out = Ref(low.builder.act(low.builder.values[a.value].type.shape), a.layout)
    low.builder.emit(ops.Add(), [a.value, b.value], [out.value], module_path(node))
    return out


def _add_batchless(low: Lowering, node: fx.Node, pair: tuple[Ref, Ref] | None) -> Ref | None:
    """[T, n] + [1, T, n]: the same memory."""
    if pair is None or not all(lay.is_row_major(r.layout) for r in pair):
        return None
    a, b = pair
    if [x.size for x in lay.features(a.layout)] != [x.size for x in lay.features(b.layout)]:
        return None
    out = low.result(node)
    low.builder.emit(ops.Add(), [a.value, b.value], [out.value], module_path(node))
    return out


def _mul(low: Lowering, node: fx.Node) -> Ref | None:
    if isinstance(node.args[1], (int, float)):
        return _scaled(low, node, float(node.args[1]))
    pair = _pair(low, node) if isinstance(node.args[1], fx.Node) else None
    if pair is None or not all(lay.is_row_major(r.layout) for r in pair):
        return None
    a, b = sorted(pair, key=lambda r: -lay.width(r.layout))
    if lay.width(b.layout) not in (1, lay.width(a.layout)) or len(a.layout) != len(b.layout):
        return None
    if lay.width(b.layout) == lay.width(a.layout) and a.layout != b.layout:
        return None
    if lay.width(b.layout) == lay.width(a.layout):
        a, b = pair
    out = Ref(low.builder.act(low.builder.values[a.value].type.shape), a.layout)
    low.builder.emit(ops.Mul(), [a.value, b.value], [out.value], module_path(node))
    return out


def _div(low: Lowering, node: fx.Node) -> Ref | None:
    by = node.args[1]
    return _scaled(low, node, 1.0 / float(by)) if isinstance(by, (int, float)) and by else None


def _scaled(low: Lowering, node: fx.Node, factor: float) -> Ref | None:
    x = low.ref(node.args[0])
    if x is None or low.builder.values[x.value].type.dtype is not DType.F32:
        return None
    out = Ref(low.builder.act(low.builder.values[x.value].type.shape), x.layout)
    low.builder.emit(ops.Scale(factor), [x.value], [out.value], module_path(node))
    return out


# ---------------------------------------------------------------- cutting and joining rows


def _cut(low: Lowering, node: fx.Node, source: Ref, start: int, stop: int) -> Ref | None:
    """x[..., start:stop]: a copy."""
    if not lay.is_natural(lay.permute(source.layout, _rows_first(source.layout))):
        return None
    dims = list(memory_shape(source.layout))
    low.builder.retype(source.value, tuple(dims))
    dims[-1] = stop - start
    out = low.builder.act(tuple(dims))
    low.builder.emit(ops.Slice(start, stop), [source.value], [out], module_path(node))
    shape = list(lay.shape_of(source.layout))
    shape[-1] = stop - start
    made = lay.natural(tuple(shape))
    return Ref(out, made) if made else None


def _rows_first(layout: lay.Layout) -> list[int]:
    rows = [i for i, a in enumerate(layout) if a.kind == "rows"]
    return rows + [i for i, a in enumerate(layout) if a.kind != "rows"]


def _split_with_sizes(low: Lowering, node: fx.Node) -> Several | None:
    source = low.ref(node.args[0])
    sizes = node.args[1]
    dim = int(_arg(node, 2, "dim", 0))
    if source is None or dim % len(source.layout) != len(source.layout) - 1:
        return None
    if isinstance(sizes, int):
        whole = source.layout[-1].size
        sizes = [min(sizes, whole - i) for i in range(0, whole, sizes)]
    return _parts(low, node, source, [int(s) for s in sizes])  # type: ignore[union-attr, arg-type]


def _chunk(low: Lowering, node: fx.Node) -> Several | None:
    source = low.ref(node.args[0])
    count, dim = int(node.args[1]), int(_arg(node, 2, "dim", 0))  # type: ignore[arg-type]
    if source is None or dim % len(source.layout) != len(source.layout) - 1:
        return None
    whole = source.layout[-1].size
    each = -(-whole // count)
    return _parts(low, node, source, [min(each, whole - i) for i in range(0, whole, each)])


def _parts(low: Lowering, node: fx.Node, source: Ref, sizes: list[int]) -> Several | None:
    used = {u.args[1] for u in node.users if u.target is operator.getitem}
    parts: list[Ref | None] = []
    start = 0
    for index, size in enumerate(sizes):
        parts.append(_cut(low, node, source, start, start + size) if index in used else None)
        if index in used and parts[-1] is None:
            return None
        start += size
    return Several(tuple(parts))


def _slice(low: Lowering, node: fx.Node) -> Ref | RowsOnly | None:
    rows = _rows_only(low, node)
    if rows is not None:
        return rows
    source = low.ref(node.args[0])
    dim, step = int(_arg(node, 1, "dim", 0)), int(_arg(node, 4, "step", 1))
    if source is None or step != 1 or dim % len(source.layout) != len(source.layout) - 1:
        return None
    size = source.layout[-1].size
    start, stop = _arg(node, 2, "start") or 0, _arg(node, 3, "end")
    if source.layout[-1].kind != "feature" or not isinstance(start, int):
        return None
    stop = size if stop is None else stop
    if not isinstance(stop, int):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return _cut(low, node, source, start, stop)


def _cat(low: Lowering, node: fx.Node) -> Ref | None:
    refs = [low.ref(n) for n in node.args[0]]  # type: ignore[union-attr]
    dim = int(_arg(node, 1, "dim", 0))
    found = [lay.heads_and_dim(r.layout) if r else None for r in refs]
    if any(f is None for f in found) or dim % len(low.dims(node)) != len(low.dims(node)) - 1:
        return None
    made = lay.natural(low.dims(node))
    if made is None or len({f[0] for f in found if f}) != 1:
        return None
    for ref, pair in zip(refs, found, strict=True):
        assert ref is not None and pair is not None
        if not lay.is_natural(ref.layout):
            return None
        low.builder.retype(ref.value, memory_shape(ref.layout))
    out = Ref(low.builder.act(memory_shape(made)), made)
    low.builder.emit(ops.Concat(), [r.value for r in refs if r], [out.value], module_path(node))
    return out


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    **lower_attention.HANDLERS,
    **lower_linear_attention.HANDLERS,
    **lower_norms.HANDLERS,
    **lower_router.HANDLERS,
    "aten.view": _view,
    "aten.reshape": _view,
    "aten._unsafe_view": _view,
    "aten.flatten": _view,
    "aten.unflatten": _view,
    "aten.unsqueeze": _unsqueeze,
    "aten.expand": _rows_only,
    "aten.select": _rows_only,
    "aten.squeeze": _view,
    "aten.contiguous": _same,
    "aten.clone": _same,
    "aten.to": _cast,
    "aten._to_copy": _cast,
    "aten.transpose": _transpose,
    "aten.permute": _permute,
    "aten.embedding": _embedding,
    "aten.linear": _linear,
    "aten.add": _add,
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.silu": _activation("silu"),
    "aten.gelu": _activation("gelu"),
    "aten.relu": _activation("relu"),
    "aten.sigmoid": _activation("sigmoid"),
    "aten.tanh": _activation("tanh"),
    "aten.split_with_sizes": _split_with_sizes,
    "aten.split": _split_with_sizes,
    "aten.chunk": _chunk,
    "aten.slice": _slice,
    "aten.cat": _cat,
    "hetcomp.moe_experts": _moe_experts,
}

# These take their operands as Plan values even where an unknown op made them; all others join its region.
ANCHORS = frozenset(h for name, h in HANDLERS.items() if name.startswith("hetcomp.")) | {_linear, _embedding}
