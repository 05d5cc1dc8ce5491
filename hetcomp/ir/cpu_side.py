"""What the CPU does of a placed plan: its ops, and its part in the hand-overs to and from GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from hetcomp.ir.annotations import Placement
from hetcomp.ir.hand_overs import returns_result
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.node_parts import node_parts
from hetcomp.ir.ops import MoeExperts, Transfer
from hetcomp.ir.plan import Op, Plan, Template, ValueKind


class CpuRole(StrEnum):
    """What an op is for the CPU."""

    COMPUTE = "compute"  # all of it
    EXPERTS = "experts"  # its experts in CPU memory: awaits the input of a GPU and answers with their sum
    AWAIT = "await"  # a transfer from a GPU
    SEND = "send"  # a transfer to a GPU


def cpu_role(op: Op, placement: Placement | None, template: Template) -> CpuRole | None:
    """The op's role; None: the CPU has no part in it. Transfers of a step's results are the end of the step."""
    if placement is None:  # not placed: everything is on the CPU
        return CpuRole.COMPUTE
    if isinstance(op.attrs, Transfer):
        if returns_result(op, template):
            return None
        return CpuRole.AWAIT if op.attrs.target == CPU else CpuRole.SEND if op.attrs.source == CPU else None
    if memory_of(placement.device) == CPU:
        return CpuRole.COMPUTE
    return CpuRole.EXPERTS if isinstance(op.attrs, MoeExperts) and node_parts(op, placement) else None


@dataclass(frozen=True, slots=True)
class CpuTemplate:
    """The CPU's side of a template: its ops in order, with barriers where they belong among these alone; their roles;
    the activations that live in the CPU's arena, and those in pinned memory. ``moved``: ops that it has no part in
    where weights are streamed to a GPU."""

    template: Template
    roles: Mapping[str, CpuRole]
    arena: frozenset[str]
    moved: frozenset[str]


def cpu_templates(plan: Plan) -> dict[str, CpuTemplate]:
    """The CPU's side of every template that is called."""
    sides: dict[str, CpuTemplate] = {}
    for call in plan.calls:
        if call.template not in sides:
            sides[call.template] = _cpu_template(plan.template(call.template), dict(call.placements))
    return sides


def cpu_plan(plan: Plan, sides: Mapping[str, CpuTemplate]) -> Plan:
    """The plan with templates that have the CPU's ops alone."""
    return plan.map_templates({name: side.template for name, side in sides.items()})


def _cpu_template(template: Template, placements: Mapping[str, Placement]) -> CpuTemplate:
    roles: dict[str, CpuRole] = {}
    kept: list[Op] = []
    barrier = False
    for op in template.ops:
        barrier = barrier or (op.schedule is not None and op.schedule.barrier_before)
        role = cpu_role(op, placements.get(op.id), template)
        if role is None:
            continue
        roles[op.id] = role
        schedule = None if op.schedule is None else replace(op.schedule, barrier_before=barrier)
        kept.append(replace(op, schedule=schedule))
        barrier = False
    moved = frozenset(op for op in roles if op in placements and placements[op].in_prompts)
    return CpuTemplate(replace(template, ops=tuple(kept)), roles, _arena(template, kept, roles), moved)


def _arena(template: Template, kept: list[Op], roles: Mapping[str, CpuRole]) -> frozenset[str]:
    values = template.value_map()
    touched: set[str] = set()
    pinned: set[str] = set()
    for op in kept:
        role = roles[op.id]
        if role is CpuRole.COMPUTE:
            touched |= {*op.inputs, *op.outputs}
        elif role is CpuRole.SEND:
            touched |= set(op.inputs)
        elif role is CpuRole.AWAIT:
            pinned |= set(op.outputs)
    return frozenset(name for name in touched - pinned if values[name].kind is ValueKind.ACT)
