"""What it costs to compute quantised weights of a checkpoint in another format than theirs, measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetcomp.backends import packing
from hetcomp.backends.pack_weights import WeightPacker, WeightReader
from hetcomp.ir.native_format import Native, native_format
from hetcomp.ir.plan import Plan, Value, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.quantised_numbers import QuantisedNumbers

_Floats = npt.NDArray[np.float32]
_ROWS = 1024  # whole panels


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
    stacked = len(value.type.shape) == 3 and (value.view is None or value.view.head_split is None)
    numbers = reader.read_expert(value, 0) if stacked else reader.read(value)
    want = numbers.to_f32() if isinstance(numbers, QuantisedNumbers) else packing.to_f32(numbers)
    squares = np.zeros(2)  # of the error, of the numbers
    for exact, got in _pieces(value, want, WeightPacker(reader).pack(value, numbers)):
        squares += [float(np.square(part, dtype=np.float64).sum()) for part in (got - exact, exact)]
    error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    where = f"{value.fqn or value.id}{' (expert 0)' if stacked else ''}"
    return f"the error of {where} is {error:.2e} (relative RMS)" if error else f"{where} is exact"


def _pieces(value: Value, want: _Floats, data: packing.Bytes) -> Iterator[tuple[_Floats, _Floats]]:
    """Rows of ``want`` and what is packed for them: few at a time, since an embedding's would take several times the
    memory of the matrix."""
    assert value.format is not None
    rows, columns = (int(d) for d in value.type.shape[-2:])
    form, layout = value.format, value.type.layout
    each, panel = packing.matrix_bytes(rows, columns, form, layout), packing.panel_bytes(columns, form)
    # In the other layout, of experts, panels of gate and up alternate: those are taken whole.
    step = _ROWS if layout == packing.PANELS else rows
    for number, matrix in enumerate(want.reshape(-1, rows, columns)):
        for start in range(0, rows, step):
            exact = matrix[start : start + step]
            at = number * each + start // packing.PANEL * panel
            end = (number + 1) * each
            packed = data[at : min(at + step // packing.PANEL * panel, end) if layout == packing.PANELS else end]
            yield exact, packing.unpack_matrix(packed, len(exact), columns, form, layout)
