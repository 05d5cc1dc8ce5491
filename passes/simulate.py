"""Runs the plan on simulated lanes: the predicted timeline of decode and prefill."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from hetcomp.ir.annotations import LaneShare, Placement, Timeline
from hetcomp.ir.plan import Plan
from hetcomp.passes.annotate_cost import Phase, phases
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass


@plan_pass(requires=("memory_planned",), establishes=("simulated",))
def simulate(plan: Plan, context: Context) -> Plan:
    """Sets ``timelines``: a discrete-event simulation of in-order lanes.

    An op starts when its lane is free and its inputs are there; a barrier costs what the profile measured. An op
    sliced over NUMA nodes takes all of their lanes, each for its share of the work.
    """
    timelines = tuple(timeline(plan, i, step, context) for i, step in enumerate(phases(plan)))
    return replace(plan, timelines=timelines)


def timeline(plan: Plan, phase: int, step: Phase, context: Context) -> Timeline:
    """The simulated step whose costs are entry ``phase`` of every op's."""
    free: dict[str, float] = defaultdict(float)
    busy: dict[str, float] = defaultdict(float)
    roles: dict[str, float] = defaultdict(float)
    ready: dict[str, float] = defaultdict(float)  # by plan value
    for index, call in enumerate(plan.calls):
        template = plan.template(call.template)
        formals = (*template.params, *template.results)
        names = dict(zip(formals, (*call.args, *call.results), strict=True))
        placements = dict(call.placements)
        for op in template.ops:
            assert op.schedule is not None
            cost = op.cost.phases[phase].us if op.cost else context.profile.barrier_us
            cost += context.profile.barrier_us if op.schedule.barrier_before else 0.0
            shares = _lanes(placements[op.id])
            inputs = [ready[names.get(i, f"{index}.{i}")] for i in op.inputs]
            start = max([*inputs, *(free[lane] for lane in shares)])
            for lane, share in shares.items():
                busy[lane] += cost * share
                free[lane] = start + cost * max(shares.values())
            for output in op.outputs:
                ready[names.get(output, f"{index}.{output}")] = start + cost * max(shares.values())
            roles[op.role or op.kind] += cost * max(shares.values())
    total = max(free.values(), default=0.0)
    return Timeline(
        phase=step.name,
        tokens=step.tokens,
        total_us=total,
        tokens_per_s=step.tokens / total * 1e6 if total else 0.0,
        lanes=tuple(LaneShare(lane, us) for lane, us in sorted(busy.items())),
        roles=tuple(sorted(roles.items(), key=lambda item: -item[1])),
    )


def _lanes(placement: Placement) -> dict[str, float]:
    """Lanes that the op occupies and their share of its work: by slices of the weights, by whole experts, or all
    of it. The op's cost is that of one node, so a share of 1/2 on each of two nodes takes half the time."""
    if len(placement.slices) > 1:
        parts = [(f"cpu:{piece.node}", piece.stop - piece.start) for piece in placement.slices]
    else:
        parts = [(run.device, run.last - run.first + 1) for run in placement.experts]
    if len(parts) < 2:
        return {placement.device: 1.0}
    total = sum(extent for _, extent in parts)
    return {lane: extent / total for lane, extent in parts}
