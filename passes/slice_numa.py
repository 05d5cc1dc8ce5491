"""Splits the weights of linears and experts over NUMA nodes, in proportion to their bandwidth."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.annotations import NodeSlice, Placement
from hetcomp.ir.plan import Call, Op, Plan
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass

PANEL = 16  # rows of a packed panel: the smallest piece that a kernel streams


@plan_pass(requires=("placed",), establishes=("sliced",))
def slice_numa(plan: Plan, context: Context) -> Plan:
    """Sets ``slices`` of ops with large weights: rows of a linear, the intermediate dimension of experts.

    On one node there is one slice over all of it. Experts that `place` gave to nodes as a whole are not sliced, nor is
    what lives on a GPU; of experts that live on both, the slices are those of the CPU's.
    """
    return replace(plan, calls=tuple(_slice_call(plan, call, context.profile) for call in plan.calls))


def node_slices(extent: int, profile: HardwareProfile) -> tuple[NodeSlice, ...]:
    """Cuts 0 .. ``extent`` in proportion to the nodes' bandwidths, at multiples of 16; empty parts are left out."""
    total = sum(profile.bandwidth(node.id) for node in profile.compute_nodes)
    slices, start, share = [], 0, 0.0
    for i, node in enumerate(profile.compute_nodes):
        share += profile.bandwidth(node.id) / total
        stop = extent if i == len(profile.compute_nodes) - 1 else min(extent, round(extent * share / PANEL) * PANEL)
        if stop > start:
            slices.append(NodeSlice(node.id, start, stop))
            start = stop
    return tuple(slices)


def _slice_call(plan: Plan, call: Call, profile: HardwareProfile) -> Call:
    template_ops = {op.id: op for op in plan.template(call.template).ops}
    return replace(
        call,
        placements=tuple((name, _slice(template_ops[name], p, profile)) for name, p in call.placements),
    )


def _slice(op: Op, placement: Placement, profile: HardwareProfile) -> Placement:
    extent = _split_extent(op)
    homes = {run.device for run in placement.experts if run.device.startswith("cpu:")}
    main = placement.device if placement.device.startswith("cpu:") else None
    if extent is None or len(homes) > 1 or (main is None and not homes):
        return placement  # whole experts by node, or nothing of it on the CPU
    return replace(placement, slices=node_slices(extent, profile))


def _split_extent(op: Op) -> int | None:
    if isinstance(op.attrs, ops.MoeExperts):
        return op.attrs.intermediate
    if isinstance(op.attrs, ops.Linear):
        return op.attrs.out_features
    return None
