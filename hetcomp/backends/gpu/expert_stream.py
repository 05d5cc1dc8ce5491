"""Experts that are copied from CPU memory to GPUs in a step of a prompt: where they come from and where they go.

Each GPU has its own few slots, in two halves that take turns: one layer's experts are computed from one half while the
next layer's come into the other. Which experts are copied is decided in the step (runtime_lib/src/gpu/expert_stream.h);
a table of each layer says which slot an expert is in. See docs/decisions/expert-streaming.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hetcomp.backends import packing
from hetcomp.backends.exchange import Exchange
from hetcomp.ir.node_parts import NodePart, Runs, node_parts, part_id
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Value

TABLES = "stream_tables"
_WORD = 16  # bytes between numbers that kernels get pointers to


@dataclass(frozen=True)
class ExpertSource:
    """The CPU's weight ``weight`` (an id) has these ``experts``, one after the other."""

    weight: str
    experts: Runs


@dataclass(frozen=True)
class StreamedOperand:
    """One operand of a layer's experts: ``bytes`` of an expert; its slots are the rows of ``slots``, a weight in
    ``buffer``, of which this layer has the half that begins at ``offset``."""

    operand: int
    bytes: int
    buffer: str
    offset: int
    slots: Value
    sources: tuple[ExpertSource, ...]


@dataclass(frozen=True)
class StreamedLayer:
    """The experts op ``op`` of a call. ``hand_over``: where the CPU gets its routing; ``flag``: raised when what is
    streamed has come; ``row``: of the tables."""

    call: int
    op: str
    hand_over: int
    flag: int
    row: int
    experts: int
    top_k: int
    hidden: int
    operands: tuple[StreamedOperand, ...]


@dataclass(frozen=True)
class StreamLayout:
    """What is streamed to one GPU. ``first_flag``: of its layers, behind those of hand-overs and of other GPUs' layers.

    ``tables``: a row of i32 for every layer and one before them: the slot of each expert (-1: none); from
    ``part_offset`` on whether the CPU has a part in the layer's sum, from ``ask_offset`` on whether the input of the
    next layer is wanted by the CPU. ``row_bytes``, offsets in bytes; ``buffers``: bytes of those with slots."""

    slots: int
    first_flag: int
    layers: tuple[StreamedLayer, ...]
    row_bytes: int
    part_offset: int
    ask_offset: int
    buffers: tuple[tuple[str, int], ...]

    def table(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the slots of a layer's experts."""
        return layer.row * self.row_bytes

    def part(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the number that says whether the CPU has a part."""
        return layer.row * self.row_bytes + self.part_offset

    def ask(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the number that says whether the CPU wants the layer's input: it stands in the row
        before, because it is written when the layer before is decided."""
        return (layer.row - 1) * self.row_bytes + self.ask_offset

    @property
    def tables_bytes(self) -> int:
        """Of the buffer of tables."""
        return (len(self.layers) + 1) * self.row_bytes

    @staticmethod
    def of(plan: Plan, exchange: Exchange, gpu: str) -> StreamLayout | None:
        """None where the plan streams nothing to ``gpu``."""
        if plan.stream is None:
            return None
        slots = plan.stream.slots
        layers: list[StreamedLayer] = []
        sizes: dict[str, int] = {}
        values = plan.value_map()
        first_flag = len(exchange.hand_overs) + sum(h.answered and h.giver < gpu for h in exchange.hand_overs)
        for hand_over in exchange.hand_overs:
            if not hand_over.answered or hand_over.giver != gpu:
                continue
            call = plan.calls[hand_over.call]
            template = plan.template(call.template)
            op = next(op for op in template.ops if op.id == hand_over.op)
            placement = dict(call.placements)[op.id]
            assert isinstance(op.attrs, MoeExperts)
            actual = dict(zip(template.params, call.args, strict=True))
            weights = {i: values[actual[name]] for i, name in enumerate(op.inputs) if i >= 3 and name in actual}
            half = len(layers) % 2
            operands = [
                _operand(i, v, op, node_parts(op, placement), slots, half, sizes) for i, v in sorted(weights.items())
            ]
            layers.append(
                StreamedLayer(
                    hand_over.call,
                    op.id,
                    hand_over.flag,
                    first_flag + len(layers),
                    len(layers) + 1,
                    op.attrs.experts,
                    op.attrs.top_k,
                    op.attrs.hidden,
                    tuple(operands),
                )
            )
        if not layers:
            return None
        part = _aligned(4 * max(layer.experts for layer in layers), _WORD)
        row = _aligned(part + 2 * _WORD, 64)
        return StreamLayout(slots, first_flag, tuple(layers), row, part, part + _WORD, tuple(sizes.items()))


def _operand(
    index: int, weight: Value, op: Op, parts: Iterable[NodePart], slots: int, half: int, sizes: dict[str, int]
) -> StreamedOperand:
    assert isinstance(op.attrs, MoeExperts)
    size = _expert_bytes(weight, op.attrs.experts)
    everyone = ((0, op.attrs.experts),)
    sources = tuple(ExpertSource(part_id(weight.id, part.node), part.experts or everyone) for part in parts)
    buffer = f"stream_{index}_{size}"
    half_bytes = _aligned(slots * size, 256)
    sizes[buffer] = 2 * half_bytes
    shape = (slots, *weight.type.shape[1:])
    rows = replace(weight, id=f"{buffer} {half}", type=replace(weight.type, shape=shape), source=None, view=None)
    return StreamedOperand(index, size, buffer, half * half_bytes, rows, sources)


def _expert_bytes(weight: Value, experts: int) -> int:
    """Of one expert: of a matrix its packed bytes, of a bias its numbers."""
    if len(weight.type.shape) == 3:
        return packing.packed_bytes(weight) // experts
    return weight.type.bytes({}) // experts


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
