"""Legalisations of ops for which TVM's default is a call of its runtime library: scans, sorting, top-k.

Ranks instead of sorting: the rank of an element is the number of elements before it, so that equal values
keep their order and no temporary is permuted. Quadratic in the axis, which is short where models sort
(experts).
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx, topi

Expr = Any
Tensor = Any


def _cumulative(function: Any) -> Any:  # noqa: ANN401
    def legalise(bb: Any, call: Any) -> Expr:  # noqa: ANN401
        dtype = call.attrs.dtype
        wanted = None if dtype is None or str(dtype) in ("", "void") else str(dtype)
        axis = None if call.attrs.axis is None else int(call.attrs.axis)
        return bb.call_te(function, call.args[0], axis, wanted, bool(call.attrs.exclusive))

    return legalise


def _ordered(x: Tensor, axis: int, descending: bool, count: Expr, dtype: str) -> Tensor:
    """Indices of the first ``count`` elements along ``axis`` in sorted order."""
    axis = axis + len(x.shape) if axis < 0 else axis
    n = x.shape[axis]
    j = te.reduce_axis((0, n), name="j")

    def at(index: tuple[Expr, ...], i: Expr) -> Expr:
        return x(*index[:axis], i, *index[axis + 1 :])

    def before(*index: Expr) -> Expr:
        mine, other = at(index, index[axis]), at(index, j)
        better = other > mine if descending else other < mine
        first = tirx.any(better, tirx.all(other == mine, j < index[axis]))
        return te.sum(tirx.Select(first, tirx.const(1, dtype), tirx.const(0, dtype)), axis=j)

    rank = te.compute(x.shape, before, name="rank")
    i = te.reduce_axis((0, n), name="i")
    shape = [*x.shape[:axis], count, *x.shape[axis + 1 :]]

    def place(*index: Expr) -> Expr:
        hit = rank(*index[:axis], i, *index[axis + 1 :]) == index[axis].astype(dtype)
        # max, not sum: with NaN among the values several may have one rank, and an index stays in range.
        return te.max(tirx.Select(hit, i.astype(dtype), tirx.const(0, dtype)), axis=i)

    return te.compute(shape, place, name="order")


def _gathered(x: Tensor, order: Tensor, axis: int) -> Tensor:
    axis = axis + len(x.shape) if axis < 0 else axis
    return te.compute(order.shape, lambda *index: x(*index[:axis], order(*index), *index[axis + 1 :]), name="values")


def _topk(bb: Any, call: Any) -> Expr:  # noqa: ANN401
    x, attrs = call.args[0], call.attrs
    axis, largest, dtype = int(attrs.axis), bool(attrs.largest), str(attrs.dtype)
    count = int(attrs.k)
    order = bb.emit(bb.call_te(lambda t: _ordered(t, axis, largest, count, dtype), x, primfunc_name_hint="topk_order"))
    if attrs.ret_type == "indices":
        return order
    values = bb.emit(bb.call_te(lambda t, o: _gathered(t, o, axis), x, order, primfunc_name_hint="topk_values"))
    return values if attrs.ret_type == "values" else relax.Tuple([values, order])


def _argsort(bb: Any, call: Any) -> Expr:  # noqa: ANN401
    attrs = call.attrs
    axis, descending, dtype = int(attrs.axis), bool(attrs.descending), str(attrs.dtype)
    return bb.call_te(
        lambda t: _ordered(t, axis, descending, t.shape[axis], dtype),
        call.args[0],
        primfunc_name_hint="argsort",
    )


LEGALISE = {
    "relax.cumsum": _cumulative(topi.cumsum),
    "relax.cumprod": _cumulative(topi.cumprod),
    "relax.topk": _topk,
    "relax.argsort": _argsort,
}
