"""In which layouts kernels take the operands of an op."""

from __future__ import annotations

from hetcomp.backends.packing import PANELS, PANELS_GLU, ROW_MAJOR
from hetcomp.ir.layouts import with_act_order

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
