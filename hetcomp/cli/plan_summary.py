"""What a plan does, summed up by op group: the numbers behind ``hetcomp plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hetcomp.backends.packing import packed_bytes
from hetcomp.ir.annotations import PhaseCost
from hetcomp.ir.plan import Call, Op, Plan, Template, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.passes.memory_table import state_bytes

_WEIGHTS = (ValueKind.WEIGHT, ValueKind.CONST)


@dataclass
class PhaseSum:
    """Costs of a group in one phase, for the whole step of ``tokens`` tokens.

    ``us``: what the simulation says of the group, barriers included; before simulate ran, the sum of the ops'
    predictions."""

    phase: str
    tokens: int
    flops: float = 0.0
    weight_bytes: float = 0.0
    moved_bytes: float = 0.0
    us: float = 0.0
    us_by_bound: dict[str, float] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved (weights, activations and state)."""
        return self.flops / self.moved_bytes if self.moved_bytes else 0.0

    @property
    def bound(self) -> str:
        """``memory`` or ``compute``: what bounds the larger part of the group's time; empty if unknown."""
        return max(self.us_by_bound, key=lambda bound: self.us_by_bound[bound], default="")

    def add(self, cost: PhaseCost) -> None:
        """Adds one op of one call."""
        self.flops += cost.flops
        self.weight_bytes += cost.weight_bytes
        self.moved_bytes += cost.weight_bytes + cost.act_bytes + cost.state_bytes
        self.us += cost.us
        self.us_by_bound[cost.bound] = self.us_by_bound.get(cost.bound, 0.0) + cost.us


@dataclass
class OpGroup:
    """All ops of one role, over all calls.

    ``weight_bytes``: what lies in memory; each weight is counted once, at the first group that uses it."""

    role: str
    ops: int = 0
    devices: list[str] = field(default_factory=list)
    weight_bytes: int = 0
    phases: dict[str, PhaseSum] = field(default_factory=dict)

    def phase(self, name: str) -> PhaseSum | None:
        """The sums of one phase, None if the plan has no costs."""
        return self.phases.get(name)


@dataclass(frozen=True)
class MemoryItem:
    """One line of the memory table."""

    what: str
    bytes: int


@dataclass(frozen=True)
class PlanSummary:
    """Op groups in order of first use, and memory: weights by role and format, KV cache, arena."""

    groups: tuple[OpGroup, ...]
    memory: tuple[MemoryItem, ...]

    @property
    def memory_bytes(self) -> int:
        """Sum of the memory table."""
        return sum(item.bytes for item in self.memory)

    def phases(self) -> tuple[str, ...]:
        """Names of the phases that ops are costed for, in order."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group.phases))


def summarise(plan: Plan) -> PlanSummary:
    """Sums up costs, placements and memory of any plan; what no pass has filled in yet is left out."""
    groups: dict[str, OpGroup] = {}
    counted: set[str] = set()
    memory: dict[str, int] = {}
    values = plan.value_map()
    for call, template, op in _uses(plan):
        group = groups.setdefault(op.role or op.kind, OpGroup(op.role or op.kind))
        group.ops += 1
        _add_devices(group, call, op)
        for cost in op.cost.phases if op.cost else ():
            group.phases.setdefault(cost.phase, PhaseSum(cost.phase, cost.tokens)).add(cost)
        actual = dict(zip(template.params, call.args, strict=True))
        for name in op.inputs:
            value = values.get(actual.get(name, ""))
            if value is None or value.kind not in _WEIGHTS or value.id in counted or value.format is None:
                continue
            counted.add(value.id)
            size = packed_bytes(value)
            group.weight_bytes += size
            what = f"weights, {weight_role(op)}, {value.format}"
            memory[what] = memory.get(what, 0) + size
    for group in groups.values():
        group.devices.sort()
    _take_timelines(plan, groups)
    return PlanSummary(tuple(groups.values()), _memory(plan, memory))


def _uses(plan: Plan) -> Iterator[tuple[Call, Template, Op]]:
    templates = {template.name: template for template in plan.templates}
    for call in plan.calls:
        for op in templates[call.template].ops:
            yield call, templates[call.template], op


def _add_devices(group: OpGroup, call: Call, op: Op) -> None:
    for op_id, placement in call.placements:
        if op_id != op.id:
            continue
        devices = [run.device for run in placement.experts] or [placement.device]
        devices += [f"cpu:{part.node}" for part in placement.slices]
        group.devices.extend(d for d in dict.fromkeys(devices) if d not in group.devices)


def _take_timelines(plan: Plan, groups: dict[str, OpGroup]) -> None:
    """The simulation knows barriers and slices over nodes, the ops' own predictions do not."""
    for timeline in plan.timelines:
        for role, us in timeline.roles:
            phase = groups[role].phase(timeline.phase) if role in groups else None
            if phase is not None:
                phase.us = us


def _memory(plan: Plan, weights: dict[str, int]) -> tuple[MemoryItem, ...]:
    dims = plan.max_dims()
    items = [MemoryItem(what, size) for what, size in weights.items()]
    items += [MemoryItem(what, size) for what, size in state_bytes(plan).items()]
    if plan.arena_bytes:
        items.append(MemoryItem(f"activations, {dims['T']} tokens a step", plan.arena_bytes))
    return tuple(items)
