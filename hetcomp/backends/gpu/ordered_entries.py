"""Launches that bring the activations of experts into the orders that the columns of their matrices have.

GEMVs load single numbers and follow an order as they go. A tile of a GEMM would load 2 bytes of each 32 that come from
the cache: there every entry (token, choice) gets a row in its expert's order first.
"""

from __future__ import annotations

from hetcomp.backends.gpu.expert_operands import Argument, ExpertOperands
from hetcomp.backends.gpu.kernels import ONE, Constant, GridAxis, Launch, Operand, launch
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.backends.gpu.words import words_before_order
from hetcomp.ir.layouts import has_act_order

_COLUMNS = 1024


def place_of_ordered(layout: str, numbers: int, at: int) -> tuple[Argument, int]:
    """Where so many numbers lie in the order of a weight's columns, from ``at`` of the workspace on, and the end of
    that; None if the weight's layout has no order."""
    if not has_act_order(layout):
        return None, at
    return ("*bf16", Operand("workspace", offset=at)), at + aligned(2 * numbers)


def x_in_order(of: ExpertOperands, x: Argument, y: Argument, starts: Argument, order: Argument) -> Launch:
    """x bf16 of the tokens as y of the entries in their order (experts_sort), for gate and up."""
    matrices, constants = of.gate_up()
    shape = 2 * of.attrs.intermediate, of.attrs.hidden
    before = words_before_order(*shape, of.weight_format, of.up_layout)
    its: dict[str, Constant] = {"K": of.attrs.hidden, "BY_TOKEN": True, "MATRIX": constants["MATRIX"], "ORDER": before}
    return _launch(of, f"{of.stem}_x_in_order", (x, starts, order, matrices["w"], y), its, of.attrs.hidden)


def h_in_order(of: ExpertOperands, h: Argument, y: Argument, starts: Argument, order: Argument) -> Launch:
    """h bf16 of the entries in their order as y, for down."""
    matrices, constants = of.down()
    before = words_before_order(of.attrs.hidden, of.attrs.intermediate, of.down_format, of.down_layout)
    its: dict[str, Constant] = {
        "K": of.attrs.intermediate,
        "BY_TOKEN": False,
        "MATRIX": constants["MATRIX"],
        "ORDER": before,
    }
    return _launch(of, f"{of.stem}_h_in_order", (h, starts, order, matrices["w"], y), its, of.attrs.intermediate)


def _launch(
    of: ExpertOperands, stem: str, operands: tuple[Argument, ...], constants: dict[str, Constant], width: int
) -> Launch:
    x, starts, order, w, y = operands
    columns = min(power_of_two(width), _COLUMNS)
    return launch(
        "experts_prefill",
        "experts_in_order",
        stem,
        (GridAxis(tile=1, scale=of.attrs.top_k), GridAxis(-(-width // columns)), ONE),
        {"x": x, "starts": starts, "order": order, "ids": of.ids, "resident": of.resident, "w": w, "y": y},
        {**constants, "EXPERTS": of.here, "TOP_K": of.attrs.top_k, "COLUMNS": columns},
    )
