"""FLOPs, bytes, arithmetic intensity and predicted CPU time of every op, in decode and in prefill."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from hetcomp.ir.annotations import Cost, PhaseCost
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template, ValueKind
from hetcomp.passes.adapter_time import cpu_pair_us, is_adapted
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import cached_fraction, cpu_time
from hetcomp.passes.phases import Phase, phases
from hetcomp.passes.registry import plan_pass
from hetcomp.passes.work import Values, work_of


@plan_pass(requires=("formats_chosen",), establishes=("costed",))
def annotate_cost(plan: Plan, context: Context) -> Plan:
    """Sets ``cost`` of every op: its work, and its time on the profile's CPU (see device_time).

    Where the profile's figures are not measured, were measured on a busy machine, or lack the plan's recurrences, a
    note says so.
    """
    profile = context.profile
    notes = [profile.caveat] if profile.caveat else []
    recurrent = any(op.kind == "gated_delta" for template in plan.templates for op in template.ops)
    if recurrent and profile.curves and profile.curve("gated_delta", "dram", "f32", context.isa) is None:
        notes.append(
            f"{profile.name}: gated_delta was not measured; its time on the CPU is from bandwidth and rates "
            "(hetcomp profile measures it)"
        )
    return replace(cost_plan(plan, phases(plan), context), notes=(*plan.notes, *notes))


def cost_plan(plan: Plan, steps: tuple[Phase, ...], context: Context) -> Plan:
    """The plan with every op's cost at each of ``steps``."""
    cached = {step: Cached.of(plan, step, context) for step in steps}

    def cost_template(template: Template) -> Template:
        values = template.value_map()
        ops = (
            replace(op, cost=Cost(tuple(_phase_cost(op, values, step, context, cached[step]) for step in steps)))
            for op in template.ops
        )
        return replace(template, ops=tuple(ops))

    return plan.map_templates({t.name: cost_template(t) for t in plan.templates})


@dataclass(frozen=True)
class Cached:
    """Part of the weights that caches still hold from the last use: of those that every step reads (between two uses
    lies what one step reads), and of experts (between two uses lies nearly everything)."""

    every_step: float
    experts: float

    @staticmethod
    def of(plan: Plan, step: Phase, context: Context) -> Cached:
        """In decode. Before a prompt something else ran, and its own activations pass through the caches."""
        if step.tokens != step.sequences:
            return Cached(0.0, 0.0)
        sizes = step_bytes(plan, step, context), working_set(plan, step, context)
        return Cached(*(cached_fraction(size, context.profile) for size in sizes))

    def part(self, op: Op) -> float:
        """That of ``op``."""
        return self.experts if isinstance(op.attrs, MoeExperts) else self.every_step


def step_bytes(plan: Plan, step: Phase, context: Context) -> float:
    """Bytes of weights and KV cache that one step reads."""
    total = 0.0
    for name, calls in Counter(call.template for call in plan.calls).items():
        template = plan.template(name)
        works = [work_of(op, template.value_map(), step, context.target) for op in template.ops]
        total += calls * sum(work.weight_bytes + work.state_bytes for work in works)
    return total


def working_set(plan: Plan, step: Phase, context: Context) -> float:
    """Bytes of all weights and of the KV cache up to the step's position: what decode comes back to, token after
    token."""
    filled = {"slots": step.sequences, "context": step.position}
    weights = sum(context.target.packed_bytes(v) for v in plan.values if v.kind is ValueKind.WEIGHT)
    return float(weights + sum(v.type.bytes(filled) for v in plan.values if v.kind is ValueKind.STATE))


def _phase_cost(op: Op, values: Values, step: Phase, context: Context, cached: Cached) -> PhaseCost:
    work = work_of(op, values, step, context.target)
    time = cpu_time(op, work, step, context.profile, context.isa, cached.part(op))
    rank = context.adapted_rank
    more = cpu_pair_us(op, work, rank, context.profile, context.isa) if rank and is_adapted(op) else 0.0
    return PhaseCost(
        phase=step.name,
        tokens=step.tokens,
        flops=work.flops,
        weight_bytes=work.weight_bytes,
        act_bytes=work.act_bytes,
        state_bytes=work.state_bytes,
        intensity=work.flops / max(work.bytes, 1.0),
        us=time.us + more,
        bound=time.bound,
    )
