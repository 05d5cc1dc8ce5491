"""The simulated time of a placed plan's mix: what placements and formats are compared by."""

from __future__ import annotations

from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context
from hetcomp.passes.insert_transfers import insert_transfers
from hetcomp.passes.phases import phases
from hetcomp.passes.schedule import schedule
from hetcomp.passes.simulate import timeline
from hetcomp.passes.slice_numa import slice_numa
from hetcomp.passes.stream_experts import stream_experts
from hetcomp.passes.stream_weights import stream_weights


def placed_mix_us(plan: Plan, context: Context) -> float:
    """Microseconds of all prompts and answers if the placed plan is sliced, given streams of experts and transfers, and
    scheduled as the pipeline will do it. Routings are drawn from the same seeds for every plan."""
    sliced = stream_weights(slice_numa(plan, context), context)
    ready = ready_to_simulate(stream_experts(sliced, context), context)
    steps = enumerate(phases(plan))
    return sum(step.steps * timeline(ready, i, step, context).total_us for i, step in steps if step.steps > 0)


def sliced_step_us(plan: Plan, context: Context, name: str) -> float:
    """Microseconds of the step called ``name`` if the sliced plan is given transfers and scheduled."""
    ready = ready_to_simulate(plan, context)
    index, step = next((i, step) for i, step in enumerate(phases(plan)) if step.name == name)
    return timeline(ready, index, step, context).total_us


def ready_to_simulate(plan: Plan, context: Context) -> Plan:
    """A sliced plan with transfers and schedule."""
    return schedule(insert_transfers(plan, context), context)


def mix_us(plan: Plan) -> float:
    """The same of a simulated plan, from its timelines."""
    by_name = {t.phase: t.total_us for t in plan.timelines}
    return sum(step.steps * by_name[step.name] for step in phases(plan) if step.steps > 0)
