"""What an op is in the field's words: from the data flow, for projections from the module's name."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Value

_ATTENTION = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "qkv_proj": "qkv",
    "q_a_proj": "q_a",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "q_a_layernorm": "q_a_norm",
    "kv_a_layernorm": "kv_a_norm",
}
_NORMS = ("rms_norm", "layer_norm")
_MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_MLP_KINDS = {"glu": "act", "activation": "act", "add": "add", "mul": "mul"}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def assign_roles(lowered: list[Op], values: dict[str, Value]) -> list[Op]:
    """The ops with their roles filled in; roles given while lowering stay."""
    readers: dict[str, list[Op]] = {}
    for op in lowered:
        for value in op.inputs:
            readers.setdefault(value, []).append(op)
    attention = {op.layer: op.origin for op in lowered if op.kind in ("attention", "gated_delta")}
    experts = {op.layer: _parent(op.origin) for op in lowered if op.kind == "moe_experts"}
    roles: dict[str, str] = {}
    for op in lowered:
        if op.role:
            roles[op.id] = op.role
        elif op.layer is None:
            roles[op.id] = _outside(op, readers)
        elif op.layer in attention and _inside(op.origin, attention[op.layer]):
            named = _gated(op, readers) or _ATTENTION.get(_leaf(op.origin)) or _own(op, attention[op.layer])
            roles[op.id] = f"attn.{named}"
        elif op.layer in experts and _inside(op.origin, experts[op.layer]):
            roles[op.id] = _moe(op, readers)
        elif op.kind not in (*_NORMS, "add", "scale"):
            roles[op.id] = f"mlp.{_mlp(op)}"
    for op in lowered:
        if op.id not in roles:
            roles[op.id] = _between(op, readers, roles)
    return [replace(op, role=roles[op.id]) for op in lowered]


# By kind and place of the operand what a linear layer makes of a gated delta net.
_DELTA_NET = {("causal_conv", 0): "qkv", ("gated_delta", 0): "qkv", ("gated_delta", 1): "a", ("gated_delta", 2): "b"}


def _gated(op: Op, readers: dict[str, list[Op]]) -> str | None:
    """Of what feeds or follows a gated delta rule, or gates the output of attention: told by the data flow, since
    models name and join these projections in ways of their own."""
    reading = [(r, r.inputs.index(v)) for v in op.outputs for r in readers.get(v, [])]
    kinds = {r.kind for r, _ in reading}
    if op.kind == "linear":
        found = {_DELTA_NET.get((r.kind, i)) for r, i in reading}
        if found - {None}:
            return found.pop() if len(found) == 1 else None
        if kinds == {"glu"}:
            return "z"
        return "gate" if kinds == {"activation"} else None
    if op.kind in ("rms_norm", "layer_norm") and kinds == {"glu"}:
        return "out_norm"
    return {"glu": "out_gate", "activation": "gate_act", "mul": "out_gate"}.get(op.kind)


def _own(op: Op, module: str) -> str:
    """Name of an op inside ``module`` that is not in the tables."""
    return op.kind if op.origin == module else _leaf(op.origin)


def _outside(op: Op, readers: dict[str, list[Op]]) -> str:
    if op.kind == "linear":
        return "lm_head"
    if op.kind in _NORMS:
        return "final_norm"
    return op.kind


def _mlp(op: Op) -> str:
    return _MLP.get(_leaf(op.origin)) or _MLP_KINDS.get(op.kind) or op.kind


def _moe(op: Op, readers: dict[str, list[Op]]) -> str:
    next_kinds = {r.kind for v in op.outputs for r in readers.get(v, [])}
    if op.kind == "linear" and isinstance(op.attrs, ops.Linear):
        if "route" in next_kinds or _leaf(op.origin) in ("gate", "router"):
            return "moe.router"
        if op.attrs.out_features == 1:
            return "moe.shared.expert_gate"
        return f"moe.shared.{_MLP.get(_leaf(op.origin), 'linear')}"
    if op.kind == "aten":
        return "moe.route" if "moe_experts" in next_kinds else "moe.aten"
    if op.kind == "activation" and "mul" in next_kinds:
        return "moe.shared.expert_gate_act"
    return f"moe.shared.{_MLP_KINDS.get(op.kind, op.kind)}"


def _between(op: Op, readers: dict[str, list[Op]], roles: dict[str, str]) -> str:
    """Norms and sums of the layer itself: a norm belongs to the block that reads it."""
    if op.kind not in _NORMS:
        return "residual" if op.kind == "add" else op.kind
    blocks = {roles.get(r.id, "").partition(".")[0] for v in op.outputs for r in readers.get(v, [])}
    for block in ("attn", "moe", "mlp"):
        if block in blocks:
            return f"{block}.norm"
    return "norm"
