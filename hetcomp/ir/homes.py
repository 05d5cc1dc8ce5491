"""In which memories the values of a placed plan are wanted."""

from __future__ import annotations

from collections import defaultdict

from hetcomp.ir.annotations import Placement
from hetcomp.ir.node_parts import gpu_part, node_parts
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan

CPU = "cpu"


def memory_of(device: str) -> str:
    """The memory that a device reads: all CPU nodes share one address space, every GPU has its own."""
    return CPU if device.startswith("cpu:") else device


def number(device: str) -> int:
    """1 of ``gpu:1``."""
    return int(device.partition(":")[2])


def read_in(plan: Plan) -> dict[str, set[str]]:
    """By id of the plan's value: the memories (``cpu``, ``gpu:0``) in which ops read it whole; of weights that are cut
    those are other values (``cut_weights``, ``gpu_cut_weights``)."""
    found: dict[str, set[str]] = defaultdict(set)
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        placements = dict(call.placements)
        for op in template.ops:
            cut = cut_operands(op, placements[op.id]) if op.id in placements else set()
            memory = memory_of(placements[op.id].device) if op.id in placements else CPU
            for i, name in enumerate(op.inputs):
                if name in actual and i not in cut:
                    found[actual[name]].add(memory)
    return found


def cut_operands(op: Op, placement: Placement) -> set[int]:
    """Operands that no device has whole: it has parts of them, or nothing."""
    cut = {operand for part in node_parts(op, placement) for operand, _ in part.cuts}
    if not isinstance(op.attrs, MoeExperts) or not placement.device.startswith("gpu:"):
        return cut
    part = gpu_part(op, placement)
    here = any(run.device == placement.device for run in placement.experts)
    return {operand for operand, _ in part.cuts} if part else set() if here else cut


def on_gpu(plan: Plan) -> tuple[str, ...]:
    """The GPUs that the plan's ops are placed on, ascending."""
    devices = {p.device for call in plan.calls for _, p in call.placements}
    return tuple(sorted(device for device in devices if device.startswith("gpu:")))
