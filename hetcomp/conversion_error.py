"""What it costs to compute quantised weights of a checkpoint in another format than theirs, measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hetcomp.backends import packing
from hetcomp.backends.pack_weights import WeightPacker, WeightReader, has_experts
from hetcomp.ir.native_format import Native, native_format
from hetcomp.ir.plan import Plan, Value, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.quantised_numbers import QuantisedNumbers


@dataclass(frozen=True)
class Conversion:
    """A class of weights (role, how they are stored) that is computed in ``format``; ``first`` is one of them."""

    role: str
    native: Native
    format: str
    first: Value
    count: int


def conversions(plan: Plan) -> list[Conversion]:
    """The quantised weights that the plan does not take over bit for bit, by class, in order of use."""
    found: dict[tuple[str, str, str, str], tuple[Native, list[Value]]] = {}
    values = plan.value_map()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for value in (values[actual[name]] for name in op.inputs if actual.get(name) in values):
                native = native_format(value, value.type.layout) if value.kind is ValueKind.WEIGHT else None
                if native is None or value.format is None or (native.format == value.format and not native.inexact):
                    continue
                key = weight_role(op), native.label, native.inexact, value.format
                _, same = found.setdefault(key, (native, []))
                if value not in same:
                    same.append(value)
    return [Conversion(role, native, form, same[0], len(same)) for (role, _, _, form), (native, same) in found.items()]


def conversion_notes(plan: Plan, reader: WeightReader | None) -> tuple[str, ...]:
    """A line on each class of them: from what, to what, why, and the relative RMS error of one matrix.

    Reads that matrix. Raises HetcompError if it cannot be read."""
    notes = []
    for conversion in conversions(plan):
        native = conversion.native
        if native.format != conversion.format:
            why = "as asked for, or as memory requires"
        else:
            why = f"for {native.inexact}"
        cost = "" if reader is None else f"; {_measured(conversion.first, reader)}"
        notes.append(
            f"{conversion.count} {conversion.role} weights are stored as {native.label} and converted to "
            f"{conversion.format}, {why}{cost}"
        )
    return tuple(notes)


def _measured(value: Value, reader: WeightReader) -> str:
    stacked = has_experts(value)
    squares = np.zeros(2)  # of the error, of the numbers
    packer = WeightPacker(reader)
    for part in packer.parts(value, 0 if stacked else None):
        numbers = part.numbers
        exact = numbers.to_f32() if isinstance(numbers, QuantisedNumbers) else packing.to_f32(numbers)
        got = packing.unpack(packer.pack(part), _matrices(part.packed, exact.shape))
        squares += [float(np.square(each, dtype=np.float64).sum()) for each in (got - exact, exact)]
    error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    where = f"{value.fqn or value.id}{' (expert 0)' if stacked else ''}"
    return f"the error of {where} is {error:.2e} (relative RMS)" if error else f"{where} is exact"


def _matrices(value: Value, shape: tuple[int, ...]) -> Value:
    """What was packed of a weight, which may be one of its matrices, as a weight of its own."""
    return replace(value, type=replace(value.type, shape=shape))
