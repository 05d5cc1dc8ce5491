"""Decides for every op, and for every single expert, the device it lives and runs on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import Candidate, ExpertPlacement, NodeSlice, Placement, Solution
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context
from hetcomp.passes.disk_reads import disk_reads
from hetcomp.passes.expert_statistics import UNIFORM, check_statistics
from hetcomp.passes.gpu_evidence import gpu_evidence
from hetcomp.passes.memory_table import MemoryRow, refuse_if_too_large, refuse_placement
from hetcomp.passes.mix_time import placed_mix_us
from hetcomp.passes.pins import Pin
from hetcomp.passes.placement_assignment import Assignment
from hetcomp.passes.placement_candidates import propose
from hetcomp.passes.placement_greedy import cpu_only
from hetcomp.passes.placement_problem import ExpertSet, Problem, placement_problem
from hetcomp.passes.registry import plan_pass


@plan_pass(requires=("costed",), establishes=("placed",))
def place(plan: Plan, context: Context) -> Plan:
    """Sets ``placements`` of every call, the plan's ``solution``, and ``disk`` where experts are read from there.

    Minimises the time of the plan's mix over GPU, CPU and streamed weights, within the memory of every device, the
    pinned memory and the user's pins: HiGHS, greedy and plain rules each propose a placement (see
    placement_candidates), and the one whose simulation is fastest is taken. Weights on the CPU are cut over the NUMA
    nodes by slice_numa; whole experts go to single nodes only where the cut does not fit. GPUs take part if the
    context says so; where code will be generated, what it cannot be generated for (``KernelTarget.gpu_refusal``) stays
    on the CPU.
    Raises HetcompError with a byte table if the plan does not fit, and if pins contradict or cannot be met.
    """
    _check_pins(context.pins, plan, context)
    if context.statistics is not None:
        check_statistics(context.statistics, plan)
    refuse_if_too_large(plan, context)
    if not context.use_gpus:
        plan = replace(plan, notes=(*plan.notes, *_unused_gpus(context)))
    problem = placement_problem(plan, context)
    if not problem.gpu_bytes and len(problem.node_share) == 1:
        # One memory and one lane: there is nothing to decide.
        return placed_as(plan, context, problem, cpu_only(problem))
    proposals = propose(problem)
    if not proposals.assignments:
        raise refuse_placement(plan, context, _limits(problem, context), proposals.message)
    plans: list[Plan] = []
    times: list[Candidate] = []
    for method, assignment in proposals.assignments:
        plans.append(placed_as(plan, context, problem, assignment))
        twin = next((i for i, other in enumerate(plans[:-1]) if other.calls == plans[-1].calls), None)
        us = placed_mix_us(plans[-1], context) if twin is None else times[twin].mix_us
        times.append(Candidate(method, us))
    best = min(range(len(times)), key=lambda i: (times[i].mix_us, i))
    solution = Solution(
        method=proposals.solver,
        objective_us=proposals.objective_us,
        bound_us=proposals.bound_us,
        greedy_us=proposals.greedy_us,
        gap=proposals.gap,
        statistics=context.statistics.name if context.statistics else UNIFORM,
        candidates=tuple(times),
        chosen=times[best].method,
    )
    notes = (*plan.notes, *gpu_evidence(plans[best], context), *_kept_on_cpu(plan, context))
    return replace(plans[best], solution=solution, notes=notes)


def _limits(problem: Problem, context: Context) -> tuple[MemoryRow, ...]:
    nodes = zip(context.profile.compute_nodes, problem.node_bytes, strict=True)
    rows = [MemoryRow(f"free on CPU node {node.id}", free) for node, free in nodes]
    rows += [MemoryRow(f"usable on gpu:{i} (without its runtime's)", free) for i, free in enumerate(problem.gpu_bytes)]
    return (*rows, MemoryRow("workspace of every device in use", problem.workspace_bytes))


def _unused_gpus(context: Context) -> tuple[str, ...]:
    return tuple(f"GPU {gpu.name} is not used: no memory of it may be (--vram 0)" for gpu in context.profile.gpus)


def _kept_on_cpu(plan: Plan, context: Context) -> tuple[str, ...]:
    """What has no GPU code, each reason once."""
    if context.planning:
        return ()
    ops = ((op, template) for template in plan.templates for op in template.ops)
    refusals = ((op, context.target.gpu_refusal(op, template)) for op, template in ops)
    reasons = {f"{op.role or op.kind} stays on the CPU: {why}" for op, why in refusals if why}
    return tuple(sorted(reasons))


def _check_pins(pins: tuple[Pin, ...], plan: Plan, context: Context) -> None:
    count = len(context.profile.gpus) if context.use_gpus else 0
    for pin in pins:
        kind, _, number = pin.device.partition(":")
        if kind == "gpu" and int(number) >= count:
            have = f"it has {count} GPU{'s' if count != 1 else ''}" if context.use_gpus else "no GPU takes part"
            raise HetcompError(
                f"Pin '{pin.text}' names {pin.device}, which profile {context.profile.name} does not offer ({have})."
            )
        ops = ((op, call.layer) for call in plan.calls for op in plan.template(call.template).ops)
        if not any(pin.matches(op, layer) for op, layer in ops):
            roles = sorted({op.role or op.kind for t in plan.templates for op in t.ops})
            raise HetcompError(
                f"Pin '{pin.text}' matches no op of {plan.model.name} ({plan.model.layers} layers); its roles are "
                f"{', '.join(roles)}."
            )


def placed_as(plan: Plan, context: Context, problem: Problem, assignment: Assignment) -> Plan:
    """The plan with the assignment of its problem as ``placements``, and ``disk`` as :func:`place` sets it."""
    main = f"cpu:{context.profile.compute_nodes[problem.main].id}"
    placed: dict[int, dict[str, Placement]] = defaultdict(dict)
    for index, group in enumerate(problem.groups):
        device = assignment.groups[index]
        placement = Placement(main if device == "cpu" else device, streamed=index in assignment.streamed)
        for op in group.ops:
            placed[group.call][op] = placement
    for e, counts in zip(problem.experts, assignment.experts, strict=True):
        spine = assignment.groups[e.spine]
        runs = _expert_runs(e, counts, context, main)
        nodes = {run.device for run in runs if memory_of(run.device) == CPU}
        slices: tuple[NodeSlice, ...] = ()
        if len(nodes) == 1 and any(option.startswith("cpu:") for options in counts for option in options):
            # Whole on one node, beside a GPU's or not: decided here, or slice_numa would cut what does not fit.
            slices = (NodeSlice(int(nodes.pop()[4:]), 0, _intermediate(plan, e)),)
        placed[e.call][e.op] = Placement(main if spine == "cpu" else spine, runs, slices)
    calls = []
    for index, call in enumerate(plan.calls):
        order = [op.id for op in plan.template(call.template).ops]
        calls.append(replace(call, placements=tuple((op, placed[index][op]) for op in order)))
    found = replace(plan, calls=tuple(calls))
    return replace(found, disk=disk_reads(found, context))


def _intermediate(plan: Plan, e: ExpertSet) -> int:
    attrs = next(op.attrs for op in plan.template(plan.calls[e.call].template).ops if op.id == e.op)
    assert isinstance(attrs, MoeExperts)
    return attrs.intermediate


def _expert_runs(
    e: ExpertSet, counts: tuple[dict[str, int], ...], context: Context, main: str
) -> tuple[ExpertPlacement, ...]:
    """Experts by number, neighbours with one fate joined. Within a class the lowest numbers go to the GPU."""
    nodes = context.profile.compute_nodes
    fate: dict[int, tuple[str, str | None]] = {}
    for cls, options in zip(e.classes, counts, strict=True):
        members = iter(cls.members)
        for option in sorted(options, key=lambda o: ({"gpu": 0, "stream": 1}.get(o.partition(":")[0], 2), o)):
            kind, _, number = option.partition(":")
            home = option if kind == "gpu" else (f"cpu:{nodes[int(number)].id}" if kind == "cpu" and number else main)
            for _ in range(options[option]):
                fate[next(members)] = (home, f"gpu:{number}" if kind == "stream" else None)
    runs: list[ExpertPlacement] = []
    for expert in sorted(fate):
        device, streamed = fate[expert]
        last = runs[-1] if runs else None
        if last is not None and (last.device, last.streamed_to) == (device, streamed):
            runs[-1] = replace(last, last=expert)
        else:
            runs.append(ExpertPlacement(expert, expert, device, streamed))
    return tuple(runs)
