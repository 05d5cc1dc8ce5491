"""Which weights of a program adapters may change at run time, and the memory that its ops need for it.

An op first makes h = scale a x of each product whose token has an adapter, then adds b h to its result; experts also
keep what down is multiplied with in f32. The runtime allocates that memory when the first adapter is loaded. Ops of one
template run side by side and have places of their own; between two calls every op has waited for the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.backends import packing
from hetcomp.backends.cpu_isa import WHOLE_NUMBERS
from hetcomp.ir import adaptable
from hetcomp.ir.adaptable import OPERANDS
from hetcomp.ir.cpu_side import CpuRole, cpu_templates
from hetcomp.ir.layouts import has_gate_up
from hetcomp.ir.node_parts import Cut, NodePart, part_id, plan_parts
from hetcomp.ir.ops import Attrs, HeadLinear, Linear, MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind

# As HETCOMP_PAIR_COLUMNS of program.h.
_COLUMNS = 16
_RANK_STEP = 4  # HETCOMP_RANK_STEP
_ALIGNMENT = 64  # of a and of b
# Of numbers in 8 bits: f32 of a row of a, bf16 of a row of b.
_A_SCALE, _B_SCALE = 4, 2


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
    """Of what the CPU computes: ``places`` by (template, op id), of ops in parts by (template, ``part_id`` of the op).
    ``floats`` and ``rows``: of all that is needed."""

    places: Mapping[tuple[str, str], ScratchPlace]
    floats: int
    rows: int

    @staticmethod
    def of(plan: Plan) -> AdaptedOps:
        """The places that ``plan`` fixes."""
        places: dict[tuple[str, str], ScratchPlace] = {}
        parts, most_floats, most_rows = plan_parts(plan), 0, 0
        for side in cpu_templates(plan).values():
            floats, rows = 0, 0
            for op in side.template.ops:
                if op.kind not in OPERANDS or side.roles[op.id] not in (CpuRole.COMPUTE, CpuRole.EXPERTS):
                    continue
                for name, attrs in _pieces(op, parts.get((side.template.name, op.id), ())):
                    places[side.template.name, name] = ScratchPlace(floats, rows)
                    more = _needs(attrs, _rows(plan, side.template, op))
                    floats, rows = floats + more.floats, rows + more.rows
            most_floats, most_rows = max(most_floats, floats), max(most_rows, rows)
        return AdaptedOps(places, most_floats, most_rows)


def adaptable_weights(
    plan: Plan, weights: Sequence[Value], cuts: Mapping[str, tuple[Value, Cut]]
) -> tuple[AdaptableWeight, ...]:
    """Of each of the program's weights what adapters may change. ``cuts``: by id of a node's part the whole weight."""
    changeable = adaptable.adaptable_weights(plan)
    return tuple(
        shape_of(value) if (cuts[value.id][0].id if value.id in cuts else value.id) in changeable else AdaptableWeight()
        for value in weights
    )


def shape_of(value: Value) -> AdaptableWeight:
    """What adapters may change of a weight that the CPU's ops multiply with."""
    if value.kind is not ValueKind.WEIGHT:
        return AdaptableWeight()
    *_, rows, columns = (int(d) for d in value.type.shape)
    halves = 2 if has_gate_up(value.type.layout) else 1
    return AdaptableWeight(packing.matrices(value), rows, columns, halves, number_bytes(value))


def gpu_shape_of(value: Value) -> AdaptableWeight:
    """The same where a GPU's ops do: numbers of pairs are f32 or bf16."""
    shape = shape_of(value)
    return replace(shape, number_bytes=max(2, shape.number_bytes))


def pair_bytes(shape: AdaptableWeight, rank: int) -> tuple[int, int]:
    """Of a and of b of one adapter of that rank, as hetcomp.adapters.packed_pairs packs them."""
    stored, number = _up(rank, _RANK_STEP), shape.number_bytes
    rows = shape.halves * _up(shape.rows // shape.halves, packing.PANEL) if shape.matrices else 0
    of_a, of_b = (_A_SCALE, _B_SCALE) if number == 1 else (0, 0)
    a = shape.matrices * stored * (number * _up(shape.columns, _COLUMNS) + of_a)
    b = shape.matrices * rows * (number * stored + of_b)
    return _up(a, _ALIGNMENT), _up(b, _ALIGNMENT)


def number_bytes(value: Value) -> int:
    """Bytes of a number of pairs that the CPU adds to the weight: f32 where it is f32 itself, 8 bits where it is
    multiplied as whole numbers, else bf16."""
    return 4 if value.format == "f32" else 1 if value.format in WHOLE_NUMBERS else 2


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
