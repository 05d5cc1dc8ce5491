"""Which ops one thread does alone when a step has one token.

A layer has ten or more ops that take less time than the barriers between them. Thread 0 does a run of such ops within
one barrier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hetcomp.ir.node_parts import plan_parts
from hetcomp.ir.plan import Op, Plan, Template

# Bytes of weights, activations and state of an op that thread 0 may do alone: at some 10 GB/s as long as a barrier or
# two of 16 threads.
_ALONE_BYTES = 64 << 10
# Ops that share out their work however little it is: the time of attention grows with the context.
_SHARED = ("linear", "head_linear", "moe_experts", "attention", "transfer")


@dataclass(frozen=True)
class OpFlow:
    """What the threads do around an op of a template when the step has one token.

    ``begins``: first op of a run that thread 0 does alone; ``resumes``: of one that the template before left open.
    ``ends``: last op of a run, and the others go on; ``stays_open``: the next template continues it. ``follows``: the
    end of a run is the barrier before this op.
    """

    begins: bool = False
    resumes: bool = False
    ends: bool = False
    stays_open: bool = False
    follows: bool = False


def decode_flow(plan: Plan) -> dict[tuple[str, str], OpFlow]:
    """The flow around every op of a scheduled plan, by (template name, op id)."""
    cut = plan_parts(plan)
    runs = {t.name: [_alone(op) and (t.name, op.id) not in cut for op in t.ops] for t in plan.templates}
    in_run = {t.name: _in_run(t, runs[t.name], False) for t in plan.templates}
    open_ended, resuming = _joints(plan, in_run)
    flows: dict[tuple[str, str], OpFlow] = {}
    for template in plan.templates:
        resumes, stays_open = template.name in resuming, template.name in open_ended
        inside = _in_run(template, runs[template.name], resumes)
        for i, op in enumerate(template.ops):
            before = inside[i - 1] if i > 0 else resumes
            ends = inside[i] and not (i + 1 < len(inside) and inside[i + 1])
            open_here = ends and i + 1 == len(inside) and stays_open
            flows[template.name, op.id] = OpFlow(
                begins=inside[i] and not before,
                resumes=i == 0 and resumes,
                ends=ends and not open_here,
                stays_open=open_here,
                follows=before and not inside[i],
            )
    return flows


def _alone(op: Op) -> bool:
    if op.kind in _SHARED or op.cost is None:
        return False
    decode = next((p for p in op.cost.phases if p.tokens == 1), None)
    return decode is not None and decode.weight_bytes + decode.act_bytes + decode.state_bytes <= _ALONE_BYTES


def _in_run(template: Template, alone: Sequence[bool], resumes: bool) -> list[bool]:
    """Whether each op is in a run; one begins at a barrier."""
    result: list[bool] = []
    inside = resumes
    for op, here in zip(template.ops, alone, strict=True):
        inside = here and (inside or op.schedule is None or op.schedule.barrier_before)
        result.append(inside)
    return result


def _joints(plan: Plan, in_run: Mapping[str, Sequence[bool]]) -> tuple[set[str], set[str]]:
    """Templates that leave their last run open, and those that resume it: wherever one of the former is called, one of
    the latter is next, and the other way round."""
    names = [call.template for call in plan.calls]
    open_ended = {name for name, inside in in_run.items() if inside and inside[-1]} - set(names[-1:])
    resuming = {name for name, inside in in_run.items() if inside and inside[0]} - set(names[:1])
    while True:
        closed = {a for a, b in pairwise(names) if b not in resuming} & open_ended
        fresh = {b for a, b in pairwise(names) if a not in open_ended} & resuming
        if not closed and not fresh:
            return open_ended, resuming
        open_ended -= closed
        resuming -= fresh
