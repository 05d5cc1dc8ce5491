"""Which weights of a program adapters may change at run time, and the memory that its ops need for it.

An op first makes h = scale a x of each product whose token has an adapter, then adds b h to its result; experts also
keep what down is multiplied with in f32. The runtime allocates that memory when the first adapter is loaded. Ops of one
template run side by side and have places of their own; between two calls every op has waited for the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.node_parts import Cut, NodePart, part_id, plan_parts
from hetcomp.ir.ops import Attrs, HeadLinear, Linear, MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind

# Operands that adapters may change: of experts two matrices, else one.
OPERANDS = {"linear": (1,), "head_linear": (1,), "moe_experts": (3, 4)}
# As HETCOMP_PAIR_COLUMNS of program.h.
_COLUMNS = 16


@dataclass(frozen=True)
class AdaptableWeight:
    """As hetcomp_adaptable of program.h: matrices [rows, columns]; ``halves`` 2: gate and up in turn. ``matrices`` 0:
    adapters leave the weight alone."""

    matrices: int = 0
    rows: int = 0
    columns: int = 0
    halves: int = 1
    number_bytes: int = 0


@dataclass(frozen=True)
class ScratchPlace:
    """Where the memory of one op, or of a node's part of it, begins: behind ``floats`` numbers, and ``rows`` times the
    greatest rank of a step's adapters."""

    floats: int
    rows: int


@dataclass(frozen=True)
class AdaptedOps:
    """``places`` by (template, op id), of ops in parts by (template, ``part_id`` of the op). Empty for a program beside
    GPUs, which compute with the weights as they are. ``floats`` and ``rows``: of all that is needed."""

    places: Mapping[tuple[str, str], ScratchPlace]
    floats: int
    rows: int

    @staticmethod
    def of(plan: Plan) -> AdaptedOps:
        """The places that ``plan`` fixes."""
        places: dict[tuple[str, str], ScratchPlace] = {}
        parts, most_floats, most_rows = plan_parts(plan), 0, 0
        for template in () if on_gpu(plan) else plan.templates:
            floats, rows = 0, 0
            for op in template.ops:
                if op.kind not in OPERANDS:
                    continue
                for name, attrs in _pieces(op, parts.get((template.name, op.id), ())):
                    places[template.name, name] = ScratchPlace(floats, rows)
                    more = _needs(attrs, _rows(plan, template, op))
                    floats, rows = floats + more.floats, rows + more.rows
            most_floats, most_rows = max(most_floats, floats), max(most_rows, rows)
        return AdaptedOps(places, most_floats, most_rows)


def adaptable_weights(
    plan: Plan, weights: Sequence[Value], cuts: Mapping[str, tuple[Value, Cut]]
) -> tuple[AdaptableWeight, ...]:
    """Of each of the program's weights what adapters may change. ``cuts``: by id of a node's part the whole weight."""
    changeable, others = _read_as_matrices(plan)
    found = []
    for value in weights:
        whole = cuts[value.id][0].id if value.id in cuts else value.id
        if whole not in changeable or whole in others or value.kind is not ValueKind.WEIGHT:
            found.append(AdaptableWeight())
            continue
        *_, rows, columns = (int(d) for d in value.type.shape)
        halves = 2 if value.type.layout == packing.PANELS_GLU else 1
        number = number_bytes(value)
        found.append(AdaptableWeight(packing.matrices(value), rows, columns, halves, number))
    return tuple(found)


def number_bytes(value: Value) -> int:
    """Bytes of a number of pairs that are added to the weight: f32 where it is f32 itself, else bf16."""
    return 4 if value.format == "f32" else 2


def _pieces(op: Op, parts: Sequence[NodePart]) -> list[tuple[str, Attrs]]:
    return [(part_id(op.id, part.node), part.attrs) for part in parts] or [(op.id, op.attrs)]


def _needs(attrs: Attrs, rows: int) -> ScratchPlace:
    if isinstance(attrs, MoeExperts):
        entries = rows * attrs.top_k
        return ScratchPlace(entries * -(-attrs.intermediate // _COLUMNS) * _COLUMNS, 2 * entries)
    assert isinstance(attrs, (Linear, HeadLinear))
    return ScratchPlace(0, rows * (attrs.heads if isinstance(attrs, HeadLinear) else 1))


def _rows(plan: Plan, template: Template, op: Op) -> int:
    rows = template.value(op.outputs[0]).type.shape[0]
    return rows if isinstance(rows, int) else plan.max_dims()[rows]


def _read_as_matrices(plan: Plan) -> tuple[set[str], set[str]]:
    """Ids of the plan's values that ops multiply with as adapters expect it, and of those that are read otherwise."""
    matrices: set[str] = set()
    others: set[str] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for operand, name in enumerate(op.inputs):
                if name in actual:
                    (matrices if operand in OPERANDS.get(op.kind, ()) else others).add(actual[name])
    return matrices, others
