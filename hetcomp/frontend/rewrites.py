"""Clean-ups of the ops as lowered, before they are assembled: take linear layers apart, fuse glu, move select_rows
forward, drop dead ops, give roles and names."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.frontend.cut_linears import cut_linears
from hetcomp.frontend.plan_builder import name_ops
from hetcomp.frontend.roles import assign_roles
from hetcomp.ir import ops
from hetcomp.ir.ops import STATE_WRITERS
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import Shape

_GLU_FUNCTIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu"})
_ROW_WISE = ("rms_norm", "layer_norm", "scale", "activation")


def finish(lowered: list[Op], values: dict[str, Value], logits: str) -> tuple[list[Op], dict[str, Value]]:
    """All clean-ups in order; ops and values ready for assembly."""
    made = _fuse_glu(cut_linears(drop_dead(lowered, logits), values), values)
    made = _select_rows(made, values, logits)
    made = assign_roles(drop_dead(made, logits), values)
    return name_ops(made, values)


def drop_dead(lowered: list[Op], logits: str) -> list[Op]:
    """Ops whose results reach neither the logits nor a state."""
    alive: set[str] = {logits}
    kept: list[Op] = []
    for op in reversed(lowered):
        if op.kind in STATE_WRITERS or any(v in alive for v in op.outputs):
            kept.append(op)
            alive.update(op.inputs)
    return kept[::-1]


def users_of(lowered: list[Op]) -> dict[str, list[Op]]:
    """Ops that read each value."""
    out: dict[str, list[Op]] = {}
    for op in lowered:
        for value in op.inputs:
            out.setdefault(value, []).append(op)
    return out


def _row_width(shape: Shape) -> int:
    width = 1
    for d in shape[1:]:
        width *= int(d)
    return width


def _fuse_glu(lowered: list[Op], values: dict[str, Value]) -> list[Op]:
    """mul(function(gate), up) -> glu(gate, up) where nothing else reads function(gate)."""
    users = users_of(lowered)
    makers = {v: op for op in lowered for v in op.outputs}
    dropped: set[str] = set()
    fused: dict[str, Op] = {}
    for op in lowered:
        if op.kind != "mul" or len({_row_width(values[v].type.shape) for v in op.inputs}) > 1:
            continue
        for gate, up in (op.inputs, op.inputs[::-1]):
            maker = makers.get(gate)
            if maker is None or not isinstance(maker.attrs, ops.Activation) or len(users[gate]) != 1:
                continue
            if maker.attrs.function not in _GLU_FUNCTIONS:
                continue
            attrs = ops.Glu(_row_width(values[up].type.shape), maker.attrs.function)  # type: ignore[arg-type]
            fused[op.id] = replace(op, attrs=attrs, inputs=(maker.inputs[0], up))
            dropped.add(maker.id)
            break
    return [fused.get(op.id, op) for op in lowered if op.id not in dropped]


def _select_rows(lowered: list[Op], values: dict[str, Value], logits: str) -> list[Op]:
    """Puts select_rows before the head and the row-wise ops in front of it: logits for R rows only."""
    makers = {v: i for i, op in enumerate(lowered) for v in op.outputs}
    users = users_of(lowered)
    chain = [makers[logits]]
    while lowered[chain[-1]].kind != "linear" or lowered[chain[-1]].layer is not None:
        previous = _single_source(lowered[chain[-1]], values, makers, users)
        if previous is None:
            break
        chain.append(previous)
    while True:
        previous = _single_source(lowered[chain[-1]], values, makers, users)
        if previous is None or lowered[previous].kind not in _ROW_WISE or lowered[previous].layer is not None:
            break
        chain.append(previous)
    first = lowered[chain[-1]]
    source = first.inputs[0]
    old = values[source]
    selected = replace(old, id=f"{source}:rows", type=replace(old.type, shape=("R", *old.type.shape[1:])))
    values[selected.id] = selected
    select = Op(f"{first.id}:rows", ops.SelectRows(), (source,), (selected.id,), origin=first.origin)
    for index in chain:
        for value in lowered[index].outputs:
            typed = values[value].type
            values[value] = replace(values[value], type=replace(typed, shape=("R", *typed.shape[1:])))
    moved = replace(first, inputs=(selected.id, *first.inputs[1:]))
    at = chain[-1]
    return [*lowered[:at], select, moved, *lowered[at + 1 :]]


def _single_source(op: Op, values: dict[str, Value], makers: dict[str, int], users: dict[str, list[Op]]) -> int | None:
    """The op that made the only activation that ``op`` reads, if nothing else reads it."""
    acts = [v for v in op.inputs if values[v].kind is ValueKind.ACT]
    if len(acts) != 1 or acts[0] not in makers or len(users[acts[0]]) != 1 or acts[0] != op.inputs[0]:
        return None
    return makers[acts[0]]
