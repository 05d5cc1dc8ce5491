"""The ops of a step that streams weights: what a GPU runs then of those that are the CPU's in other steps."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.ir.annotations import Placement
from hetcomp.ir.flat_ops import FlatOp
from hetcomp.ir.homes import memory_of
from hetcomp.ir.ops import Transfer
from hetcomp.ir.plan import Value, ValueKind


@dataclass(frozen=True)
class PromptOps:
    """``ops`` and ``values`` as one GPU has them then. ``arriving``: by name of a value, the id of the CPU's weight
    that is copied for it; each op has values of its own for them."""

    ops: tuple[FlatOp, ...]
    values: dict[str, Value]
    arriving: Mapping[str, str]


def prompt_ops(flat: Sequence[FlatOp], values: Mapping[str, Value], gpu: str, resident: Container[str]) -> PromptOps:
    """The step's ops for ``gpu``, where ``resident`` weights (and constants) lie anyway.

    A transfer whose two ends are on it then moves nothing: what it would have written is another name for what it
    reads. So is the GPU's copy of what the CPU makes, for ops that read that in other steps.
    """
    found: list[FlatOp] = []
    known = dict(values)
    alias: dict[str, str] = {}
    arriving: dict[str, str] = {}
    for f in flat:
        op, placement, attrs = f.op, f.placement, f.op.attrs
        if isinstance(attrs, Transfer):
            (name,), (copy,) = op.inputs, op.outputs
            here = alias.get(name, name)
            if placement.in_prompts:
                alias[copy] = here
                continue
            if attrs.source == gpu:
                alias[copy] = here
                op = replace(op, inputs=(here,))
            elif attrs.target == gpu:
                alias[name] = copy
            found.append(replace(f, op=op))
            continue
        moved = placement.in_prompts == gpu
        if not moved and memory_of(placement.device) != gpu:
            found.append(f)
            continue
        inputs = tuple(alias.get(name, name) for name in op.inputs)
        if moved:
            for name in inputs:
                if values[name].kind in (ValueKind.WEIGHT, ValueKind.CONST) and name not in resident:
                    arriving[f"{op.id} {name}"] = name
                    known[f"{op.id} {name}"] = replace(values[name], id=f"{op.id} {name}")
            inputs = tuple(n if f"{op.id} {n}" not in arriving else f"{op.id} {n}" for n in inputs)
            placement = Placement(gpu)
        found.append(replace(f, op=replace(op, inputs=inputs), placement=placement))
    return PromptOps(tuple(found), known, arriving)
