"""Splits the weights of linears and experts over NUMA nodes, in proportion to their bandwidth."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.annotations import ExpertPlacement, NodeSlice, Placement
from hetcomp.ir.layouts import has_act_order, has_gate_up
from hetcomp.ir.node_parts import shared_weights
from hetcomp.ir.plan import Call, Op, Plan, Template
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass
from hetcomp.quantised_numbers import K_SCALES

PANEL = 16  # rows of a packed panel: the smallest piece that a kernel streams
GROUP = 32  # columns that share a scale in the quantised formats
BLOCK = 128  # rows and columns that share a scale in fp8
K_BLOCK = 256  # columns that share one in K blocks


@plan_pass(requires=("placed",), establishes=("sliced",))
def slice_numa(plan: Plan, context: Context) -> Plan:
    """Sets ``slices`` of ops with large weights: rows of a linear, the intermediate dimension of experts.

    Where columns of down have an order of their own, whose runs are none of the intermediate dimension, nodes get whole
    experts. On one node, or where the cut leaves one node all of it, there is one slice. Experts that `place` gave to
    nodes as a whole are not sliced, nor is what lives on a GPU or is read by several ops (tied embeddings); of experts
    that live on both, the slices are those of the CPU's.
    """
    shared = shared_weights(plan)
    return replace(plan, calls=tuple(_slice_call(plan, call, context.profile, shared) for call in plan.calls))


def node_slices(extent: int, profile: HardwareProfile, step: int = PANEL) -> tuple[NodeSlice, ...]:
    """Cuts 0 .. ``extent`` in proportion to the nodes' bandwidths, at multiples of ``step``; empty parts are left out,
    and a single one is the fastest node's."""
    nodes = profile.compute_nodes
    total = sum(profile.bandwidth(node.id) for node in nodes)
    slices, start, share = [], 0, 0.0
    for i, node in enumerate(nodes):
        share += profile.bandwidth(node.id) / total
        stop = extent if i == len(nodes) - 1 else min(extent, round(extent * share / step) * step)
        if stop > start:
            slices.append(NodeSlice(node.id, start, stop))
            start = stop
    if len(slices) > 1:
        return tuple(slices)
    return (NodeSlice(max(nodes, key=lambda node: profile.bandwidth(node.id)).id, 0, extent),)


def _slice_call(plan: Plan, call: Call, profile: HardwareProfile, shared: set[str]) -> Call:
    template = plan.template(call.template)
    template_ops = {op.id: op for op in template.ops}
    whole = {formal for formal, actual in zip(template.params, call.args, strict=True) if actual in shared}
    return replace(
        call,
        placements=tuple(
            (name, p if whole & set(template_ops[name].inputs) else _slice(template_ops[name], template, p, profile))
            for name, p in call.placements
        ),
    )


def _slice(op: Op, template: Template, placement: Placement, profile: HardwareProfile) -> Placement:
    homes = {run.device for run in placement.experts if run.device.startswith("cpu:")}
    main = placement.device if placement.device.startswith("cpu:") else None
    if placement.slices or len(homes) > 1 or (main is None and not homes):
        return placement  # experts that place put on nodes as a whole, or nothing of it on the CPU
    values = template.value_map()
    formats = {values[name].format for name in op.inputs}
    if isinstance(op.attrs, ops.MoeExperts):
        step = K_BLOCK if formats & set(K_SCALES) else BLOCK if "fp8" in formats else GROUP
        slices = node_slices(op.attrs.intermediate, profile, step)
        layouts = {values[name].type.layout for name in op.inputs}
        if len(slices) > 1 and any(has_act_order(layout) and not has_gate_up(layout) for layout in layouts):
            return replace(placement, experts=_whole_experts(placement.experts, profile))
        return replace(placement, slices=slices)
    if isinstance(op.attrs, ops.Linear):
        step = BLOCK if "fp8" in formats else PANEL
        return replace(placement, slices=node_slices(op.attrs.out_features, profile, step))
    return placement


def _whole_experts(runs: tuple[ExpertPlacement, ...], profile: HardwareProfile) -> tuple[ExpertPlacement, ...]:
    """The runs of experts with those of the CPU given to its nodes in proportion to their bandwidths."""
    ours = [run for run in runs if run.device.startswith("cpu:")]
    found = [run for run in runs if run not in ours]
    before = 0
    for run in ours:
        count = run.last - run.first + 1
        for part in node_slices(sum(r.last - r.first + 1 for r in ours), profile, 1):
            start, stop = max(part.start - before, 0), min(part.stop - before, count)
            if start < stop:
                ends = run.first + start, run.first + stop - 1
                found.append(replace(run, first=ends[0], last=ends[1], device=f"cpu:{part.node}"))
        before += count
    return tuple(sorted(found, key=lambda run: run.first))
