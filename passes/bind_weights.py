"""Finds every weight in the checkpoint, from the headers alone."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass


@plan_pass(establishes=("weights_bound",))
def bind_weights(plan: Plan, context: Context) -> Plan:
    """Sets ``source`` of every weight. Without a checkpoint (config only) the plan stays unbound and says so.

    Raises HetcompError if a tensor is missing or has another shape or dtype.
    """
    checkpoint = context.checkpoint
    if checkpoint is None:
        return replace(plan, notes=(*plan.notes, "no checkpoint: weights are unbound, this plan cannot be compiled"))
    values = tuple(replace(v, source=checkpoint.source(v)) if v.kind is ValueKind.WEIGHT else v for v in plan.values)
    return replace(plan, values=values)
