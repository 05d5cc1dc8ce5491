"""Where the sides of a step (the CPU, each GPU) wait for each other: who gives, and who takes."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.ir.annotations import Placement
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.node_parts import node_parts
from hetcomp.ir.ops import MoeExperts, Transfer
from hetcomp.ir.plan import Op, Plan, Template, ValueKind


@dataclass(frozen=True, slots=True)
class HandOver:
    """``giver`` raises flag number ``flag`` when what the op moves is there, ``taker`` waits for that; both are
    memories (``cpu``, ``gpu:0``). ``answered``: the giver then waits for what the taker computes with it, the sum of
    its experts. ``flag`` counts the hand-overs of all sides in the order of the step."""

    flag: int
    call: int
    op: str
    giver: str
    taker: str
    answered: bool


def hand_overs(plan: Plan) -> tuple[HandOver, ...]:
    """All hand-overs of a step in its order."""
    found: list[HandOver] = []
    for index, call in enumerate(plan.calls):
        template = plan.template(call.template)
        placements = dict(call.placements)
        for op in template.ops:
            ends = _ends(op, placements.get(op.id), template)
            if ends is not None:
                found.append(HandOver(len(found), index, op.id, *ends))
    return tuple(found)


def returns_result(op: Op, template: Template) -> bool:
    """Whether the op is the transfer of a step's result, which nobody waits for: it is read when the step is over."""
    return isinstance(op.attrs, Transfer) and template.value(op.outputs[0]).kind is ValueKind.OUTPUT


def _ends(op: Op, placement: Placement | None, template: Template) -> tuple[str, str, bool] | None:
    if placement is None:  # not placed: everything is on the CPU
        return None
    if isinstance(op.attrs, Transfer):
        return None if returns_result(op, template) else (op.attrs.source, op.attrs.target, False)
    home = memory_of(placement.device)
    if isinstance(op.attrs, MoeExperts) and home != CPU and node_parts(op, placement):
        return home, CPU, True
    return None
