"""What CPU and GPU hand to each other in a step: the hand-overs, and the pinned buffers that both read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetcomp.ir.cpu_side import CpuRole, CpuTemplate, HandOver, cpu_templates, hand_overs
from hetcomp.ir.deferral import deferrals
from hetcomp.ir.plan import Op, Plan, Template

# What the CPU's experts get and give, by the op's operand; and the one value of a transfer.
EXPERT_INPUTS = ("x", "ids", "weights")
EXPERT_SUM = "sum"
VALUE = "value"


@dataclass(frozen=True)
class PinnedBuffer:
    """A buffer in memory that both read. ``to_cpu``: GPU kernels write it, else the CPU does."""

    name: str
    bytes: int
    to_cpu: bool


@dataclass(frozen=True)
class Exchange:
    """``buffers`` in the order of hetcomp_step.pinned; ``indices``: by hand-over and part, which of them carries it."""

    sides: Mapping[str, CpuTemplate]
    hand_overs: tuple[HandOver, ...]
    buffers: tuple[PinnedBuffer, ...]
    indices: Mapping[tuple[int, str], int]

    def buffer(self, hand_over: HandOver, part: str) -> PinnedBuffer:
        """The buffer of one part of a hand-over."""
        return self.buffers[self.indices[hand_over.flag, part]]

    @staticmethod
    def of(plan: Plan) -> Exchange:
        """The exchange that a plan with transfers fixes."""
        sides = cpu_templates(plan)
        found = hand_overs(plan, sides)
        buffers: dict[str, PinnedBuffer] = {}
        carried: dict[tuple[int, str], str] = {}
        deferring, turn = bool(deferrals(plan)), 0
        for hand_over in found:
            template = plan.template(plan.calls[hand_over.call].template)
            op = next(op for op in template.ops if op.id == hand_over.op)
            # While the CPU computes what a layer deferred, the GPU may hand out the next layer's input.
            turn += hand_over.role is CpuRole.EXPERTS
            suffix = f"_{turn % 2}" if deferring else ""
            for part, buffer in _parts(hand_over, op, template, plan.max_dims(), suffix).items():
                buffers.setdefault(buffer.name, buffer)
                carried[hand_over.flag, part] = buffer.name
        order = {name: i for i, name in enumerate(buffers)}
        indices = {key: order[name] for key, name in carried.items()}
        return Exchange(sides, found, tuple(buffers.values()), indices)


def _parts(
    hand_over: HandOver, op: Op, template: Template, dims: Mapping[str, int], suffix: str
) -> dict[str, PinnedBuffer]:
    def size(name: str) -> int:
        return template.value(name).type.bytes(dict(dims))

    if hand_over.role is CpuRole.EXPERTS:
        # All layers share them: a layer's input is handed out after the sum of the one before was read. Where experts
        # are deferred the inputs have two sets that are taken in turns.
        sizes = {part: size(name) for part, name in zip(EXPERT_INPUTS, op.inputs, strict=False)}
        made = {part: PinnedBuffer(f"experts_{part}_{n}{suffix}", n, True) for part, n in sizes.items()}
        n = size(op.outputs[0])
        return {**made, EXPERT_SUM: PinnedBuffer(f"experts_{EXPERT_SUM}_{n}", n, False)}
    name = f"transfer_{hand_over.flag}"
    return {VALUE: PinnedBuffer(name, size(op.outputs[0]), hand_over.role is CpuRole.AWAIT)}
