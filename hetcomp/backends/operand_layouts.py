"""In which layouts kernels take the operands of an op."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hetcomp.backends.packing import PANELS, PANELS_GLU, ROW_MAJOR
from hetcomp.ir.layouts import ORDERED_FORMATS, has_act_order, with_act_order
from hetcomp.ir.plan import Value

# Operands in panels, by kind and index into the inputs: the layout, and whether columns may have an order of their own.
_PACKED = {
    ("embed", 1): (PANELS, False),
    ("linear", 1): (PANELS, True),
    ("head_linear", 1): (PANELS, False),
    ("moe_experts", 3): (PANELS_GLU, True),
    ("moe_experts", 4): (PANELS, True),
}


def layouts_for(kind: str, operand: int) -> tuple[str, ...]:
    """Layouts of weight operand ``operand`` (index into the op's inputs) of an op of kind ``kind``: the usual one, and
    that with an order of columns if the kernels have it.

    ``row_major`` for operands that are not stored in a weight format (biases, norm weights, sinks).
    """
    layout, ordered = _PACKED.get((kind, operand), (ROW_MAJOR, False))
    return (layout, with_act_order(layout)) if ordered else (layout,)


def refused_operand(kind: str, inputs: Sequence[Value], formats: Collection[str]) -> str | None:
    """Why an op's weights cannot be multiplied by kernels that have ``formats``, in a sentence; None if they can."""
    for i, value in enumerate(inputs):
        layouts, name = layouts_for(kind, i), value.fqn or value.id
        if layouts == (ROW_MAJOR,):
            continue
        if value.format not in formats:
            return f"weight {name} has format {value.format}; expected one of {', '.join(formats)}."
        if value.type.layout not in layouts:
            return f"weight {name} has layout {value.type.layout}; expected {' or '.join(layouts)}."
        if has_act_order(value.type.layout) and value.format not in ORDERED_FORMATS:
            expected = ", ".join(ORDERED_FORMATS)
            return f"weight {name} is {value.format}, its columns have an order of their own; expected {expected}."
    return None
