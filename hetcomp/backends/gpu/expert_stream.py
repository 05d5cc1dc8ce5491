"""Experts that are copied from CPU memory to GPUs in a step of a prompt: where they come from and where they go.

Each GPU has its own few slots, which are filled in turns. A layer's experts are computed in waves, each of no more than
half of the slots, while those of the next wave, or of the next layer, come into others. Which experts are copied is
decided in the step (runtime_lib/src/gpu/expert_stream.h); a table of each wave says which slot an expert is in. See
docs/decisions/expert-streaming.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hetcomp.backends import packing
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.tiles import aligned
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import Curve, Placement
from hetcomp.ir.deferral import experts_on_cpu
from hetcomp.ir.hand_overs import HandOver
from hetcomp.ir.node_parts import NodePart, Runs, node_parts, part_id
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Call, Op, Plan, Value

TABLES = "stream_tables"
_WORD = 16  # bytes between numbers that kernels get pointers to


@dataclass(frozen=True)
class ExpertSource:
    """The CPU's weight ``weight`` (an id) has these ``experts``, one after the other."""

    weight: str
    experts: Runs


@dataclass(frozen=True)
class StreamedOperand:
    """One operand of a layer's experts: ``bytes`` of an expert; its slots are the rows of ``slots``, the weight that
    ``buffer`` holds."""

    operand: int
    bytes: int
    buffer: str
    slots: Value
    sources: tuple[ExpertSource, ...]


@dataclass(frozen=True)
class StreamedLayer:
    """The experts op ``op`` of a call. ``hand_over``: where the CPU gets its routing; ``flag``: of the first of
    ``waves``, raised when its experts have come, and by the GPU when they may be overwritten; ``row``: of the tables,
    the first wave's; ``spine_us``: see ExpertStream."""

    call: int
    op: str
    hand_over: int
    flag: int
    waves: int
    row: int
    experts: int
    top_k: int
    hidden: int
    spine_us: Curve
    operands: tuple[StreamedOperand, ...]


@dataclass(frozen=True)
class StreamLayout:
    """What is streamed to one GPU. ``wave``: experts of one, at most; ``first_flag``: of its layers' waves, behind
    those of hand-overs and of other GPUs' layers.

    ``tables``: one row of i32, then for every layer one for each wave and one for all of them: the slot of each expert
    (-1: none). The layer's last row has from ``part_offset`` on whether the CPU has a part in the layer's sum, and from
    ``ask_offset`` on whether the input of the next layer is wanted by the CPU (of the first layer: the first row).
    ``row_bytes``, offsets in bytes; ``buffers``: bytes of those with slots."""

    slots: int
    wave: int
    first_flag: int
    layers: tuple[StreamedLayer, ...]
    row_bytes: int
    part_offset: int
    ask_offset: int
    buffers: tuple[tuple[str, int], ...]

    def table(self, layer: StreamedLayer, wave: int) -> int:
        """Offset in the tables of the slots of the experts of a layer's wave."""
        return (layer.row + wave) * self.row_bytes

    def table_of_all(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the slots of all waves' experts."""
        return self.table(layer, layer.waves)

    def part(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the number that says whether the CPU has a part."""
        return self.table_of_all(layer) + self.part_offset

    def ask(self, layer: StreamedLayer) -> int:
        """Offset in the tables of the number that says whether the CPU wants the layer's input: it stands in the row
        before, because it is written when the layer before is decided."""
        return (layer.row - 1) * self.row_bytes + self.ask_offset

    @property
    def tables_bytes(self) -> int:
        """Of the buffer of tables."""
        last = self.layers[-1]
        return (last.row + last.waves + 1) * self.row_bytes

    @staticmethod
    def of(plan: Plan, exchange: Exchange, gpu: str) -> StreamLayout | None:
        """None where the plan streams nothing to ``gpu``. Raises HetcompError if the plan's stream is for other
        layers."""
        if plan.stream is None:
            return None
        layers: list[StreamedLayer] = []
        sizes: dict[str, int] = {}
        values = plan.value_map()
        given = [h for h in exchange.hand_overs if h.answered]
        if len(given) != len(plan.stream.spines_us):
            raise HetcompError(
                "The plan streams other layers' experts than those that CPU and GPU share; plan it again."
            )
        first_flag = len(exchange.hand_overs) + sum(_waves(plan, h) for h in given if h.giver < gpu)
        flag, row = first_flag, 1
        for hand_over, spine_us in zip(given, plan.stream.spines_us, strict=True):
            if hand_over.giver != gpu:
                continue
            call, op, placement = _experts(plan, hand_over)
            assert isinstance(op.attrs, MoeExperts)
            actual = dict(zip(plan.template(call.template).params, call.args, strict=True))
            weights = {i: values[actual[name]] for i, name in enumerate(op.inputs) if i >= 3 and name in actual}
            parts = node_parts(op, placement)
            operands = tuple(_operand(i, v, op, parts, plan.stream.ring, sizes) for i, v in sorted(weights.items()))
            waves = _waves(plan, hand_over)
            shape = op.attrs.experts, op.attrs.top_k, op.attrs.hidden
            place = hand_over.call, op.id, hand_over.flag, flag, waves, row
            layers.append(StreamedLayer(*place, *shape, spine_us, operands))
            flag, row = flag + waves, row + waves + 1
        if not layers:
            return None
        part = aligned(4 * max(layer.experts for layer in layers), _WORD)
        row_bytes = aligned(part + 2 * _WORD, 64)
        slots, buffers = plan.stream.ring, tuple(sizes.items())
        return StreamLayout(slots, plan.stream.slots, first_flag, tuple(layers), row_bytes, part, part + _WORD, buffers)


def _experts(plan: Plan, hand_over: HandOver) -> tuple[Call, Op, Placement]:
    call = plan.calls[hand_over.call]
    op = next(op for op in plan.template(call.template).ops if op.id == hand_over.op)
    return call, op, dict(call.placements)[op.id]


def _waves(plan: Plan, hand_over: HandOver) -> int:
    """Enough for all experts of the layer that the GPU has not got at load."""
    assert plan.stream is not None
    _, op, placement = _experts(plan, hand_over)
    assert isinstance(op.attrs, MoeExperts)
    missing = sum(experts_on_cpu(placement)) if placement.experts else op.attrs.experts
    cached = plan.expert_cache.on(hand_over.giver) if plan.expert_cache is not None else None
    return plan.stream.waves(missing - (cached.slots if cached is not None else 0))


def _operand(
    index: int, weight: Value, op: Op, parts: Iterable[NodePart], slots: int, sizes: dict[str, int]
) -> StreamedOperand:
    assert isinstance(op.attrs, MoeExperts)
    size = _expert_bytes(weight, op.attrs.experts)
    everyone = ((0, op.attrs.experts),)
    sources = tuple(ExpertSource(part_id(weight.id, part.node), part.experts or everyone) for part in parts)
    buffer = f"stream_{index}_{size}"
    sizes[buffer] = slots * size
    shape = (slots, *weight.type.shape[1:])
    rows = replace(weight, id=buffer, type=replace(weight.type, shape=shape), source=None, view=None)
    return StreamedOperand(index, size, buffer, rows, sources)


def _expert_bytes(weight: Value, experts: int) -> int:
    """Of one expert: of a matrix its packed bytes, of a bias its numbers."""
    if len(weight.type.shape) == 3:
        return packing.packed_bytes(weight) // experts
    return weight.type.bytes({}) // experts
