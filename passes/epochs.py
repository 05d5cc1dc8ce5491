"""Epochs: the stretches of a template between two barriers. Ops of one epoch run at the same time."""

from __future__ import annotations

from collections.abc import Mapping

from hetcomp.ir.ops import STATE_WRITERS
from hetcomp.ir.plan import Op, Template, Value, ValueKind


def written_by(op: Op, values: Mapping[str, Value]) -> set[str]:
    """Values that the op writes: its outputs, and the state of a kind that writes it."""
    states = {i for i in op.inputs if values[i].kind is ValueKind.STATE} if op.kind in STATE_WRITERS else set()
    return {*op.outputs, *states}


def epochs(template: Template) -> list[int]:
    """Epoch of every op of a scheduled template, in order of the ops."""
    epoch, result = 0, []
    for op in template.ops:
        if op.schedule is not None and op.schedule.barrier_before:
            epoch += 1
        result.append(epoch)
    return result
