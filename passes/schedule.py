"""Order of the ops on their lane, and where the lane's threads must meet."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.ir.annotations import Schedule
from hetcomp.ir.plan import Plan, Template
from hetcomp.passes.context import Context
from hetcomp.passes.epochs import written_by
from hetcomp.passes.registry import plan_pass


@plan_pass(requires=("transfers_inserted",), establishes=("scheduled",))
def schedule(plan: Plan, context: Context) -> Plan:
    """Sets ``schedule`` of every op and brings the ops of a template into that order.

    An op's level is the longest chain of ops before it; ops of one level do not depend on each other (the q, k and
    v projections) and run without a barrier between them, so a template has as many barriers as its longest
    chain, which is the least possible. Memory is planned afterwards and never shared within a level, so reads
    after writes are the only hazard.
    """
    lanes = {(call.template, op): placement.device for call in plan.calls for op, placement in call.placements}
    return plan.map_templates({t.name: _schedule(t, lanes) for t in plan.templates})


def _schedule(template: Template, lanes: dict[tuple[str, str], str]) -> Template:
    values = template.value_map()
    written_at: dict[str, int] = {}
    levels = []
    for op in template.ops:
        level = max((written_at[name] + 1 for name in op.inputs if name in written_at), default=0)
        levels.append(level)
        for name in written_by(op, values):
            written_at[name] = max(level, written_at.get(name, 0))
    order = sorted(range(len(template.ops)), key=lambda i: (levels[i], i))
    ops = []
    previous = -1
    for index, i in enumerate(order):
        op = template.ops[i]
        ops.append(replace(op, schedule=Schedule(lanes[template.name, op.id], index, levels[i] != previous)))
        previous = levels[i]
    return replace(template, ops=tuple(ops))
