"""Operand rules: what types the inputs and outputs of each op kind must have (see the docstrings in ops.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.ir.types import Shape, TensorType

Types = Sequence[TensorType]


def check(op: Op, inputs: Types, outputs: Types) -> str | None:
    """What is wrong with the op's operands, or None."""
    rule = _RULES.get(op.kind)
    return rule(op, inputs, outputs) if rule else None


def width(shape: Shape) -> int:
    """Elements of one row: the product of all axes but the first."""
    return math.prod(d for d in shape[1:] if isinstance(d, int))


def _arity(inputs: Types, outputs: Types, n_in: int, n_out: int) -> str | None:
    if len(inputs) != n_in or len(outputs) != n_out:
        return f"has {len(inputs)} inputs and {len(outputs)} outputs, expected {n_in} and {n_out}"
    return None


def _row(type_: TensorType, elements: int, what: str) -> str | None:
    if width(type_.shape) != elements:
        return f"{what} is {type_}, expected {elements} elements a row"
    return None


def _shape(type_: TensorType, shape: Shape, what: str) -> str | None:
    return f"{what} has shape {list(type_.shape)}, expected {list(shape)}" if type_.shape != shape else None


def _first(*problems: str | None) -> str | None:
    return next((p for p in problems if p), None)


def _embed(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Embed)
    return _arity(i, o, 2, 1) or _first(_shape(i[1], (a.vocab, a.width), "the table"), _row(o[0], a.width, "output"))


def _rms_norm(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.RmsNorm)
    return _arity(i, o, 2, 1) or _first(
        _row(i[0], a.groups * a.width, "input"),
        _shape(i[1], (a.width,), "weight"),
        _row(o[0], a.groups * a.width, "output"),
    )


def _linear(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Linear)
    return _arity(i, o, 2 + a.bias, 1) or _first(
        _row(i[0], a.in_features, "input"),
        _shape(i[1], (a.out_features, a.in_features), "weight"),
        _shape(i[2], (a.out_features,), "bias") if a.bias else None,
        _row(o[0], a.out_features, "output"),
    )


def _head_linear(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.HeadLinear)
    return _arity(i, o, 2, 1) or _first(
        _row(i[0], a.heads * a.in_features, "input"),
        _shape(i[1], (a.heads, a.out_features, a.in_features), "weight"),
        _row(o[0], a.heads * a.out_features, "output"),
    )


def _rope(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Rope)
    if a.offset + a.rotary_dim > a.head_dim:
        return f"rotates {a.offset}..{a.offset + a.rotary_dim} of a head of {a.head_dim}"
    return _arity(i, o, 3, 1) or _first(
        _row(i[0], a.heads * a.head_dim, "input"),
        _row(i[1], a.rotary_dim // 2, "cos"),
        _row(i[2], a.rotary_dim // 2, "sin"),
        _row(o[0], a.heads * a.head_dim, "output"),
    )


def _kv_append(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.KvAppend)
    return _arity(i, o, 2, 0) or _first(
        _row(i[0], a.heads * a.head_dim, "input"),
        _shape(i[1], ("slots", a.heads, "context", a.head_dim), "cache"),
    )


def _attention(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Attention)
    if a.heads % a.kv_heads:
        return f"has {a.heads} heads for {a.kv_heads} kv heads"
    return _arity(i, o, 3 - a.shared_kv + a.sinks, 1) or _first(
        _row(i[0], a.heads * a.head_dim, "query"),
        _shape(i[1], ("slots", a.kv_heads, "context", a.head_dim), "key cache"),
        None if a.shared_kv else _shape(i[2], ("slots", a.kv_heads, "context", a.v_head_dim), "value cache"),
        _shape(i[-1], (a.heads,), "sinks") if a.sinks else None,
        _row(o[0], a.heads * a.v_head_dim, "output"),
    )


def _route(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Route)
    return _arity(i, o, 1 + a.bias, 2) or _first(
        _row(i[0], a.experts, "logits"), _row(o[0], a.top_k, "ids"), _row(o[1], a.top_k, "weights")
    )


def _moe_experts(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.MoeExperts)
    return _arity(i, o, 5 + 2 * a.bias, 1) or _first(
        _row(i[0], a.hidden, "input"),
        _row(i[1], a.top_k, "ids"),
        _row(i[2], a.top_k, "weights"),
        _shape(i[3], (a.experts, 2 * a.intermediate, a.hidden), "gate_up"),
        _shape(i[4], (a.experts, a.hidden, a.intermediate), "down"),
        _row(o[0], a.hidden, "output"),
    )


def _glu(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Glu)
    return _arity(i, o, 2, 1) or _first(*(_row(t, a.width, "operand") for t in (*i, *o)))


def _same(op: Op, i: Types, o: Types) -> str | None:
    arity = _arity(i, o, 2 if op.kind == "add" else 1, 1)
    return arity or _first(*(_row(t, width(o[0].shape), "operand") for t in i))


def _mul(op: Op, i: Types, o: Types) -> str | None:
    arity = _arity(i, o, 2, 1)
    if arity or width(i[1].shape) == 1:
        return arity
    return _first(*(_row(t, width(o[0].shape), "operand") for t in i))


def _slice(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Slice)
    last = i[0].shape[-1] if i else 0
    if not (isinstance(last, int) and 0 <= a.start < a.stop <= last):
        return f"cuts {a.start}..{a.stop} out of {last}"
    return _arity(i, o, 1, 1) or _shape(o[0], (*i[0].shape[:-1], a.stop - a.start), "output")


_RULES: dict[str, Callable[[Op, Types, Types], str | None]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "head_linear": _head_linear,
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "route": _route,
    "moe_experts": _moe_experts,
    "glu": _glu,
    "activation": _same,
    "add": _same,
    "mul": _mul,
    "scale": _same,
    "slice": _slice,
}
