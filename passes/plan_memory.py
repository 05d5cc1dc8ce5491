"""Gives every activation and workspace its place in the arena: lifetimes to offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hetcomp.ir.annotations import ArenaSlot
from hetcomp.ir.cpu_side import CpuTemplate, cpu_templates
from hetcomp.ir.deferral import deferral_buffers
from hetcomp.ir.lifetimes import Lifetime, place_lifetimes
from hetcomp.ir.node_parts import NodePart, part_workspace, plan_parts
from hetcomp.ir.plan import Op, Plan, Template, ValueKind
from hetcomp.ir.target import KernelTarget
from hetcomp.passes.context import Context
from hetcomp.passes.epochs import epochs
from hetcomp.passes.memory_table import refuse_if_too_large
from hetcomp.passes.registry import plan_pass


@plan_pass(requires=("scheduled",), establishes=("memory_planned",))
def plan_memory(plan: Plan, context: Context) -> Plan:
    """Sets the templates' ``arena``, the plan's ``call_arena`` and ``arena_bytes``, at the dimensions' upper bounds.

    The arena is the CPU's; what a GPU computes with has memory there, which its backend lays out. Values handed from
    call to call, and what is deferred, live in front, a template's own values and workspaces behind them; templates
    share that part, since one call runs at a time. Raises HetcompError if all memory together does not fit.
    """
    sides = cpu_templates(plan)
    call_arena, call_bytes = place_lifetimes((*_call_lifetimes(plan, sides), *deferral_buffers(plan)), 0)
    templates: dict[str, Template] = {}
    top = call_bytes
    parts = plan_parts(plan)
    for template in plan.templates:
        slots: tuple[ArenaSlot, ...] = ()
        end = call_bytes
        if template.name in sides:
            slots, end = place_lifetimes(_template_lifetimes(plan, sides[template.name], parts, context), call_bytes)
        templates[template.name] = replace(template, arena=slots)
        top = max(top, end)
    planned = replace(plan.map_templates(templates), call_arena=call_arena, arena_bytes=top)
    refuse_if_too_large(planned, context)
    return planned


def _call_lifetimes(plan: Plan, sides: Mapping[str, CpuTemplate]) -> list[Lifetime]:
    dims = plan.max_dims()
    values = {v.id: v for v in plan.values if v.kind is ValueKind.ACT}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, call in enumerate(plan.calls):
        side = sides[call.template]
        formals = (*side.template.params, *side.template.results)
        for formal, name in zip(formals, (*call.args, *call.results), strict=True):
            if name in values and formal in side.arena:
                first.setdefault(name, i)
                last[name] = i
    return [Lifetime(n, values[n].type.bytes(dims), first[n], last[n]) for n in first]


def op_workspace(
    op: Op, template: Template, parts: Sequence[NodePart], dims: Mapping[str, int], target: KernelTarget
) -> int:
    """Bytes of scratch memory that the op needs, all its parts on NUMA nodes and their sums included."""
    if not parts:
        return target.workspace_bytes(op, template, dims)
    sizes = [target.workspace_bytes(*part.of(op, template), dims) for part in parts]
    return part_workspace(op, template, parts, sizes, dims).bytes


def _template_lifetimes(
    plan: Plan, side: CpuTemplate, parts: Mapping[tuple[str, str], Sequence[NodePart]], context: Context
) -> list[Lifetime]:
    dims, template = plan.max_dims(), side.template
    values = template.value_map()
    outside = {*template.params, *template.results}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    lifetimes = []
    for op, epoch in zip(template.ops, epochs(template), strict=True):
        for name in (*op.inputs, *op.outputs):
            if name in side.arena and name not in outside:
                first.setdefault(name, epoch)
                last[name] = epoch
        scratch = op_workspace(op, template, parts.get((template.name, op.id), ()), dims, context.target)
        if scratch:
            lifetimes.append(Lifetime(f"workspace:{op.id}", scratch, epoch, epoch))
    return lifetimes + [Lifetime(n, values[n].type.bytes(dims), first[n], last[n]) for n in first]
