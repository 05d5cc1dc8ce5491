"""What the names of packed layouts say; their bytes are described in hetcomp.backends.packing."""

from __future__ import annotations

# Weight formats whose columns may have an order: what GPTQ and compressed-tensors store in one.
ORDERED_FORMATS = ("q4", "q4z", "q8")
_GATE_UP = "panels16_glu"
_ACT_ORDER = "_act_order"


def has_gate_up(layout: str) -> bool:
    """Whether panels of gate and up take turns."""
    return layout.removesuffix(_ACT_ORDER) == _GATE_UP


def has_act_order(layout: str) -> bool:
    """Whether columns are in an order of their own, which lies behind each matrix."""
    return layout.endswith(_ACT_ORDER)


def with_act_order(layout: str) -> str:
    """The packed layout that differs in that alone."""
    return layout.removesuffix(_ACT_ORDER) + _ACT_ORDER


def without_act_order(layout: str) -> str:
    """The packed layout that differs in that alone."""
    return layout.removesuffix(_ACT_ORDER)
