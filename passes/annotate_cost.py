"""FLOPs, bytes, arithmetic intensity and predicted time of every op, in decode and in prefill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir import ops
from hetcomp.ir.annotations import Cost, PhaseCost
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass

# Fixed time of one op on a lane besides its barrier: filling argument lists, drawing tasks. An estimate (some
# hundred instructions); it only matters for models whose layers take microseconds.
OP_LATENCY_US = 0.2


@dataclass(frozen=True)
class Phase:
    """A step to be costed: ``tokens`` tokens of ``sequences`` sequences whose last position is ``position``."""

    name: str
    tokens: int
    sequences: int
    position: int


def phases(plan: Plan) -> tuple[Phase, ...]:
    """Decode of one sequence and, where the plan keeps several, of all, each at a half-full cache; prefill of one
    full step at the start of a sequence."""
    context, batch, step = plan.dim("context").max, plan.dim("slots").max, plan.dim("T").max
    decode = [Phase("decode", 1, 1, context // 2)]
    if batch > 1:
        decode.append(Phase(f"decode batch {batch}", batch, batch, context // 2))
    return (*decode, Phase("prefill", step, 1, step))


@plan_pass(requires=("formats_chosen",), establishes=("costed",))
def annotate_cost(plan: Plan, context: Context) -> Plan:
    """Sets ``cost`` of every op from the roofline of the profile's CPU: max(bytes / bandwidth, FLOPs / rate).

    Where the profile's figures are not measured, or were measured on a busy machine, a note says so.
    """
    caveat = context.profile.caveat
    return replace(cost_plan(plan, phases(plan), context), notes=(*plan.notes, caveat) if caveat else plan.notes)


def cost_plan(plan: Plan, steps: tuple[Phase, ...], context: Context) -> Plan:
    """The plan with every op's cost at each of ``steps``."""

    def cost_template(template: Template) -> Template:
        values = template.value_map()
        return replace(
            template,
            ops=tuple(
                replace(op, cost=Cost(tuple(_phase_cost(op, values, step, context) for step in steps)))
                for op in template.ops
            ),
        )

    return plan.map_templates({t.name: cost_template(t) for t in plan.templates})


def roofline_us(
    profile: HardwareProfile, weight_format: str, isa: str | None, flops: float, moved: float
) -> tuple[float, str]:
    """Predicted microseconds and what bounds them (``memory`` or ``compute``)."""
    reached = profile.bandwidth() * profile.rate(weight_format, isa).bandwidth_fraction
    memory = moved / (reached * 1e3)  # GB/s = 1e3 bytes/us
    compute = flops / (profile.gflops(weight_format, isa=isa) * 1e3)
    return max(memory, compute) + OP_LATENCY_US, "memory" if memory >= compute else "compute"


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that ``tokens`` tokens are expected to choose if the choice is uniform."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)


def _phase_cost(op: Op, values: Mapping[str, Value], step: Phase, context: Context) -> PhaseCost:
    rows = _rows(op, values, step)
    dims = {"T": step.tokens, "R": rows, "slots": step.sequences, "context": step.position}
    weights, states, acts, form = 0.0, 0.0, 0.0, "f32"
    for i, name in enumerate((*op.inputs, *op.outputs)):
        value = values[name]
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
            weights += context.target.packed_bytes(value) * _share_read(op, i, rows)
            form = value.format if value.format not in (None, "f32") else form
        elif value.kind is ValueKind.STATE:
            states += _state_bytes(op, value, step)
        else:
            acts += value.type.bytes(dims)
    flops = _FLOPS.get(op.kind, _elementwise)(op, values, step, rows)
    moved = weights + states + acts
    us, bound = roofline_us(context.profile, form, context.isa, flops, moved)
    return PhaseCost(step.name, step.tokens, flops, weights, acts, states, flops / max(moved, 1.0), us, bound)


def _rows(op: Op, values: Mapping[str, Value], step: Phase) -> int:
    shape = values[(op.outputs or op.inputs)[0]].type.shape
    # Of a prompt only the last row's logits are wanted; of a decode step one row a sequence.
    return step.sequences if shape and shape[0] == "R" else step.tokens


def _share_read(op: Op, operand: int, rows: int) -> float:
    """Part of a weight operand that the step reads: the chosen experts, the rows of an embedding."""
    if isinstance(op.attrs, ops.MoeExperts):
        return expected_experts(op.attrs.experts, op.attrs.top_k, rows) / op.attrs.experts
    if isinstance(op.attrs, ops.Embed) and operand == 1:
        return min(1.0, rows / op.attrs.vocab)
    return 1.0


def _visible(window: int, step: Phase) -> float:
    """Mean number of positions that a token of the step attends to."""
    first = step.position - step.tokens // step.sequences + 1
    mean = (first + step.position) / 2
    return min(mean, window) if window else mean


def _state_bytes(op: Op, value: Value, step: Phase) -> float:
    per_position = value.type.bytes({"slots": 1, "context": 1})
    if isinstance(op.attrs, ops.Attention):
        last = min(step.position, op.attrs.window) if op.attrs.window else step.position
        return float(per_position * last * step.sequences)
    return float(per_position * step.tokens)


def _linear(op: Op, values: Mapping[str, Value], step: Phase, rows: int) -> float:
    a = op.attrs
    heads = a.heads if isinstance(a, ops.HeadLinear) else 1
    assert isinstance(a, (ops.Linear, ops.HeadLinear))
    return 2.0 * rows * heads * a.in_features * a.out_features


def _experts(op: Op, values: Mapping[str, Value], step: Phase, rows: int) -> float:
    a = op.attrs
    assert isinstance(a, ops.MoeExperts)
    return 6.0 * rows * a.top_k * a.hidden * a.intermediate


def _attention(op: Op, values: Mapping[str, Value], step: Phase, rows: int) -> float:
    a = op.attrs
    assert isinstance(a, ops.Attention)
    return 2.0 * rows * a.heads * (a.head_dim + a.v_head_dim) * _visible(a.window, step)


def _none(op: Op, values: Mapping[str, Value], step: Phase, rows: int) -> float:
    return 0.0


def _elementwise(op: Op, values: Mapping[str, Value], step: Phase, rows: int) -> float:
    """About four operations an element: the long tail is bound by memory and latency, not by these."""
    dims = {"T": step.tokens, "R": rows, "slots": step.sequences, "context": step.position}
    return 4.0 * math.fsum(values[o].type.numel(dims) for o in op.outputs)


_FLOPS: dict[str, Callable[[Op, Mapping[str, Value], Phase, int], float]] = {
    "linear": _linear,
    "head_linear": _linear,
    "moe_experts": _experts,
    "attention": _attention,
    "embed": _none,
    "kv_append": _none,
    "select_rows": _none,
    "slice": _none,
    "concat": _none,
    "transfer": _none,
}
