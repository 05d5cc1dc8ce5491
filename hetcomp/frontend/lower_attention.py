"""Handlers of rotary embedding, KV cache and attention, multi-head latent attention included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from hetcomp.frontend import layout as lay
from hetcomp.frontend.lower import Caches, Lowering, Ref, RowsOnly, Several, TableRef
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind, WeightSource
from hetcomp.ir.types import DType, TensorType


def _rope_table(low: Lowering, node: fx.Node) -> Several | None:
    positions = low.bound.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(positions, RowsOnly):
        return None
    index = int(node.args[1])  # type: ignore[arg-type]
    data = low.traced.rope_tables[index]
    half = len(data.inv_freq)
    name = "rope.inv_freq" if index == 0 else f"rope.inv_freq.{index}"
    const = low.builder.add_value(
        Value(name, TensorType(DType.F32, (half,)), ValueKind.CONST, fqn=name, data=data.inv_freq)
    )
    outs = [low.builder.act((lay.ROWS, half)) for _ in range(2)]
    attrs = ops.RopeTable(2 * half, data.scaling)
    low.builder.emit(attrs, [positions.value, const], outs, module_path(node), "rope_table")
    return Several(tuple(TableRef(out, half, data.width) for out in outs))


def _rope(low: Lowering, node: fx.Node) -> Ref | None:
    x = low.ref(node.args[0])
    cos, sin = (low.bound.get(n) for n in node.args[1:3])  # type: ignore[arg-type]
    found = lay.heads_and_dim(x.layout) if x else None
    if x is None or found is None or not (isinstance(cos, TableRef) and isinstance(sin, TableRef)):
        return None
    heads, dim = found
    rotary_dim, style = int(node.args[3]), str(node.args[4])  # type: ignore[arg-type]
    out = Ref(low.builder.act((lay.ROWS, heads, dim)), x.layout)
    attrs = ops.Rope(heads, dim, rotary_dim, 0, style)  # type: ignore[arg-type]
    low.builder.emit(attrs, [x.value, cos.value, sin.value], [out.value], module_path(node), "attn.rope")
    return out


def _state(low: Lowering, layer: int, part: str, heads: int, dim: int) -> str:
    name = f"l{layer}.cache.{part}"
    shape = ("slots", heads, "context", dim)
    return low.builder.add_value(Value(name, TensorType(DType.F32, shape), ValueKind.STATE, fqn=name))


def _kv_append(low: Lowering, node: fx.Node) -> Several | None:
    k, v, layer = low.ref(node.args[0]), low.ref(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    of_k, of_v = (lay.heads_and_dim(r.layout) if r else None for r in (k, v))
    if k is None or v is None or of_k is None or of_v is None:
        return None
    origin, role = module_path(node), "attn.kv_append"
    readers = {str(u.target) for part in node.users for u in part.users}
    if "hetcomp.mla_attention.default" in readers:
        rank, rope = of_k[1], of_v[1]
        row = low.builder.act((lay.ROWS, 1, rank + rope))
        low.builder.retype(k.value, (lay.ROWS, 1, rank))
        low.builder.retype(v.value, (lay.ROWS, 1, rope))
        low.builder.emit(ops.Concat(), [k.value, v.value], [row], origin, "attn.kv_row")
        state = _state(low, layer, "kv", 1, rank + rope)
        low.builder.emit(ops.KvAppend(1, rank + rope), [row, state], [], origin, role)
        return Several((Caches((state,)), Caches((state,))))
    states = []
    for part, ref, (heads, dim) in (("k", k, of_k), ("v", v, of_v)):
        state = _state(low, layer, part, heads, dim)
        low.builder.emit(ops.KvAppend(heads, dim), [ref.value, state], [], origin, role)
        states.append(Caches((state,)))
    return Several(tuple(states))


def _cache_of(low: Lowering, node: object) -> str | None:
    found = low.bound.get(node)  # type: ignore[call-overload]
    return found.states[0] if isinstance(found, Caches) else None


def _attention(low: Lowering, node: fx.Node) -> Ref | None:
    q = low.ref(node.args[0])
    k, v, sinks = _cache_of(low, node.args[1]), _cache_of(low, node.args[2]), node.args[3]
    found = lay.heads_and_dim(q.layout) if q else None
    if q is None or found is None or k is None or v is None:
        return None
    _, kv_heads, _, dim = low.builder.values[k].type.shape
    attrs = ops.Attention(
        heads=found[0],
        kv_heads=int(kv_heads),
        head_dim=int(dim),
        v_head_dim=int(low.builder.values[v].type.shape[3]),
        scale=float(node.args[5]),  # type: ignore[arg-type]
        window=int(node.args[6]),  # type: ignore[arg-type]
        softcap=float(node.args[7]),  # type: ignore[arg-type]
        sinks=sinks is not None,
    )
    inputs = [q.value, k, v] + ([low.weight(sinks)] if sinks is not None else [])
    out = low.result(node)
    low.builder.emit(attrs, inputs, [out.value], module_path(node), "attn.core")
    return out


def _mla_attention(low: Lowering, node: fx.Node) -> Ref | None:
    """Absorbed: queries are moved into the latent space, results out of it; keys are never expanded."""
    nope, v_dim = int(node.args[6]), int(node.args[7])  # type: ignore[arg-type]
    state = _cache_of(low, node.args[1])
    parts = _mla_query(low, node, nope)
    if state is None or parts is None:
        return None
    q_nope, q_rot, heads, rope = parts
    kv_b, origin, b = node.args[3], module_path(node), low.builder
    assert isinstance(kv_b, fx.Node)
    rank = int(kv_b.meta["val"].shape[1])
    to_latent = low.weight(
        kv_b,
        (heads, rank, nope),
        WeightSource("plain", (), head_split=(heads, 0, nope), head_transpose=True),
        suffix=":k",
    )
    from_latent = low.weight(
        kv_b,
        (heads, v_dim, rank),
        WeightSource("plain", (), head_split=(heads, nope, nope + v_dim)),
        suffix=":v",
    )
    q_latent, q = b.act((lay.ROWS, heads, rank)), b.act((lay.ROWS, heads, rank + rope))
    mixed, out = b.act((lay.ROWS, heads, rank)), low.result(node)
    b.emit(ops.HeadLinear(heads, nope, rank), [q_nope, to_latent], [q_latent], origin, "attn.q_absorb")
    b.emit(ops.Concat(), [q_latent, q_rot], [q], origin, "attn.q_row")
    attrs = ops.Attention(
        heads=heads,
        kv_heads=1,
        head_dim=rank + rope,
        v_head_dim=rank,
        scale=float(node.args[5]),  # type: ignore[arg-type]
        softcap=float(node.args[8]),  # type: ignore[arg-type]
        shared_kv=True,
    )
    b.emit(attrs, [q, state], [mixed], origin, "attn.core")
    b.emit(ops.HeadLinear(heads, rank, v_dim), [mixed, from_latent], [out.value], origin, "attn.v_absorb")
    return out


def _mla_query(low: Lowering, node: fx.Node, nope: int) -> tuple[str, str, int, int] | None:
    """(value of q_nope, value of q_rot, heads, rotary dim): what the cat before the attention joins."""
    cat = node.args[0]
    if not isinstance(cat, fx.Node) or str(cat.target) != "aten.cat.default":
        return None
    halves = [low.ref(n) for n in cat.args[0]]  # type: ignore[union-attr]
    if len(halves) != 2 or halves[0] is None or halves[1] is None:
        return None
    first, second = (lay.heads_and_dim(h.layout) for h in halves if h)
    if first is None or second is None or first[0] != second[0] or first[1] != nope:
        return None
    for half, (heads, dim) in zip(halves, (first, second), strict=True):
        low.builder.retype(half.value, (lay.ROWS, heads, dim))  # type: ignore[union-attr]
    return halves[0].value, halves[1].value, first[0], second[1]


HANDLERS: dict[str, Callable[[Lowering, fx.Node], Any]] = {
    "hetcomp.rope_table": _rope_table,
    "hetcomp.rope": _rope,
    "hetcomp.kv_append": _kv_append,
    "hetcomp.attention": _attention,
    "hetcomp.mla_attention": _mla_attention,
}
