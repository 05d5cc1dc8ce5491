"""Order of the ops on their lane, and where the lane's threads must meet."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.ir.plan import Plan, Template
from hetcomp.ir.annotations import Schedule
from hetcomp.passes.context import Context
from hetcomp.passes.epochs import needs_barrier, written_by
from hetcomp.passes.registry import plan_pass


@plan_pass(requires=("transfers_inserted",), establishes=("scheduled",))
def schedule(plan: Plan, context: Context) -> Plan:
    """Sets ``schedule`` of every op: program order, with a barrier only before an op that reads what an op since
    the last barrier writes (q, k and v projections share none). Every template begins with one. Memory is planned
    afterwards and never shared within an epoch, so no other hazard exists."""
    lanes = {
        (call.template, op): placement.device for call in plan.calls for op, placement in call.placements
    }
    return plan.map_templates({t.name: _schedule(t, lanes) for t in plan.templates})


def _schedule(template: Template, lanes: dict[tuple[str, str], str]) -> Template:
    values = template.value_map()
    written: set[str] = set()
    ops = []
    for index, op in enumerate(template.ops):
        barrier = index == 0 or needs_barrier(op, written)
        if barrier:
            written = set()
        written |= written_by(op, values)
        ops.append(replace(op, schedule=Schedule(lanes[template.name, op.id], index, barrier)))
    return replace(template, ops=tuple(ops))
