"""Operand rules: what types the inputs and outputs of each op kind must have (see the docstrings in ops.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hetcomp.ir import ops
from hetcomp.ir.plan import Op
from hetcomp.ir.types import CACHE_DTYPES, DType, Shape, TensorType

Types = Sequence[TensorType]


def check(op: Op, inputs: Types, outputs: Types) -> str | None:
    """What is wrong with the op's operands, or None."""
    return _RULES[op.kind](op, inputs, outputs) or _same_rows(op, inputs, outputs)


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


def _elements(type_: TensorType, count: int, what: str) -> str | None:
    """A weight used as a flat list; its shape is the checkpoint's (ERNIE stores a bias as [1, experts])."""
    total = math.prod(d for d in type_.shape if isinstance(d, int))
    return f"{what} is {type_}, expected {count} elements" if total != count else None


def _shape(type_: TensorType, shape: Shape, what: str) -> str | None:
    return f"{what} has shape {list(type_.shape)}, expected {list(shape)}" if type_.shape != shape else None


def _cache(type_: TensorType, heads: int, dim: int, what: str) -> str | None:
    if type_.dtype not in CACHE_DTYPES:
        return f"{what} is {type_}, expected {', '.join(CACHE_DTYPES)}"
    return _shape(type_, ("slots", heads, "context", dim), what)


def _recurrent(type_: TensorType, shape: Shape, what: str) -> str | None:
    if type_.dtype is not DType.F32:
        return f"{what} is {type_}, expected f32"
    return _shape(type_, ("slots", *shape), what)


def _ids(type_: TensorType, what: str) -> str | None:
    return f"{what} is {type_}, expected i32" if type_.dtype is not DType.I32 else None


def _same_rows(op: Op, inputs: Types, outputs: Types) -> str | None:
    """All kinds but select_rows keep the rows (T or R) of their first input; a region's results say their own."""
    if op.kind in ("select_rows", "aten"):
        return None
    rows = inputs[0].shape[:1]
    wrong = next((o for o in outputs if o.shape[:1] != rows), None)
    return f"output is {wrong}, expected {rows[0] if rows else 'no'} rows as the input has" if wrong else None


def _first(*problems: str | None) -> str | None:
    return next((p for p in problems if p), None)


def _embed(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Embed)
    return _arity(i, o, 2, 1) or _first(
        _ids(i[0], "ids"), _shape(i[1], (a.vocab, a.width), "the table"), _row(o[0], a.width, "output")
    )


def _rms_norm(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.RmsNorm)
    return _arity(i, o, 2, 1) or _first(
        _row(i[0], a.groups * a.width, "input"),
        _shape(i[1], (a.width,), "weight"),
        _row(o[0], a.groups * a.width, "output"),
    )


def _layer_norm(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.LayerNorm)
    return _arity(i, o, 3, 1) or _first(
        _row(i[0], a.width, "input"),
        _shape(i[1], (a.width,), "weight"),
        _shape(i[2], (a.width,), "bias"),
        _row(o[0], a.width, "output"),
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


def _rope_table(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.RopeTable)
    half = a.rotary_dim // 2
    return _arity(i, o, 2, 2) or _first(
        _ids(i[0], "positions"), _shape(i[1], (half,), "inv_freq"), _row(o[0], half, "cos"), _row(o[1], half, "sin")
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
        _cache(i[1], a.heads, a.head_dim, "cache"),
    )


def _attention(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Attention)
    if a.heads % a.kv_heads:
        return f"has {a.heads} heads for {a.kv_heads} kv heads"
    return _arity(i, o, 3 - a.shared_kv + a.sinks, 1) or _first(
        _row(i[0], a.heads * a.head_dim, "query"),
        _cache(i[1], a.kv_heads, a.head_dim, "key cache"),
        None if a.shared_kv else _cache(i[2], a.kv_heads, a.v_head_dim, "value cache"),
        f"key cache is {i[1]}, value cache {i[2]}" if not a.shared_kv and i[1].dtype is not i[2].dtype else None,
        _shape(i[-1], (a.heads,), "sinks") if a.sinks else None,
        _row(o[0], a.heads * a.v_head_dim, "output"),
    )


def _causal_conv(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.CausalConv)
    return _arity(i, o, 3 + a.bias, 1) or _first(
        _row(i[0], a.channels, "input"),
        _shape(i[1], (a.channels, 1, a.width), "weight"),
        _recurrent(i[2], (a.width - 1, a.channels), "state"),
        _shape(i[3], (a.channels,), "bias") if a.bias else None,
        _row(o[0], a.channels, "output"),
    )


def _gated_delta(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.GatedDelta)
    if a.v_heads % a.k_heads:
        return f"has {a.v_heads} heads of values for {a.k_heads} of keys"
    return _arity(i, o, 6, 1) or _first(
        _row(i[0], 2 * a.k_heads * a.k_dim + a.v_heads * a.v_dim, "queries, keys and values"),
        _row(i[1], a.v_heads, "a"),
        _row(i[2], a.v_heads, "b"),
        _shape(i[3], (a.v_heads,), "a_log"),
        _shape(i[4], (a.v_heads,), "dt_bias"),
        _recurrent(i[5], (a.v_heads, a.k_dim, a.v_dim), "state"),
        _row(o[0], a.v_heads * a.v_dim, "output"),
    )


def _route(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Route)
    return _arity(i, o, 1 + a.bias, 2) or _first(
        _row(i[0], a.experts, "logits"),
        _elements(i[1], a.experts, "bias") if a.bias else None,
        _ids(o[0], "ids"),
        _row(o[0], a.top_k, "ids"),
        _row(o[1], a.top_k, "weights"),
    )


def _moe_experts(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.MoeExperts)
    return _arity(i, o, 5 + 2 * a.bias, 1) or _first(
        _row(i[0], a.hidden, "input"),
        _ids(i[1], "ids"),
        _row(i[1], a.top_k, "ids"),
        _row(i[2], a.top_k, "weights"),
        _shape(i[3], (a.experts, 2 * a.intermediate, a.hidden), "gate_up"),
        _shape(i[4], (a.experts, a.hidden, a.intermediate), "down"),
        _shape(i[5], (a.experts, 2 * a.intermediate), "gate_up_bias") if a.bias else None,
        _shape(i[6], (a.experts, a.hidden), "down_bias") if a.bias else None,
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


def _concat(op: Op, i: Types, o: Types) -> str | None:
    if not i or len(o) != 1:
        return f"has {len(i)} inputs and {len(o)} outputs, expected some and 1"
    last = [t.shape[-1] for t in i]
    total = sum(d for d in last if isinstance(d, int))
    if o[0].shape[-1] != total:
        return f"output is {o[0]}, expected a last axis of {total}"
    heads = width(o[0].shape) // max(total, 1)
    wrong = next((t for t in i if width(t.shape) // max(int(t.shape[-1]), 1) not in (1, heads)), None)
    return f"input {wrong} has neither 1 head nor {heads}" if wrong else None


def _select_rows(op: Op, i: Types, o: Types) -> str | None:
    arity = _arity(i, o, 1, 1)
    if arity or o[0].shape[:1] == ("R",):
        return arity or _row(o[0], width(i[0].shape), "output")
    return f"output is {o[0]}, expected R rows"


def _transfer(op: Op, i: Types, o: Types) -> str | None:
    arity = _arity(i, o, 1, 1)
    return arity or (f"output is {o[0]}, expected {i[0]}" if i[0] != o[0] else None)


def _aten(op: Op, i: Types, o: Types) -> str | None:
    a = op.attrs
    assert isinstance(a, ops.Aten)
    arity = _arity(i, o, len(a.input_shapes), len(a.results))
    if arity or len(a.input_dtypes) != len(i):
        return arity or f"names {len(a.input_dtypes)} types for {len(i)} inputs"
    wrong = next((r for r in a.results if not 0 <= r < len(a.nodes)), None)
    return f"hands out node {wrong} of {len(a.nodes)}" if wrong is not None else None


_RULES: dict[str, Callable[[Op, Types, Types], str | None]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "head_linear": _head_linear,
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "causal_conv": _causal_conv,
    "gated_delta": _gated_delta,
    "route": _route,
    "moe_experts": _moe_experts,
    "glu": _glu,
    "activation": _same,
    "add": _same,
    "mul": _mul,
    "scale": _same,
    "slice": _slice,
    "rope_table": _rope_table,
    "concat": _concat,
    "select_rows": _select_rows,
    "transfer": _transfer,
    "aten": _aten,
}
