"""What the CPU and GPUs hand to each other in a step: the hand-overs, and the pinned buffers that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetcomp.ir.cpu_side import CpuTemplate, cpu_templates
from hetcomp.ir.deferral import deferrals
from hetcomp.ir.hand_overs import HandOver, hand_overs
from hetcomp.ir.homes import CPU
from hetcomp.ir.node_parts import gpu_part
from hetcomp.ir.plan import Op, Plan, Template

# What the CPU's experts get and give, by the op's operand; and the one value of a transfer.
EXPERT_INPUTS = ("x", "ids", "weights")
EXPERT_SUM = "sum"
VALUE = "value"


@dataclass(frozen=True)
class PinnedBuffer:
    """A buffer in memory that the CPU and all GPUs reach."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Exchange:
    """``buffers`` by name; ``carriers``: by hand-over and part, the name of the buffer that carries it. ``optional``:
    flags of hand-overs that are answered by nothing but zeros for tokens whose experts are all on the GPU: these need
    not be awaited."""

    sides: Mapping[str, CpuTemplate]
    hand_overs: tuple[HandOver, ...]
    buffers: Mapping[str, PinnedBuffer]
    carriers: Mapping[tuple[int, str], str]
    optional: frozenset[int]

    def before(self, hand_over: HandOver) -> int | None:
        """The flag of the last one that was answered before, if nobody may have awaited it."""
        earlier = [h.flag for h in self.hand_overs[: hand_over.flag] if h.answered]
        return earlier[-1] if earlier and earlier[-1] in self.optional else None

    def buffer(self, hand_over: HandOver, part: str) -> PinnedBuffer:
        """The buffer of one part of a hand-over."""
        return self.buffers[self.carriers[hand_over.flag, part]]

    def of_side(self, memory: str) -> dict[str, bool]:
        """Names of the buffers that the side (``cpu``, ``gpu:0``) writes (True) or reads, in the order of the step.
        The CPU's are in the order of hetcomp_step.pinned."""
        by_flag = {h.flag: h for h in self.hand_overs}
        found: dict[str, bool] = {}
        for (flag, part), name in self.carriers.items():
            writer, reader = by_flag[flag].giver, by_flag[flag].taker
            if part == EXPERT_SUM:
                writer, reader = reader, writer
            if memory in (writer, reader):
                found[name] = memory == writer
        return found

    def with_cpu(self) -> bool:
        """Whether the CPU takes part in any hand-over."""
        return any(CPU in (h.giver, h.taker) for h in self.hand_overs)

    @staticmethod
    def of(plan: Plan) -> Exchange:
        """The exchange that a plan with transfers fixes."""
        found = hand_overs(plan)
        buffers: dict[str, PinnedBuffer] = {}
        carriers: dict[tuple[int, str], str] = {}
        deferring, turn = bool(deferrals(plan)), 0
        optional = frozenset() if deferring else frozenset(h.flag for h in found if h.answered and _on_gpu(plan, h))
        for hand_over in found:
            template = plan.template(plan.calls[hand_over.call].template)
            op = next(op for op in template.ops if op.id == hand_over.op)
            # While the CPU computes what a layer deferred, or sees that it has nothing to do, the GPU may hand out the
            # next layer's input.
            turn += hand_over.answered
            suffix = f"_{turn % 2}" if deferring or optional else ""
            for part, buffer in _parts(hand_over, op, template, plan.max_dims(), suffix).items():
                buffers.setdefault(buffer.name, buffer)
                carriers[hand_over.flag, part] = buffer.name
        return Exchange(cpu_templates(plan), found, buffers, carriers, optional)


def _on_gpu(plan: Plan, hand_over: HandOver) -> bool:
    """Whether some of the experts are there in steps of decoding."""
    call = plan.calls[hand_over.call]
    op = next(op for op in plan.template(call.template).ops if op.id == hand_over.op)
    return plan.expert_cache is not None or gpu_part(op, dict(call.placements)[op.id]) is not None


def _parts(
    hand_over: HandOver, op: Op, template: Template, dims: Mapping[str, int], suffix: str
) -> dict[str, PinnedBuffer]:
    def size(name: str) -> int:
        return template.value(name).type.bytes(dict(dims))

    if hand_over.answered:
        # All layers share them, on whatever GPU: a layer's input is handed out after the sum of the one before was
        # read, of which it is made. Where that is not so, the inputs have two sets that are taken in turns: a set is
        # written when the CPU has answered what it carried last.
        sizes = {part: size(name) for part, name in zip(EXPERT_INPUTS, op.inputs, strict=False)}
        made = {part: PinnedBuffer(f"experts_{part}_{n}{suffix}", n) for part, n in sizes.items()}
        n = size(op.outputs[0])
        return {**made, EXPERT_SUM: PinnedBuffer(f"experts_{EXPERT_SUM}_{n}", n)}
    return {VALUE: PinnedBuffer(f"transfer_{hand_over.flag}", size(op.outputs[0]))}
