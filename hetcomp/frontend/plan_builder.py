"""Collects ops and values while lowering and assembles them into a Plan of one template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Call, ModelInfo, Op, Plan, Template, Value, ValueKind
from hetcomp.ir.types import Dim, DType, Shape, TensorType

MODEL_TEMPLATE = "model"
_GIVEN = (ValueKind.WEIGHT, ValueKind.CONST, ValueKind.STATE, ValueKind.INPUT)
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_of(path: str) -> int | None:
    """The layer that a module path lies in: the first number in it."""
    match = _LAYER.search(path)
    return int(match.group(1)) if match else None


@dataclass
class PlanBuilder:
    """Ops in order and values by id; ids are provisional until :func:`name_ops`."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    _count: int = 0

    def add_value(self, value: Value) -> str:
        """Adds a value unless it is there already; returns its id."""
        self.values.setdefault(value.id, value)
        return value.id

    def act(self, shape: Shape, dtype: DType = DType.F32) -> str:
        """A new activation."""
        self._count += 1
        return self.add_value(Value(f"%{self._count}", TensorType(dtype, shape), ValueKind.ACT))

    def retype(self, value: str, shape: Shape) -> None:
        """The same memory read under another shape."""
        old = self.values[value]
        self.values[value] = replace(old, type=replace(old.type, shape=shape))

    def emit(self, attrs: Attrs, inputs: Iterable[str], outputs: Iterable[str], origin: str, role: str = "") -> Op:
        """Appends an op."""
        op = Op(
            id=f"op{len(self.ops)}",
            attrs=attrs,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            layer=layer_of(origin),
            role=role,
            origin=origin,
        )
        self.ops.append(op)
        return op


def name_ops(ops: list[Op], values: dict[str, Value]) -> tuple[list[Op], dict[str, Value]]:
    """Ids that a person can read: ``l3.attn.q`` for the op and its result, numbered where a role repeats.

    Values that are not activations keep their ids."""
    counts: dict[tuple[int | None, str], int] = {}
    renamed: dict[str, str] = {}
    out: list[Op] = []
    for op in ops:
        role = op.role or op.kind
        key = (op.layer, role)
        counts[key] = counts.get(key, 0) + 1
        base = role if counts[key] == 1 else f"{role}.{counts[key]}"
        name = base if op.layer is None else f"l{op.layer}.{base}"
        for index, value in enumerate(op.outputs):
            if values[value].kind is ValueKind.ACT:
                renamed[value] = name if len(op.outputs) == 1 else f"{name}:{index}"
        out.append(
            replace(
                op,
                id=name,
                inputs=tuple(renamed.get(v, v) for v in op.inputs),
                outputs=tuple(renamed.get(v, v) for v in op.outputs),
            )
        )
    named = {renamed.get(k, k): replace(v, id=renamed.get(k, k)) for k, v in values.items()}
    return out, named


def assemble(ops: Iterable[Op], values: dict[str, Value], model: ModelInfo, dims: tuple[Dim, ...]) -> Plan:
    """The Plan of one template and one call. Values stand in the order of their first use."""
    ops = tuple(ops)
    used = dict.fromkeys(v for op in ops for v in (*op.inputs, *op.outputs))
    params = tuple(v for v in used if values[v].kind in _GIVEN)
    results = tuple(v for v in used if values[v].kind is ValueKind.OUTPUT)
    template = Template(MODEL_TEMPLATE, tuple(values[v] for v in used), ops, params, results)
    own = tuple(values[v] for v in (*params, *results))
    call = Call(MODEL_TEMPLATE, None, params, results)
    return Plan(model=model, dims=dims, values=own, templates=(template,), calls=(call,))
