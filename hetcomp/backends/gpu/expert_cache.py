"""Slots on each GPU for experts that are in CPU memory: which they hold changes between steps of decoding.

A table of each layer says which slot an expert is in; the runtime writes it before a step
(runtime_lib/src/gpu/expert_cache.h). See docs/decisions/expert-cache.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.expert_stream import StreamedLayer, StreamLayout
from hetcomp.backends.gpu.tiles import aligned
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import CacheSlots
from hetcomp.ir.plan import Plan, Value

CACHE_TABLE = "cache_table"
_ALIGNMENT = 256


@dataclass(frozen=True)
class CachedOperand:
    """Of a layer's experts: its slots are the rows of ``slots``, a weight in ``buffer`` from ``offset`` on."""

    operand: int
    buffer: str
    offset: int
    slots: Value


@dataclass(frozen=True)
class CachedLayer:
    """What is kept of a streamed layer; ``first``: experts at load, in slot 0, in slot 1, ..."""

    streamed: StreamedLayer
    row: int
    operands: tuple[CachedOperand, ...]
    first: tuple[int, ...]


@dataclass(frozen=True)
class CacheLayout:
    """``planned``: for the GPU; ``layers`` as its stream's; ``row_bytes`` of the table, which has an i32 for each of a
    layer's experts (-1: in no slot); ``buffers``: bytes of those with slots."""

    policy: str
    planned: CacheSlots
    layers: tuple[CachedLayer, ...]
    row_bytes: int
    buffers: tuple[tuple[str, int], ...]

    def layer(self, hand_over: int) -> CachedLayer:
        """The layer that the CPU gets with a hand-over."""
        return next(layer for layer in self.layers if layer.streamed.hand_over == hand_over)

    @property
    def table_bytes(self) -> int:
        """Of the buffer of the table."""
        return len(self.layers) * self.row_bytes

    @staticmethod
    def of(plan: Plan, exchange: Exchange, gpu: str, stream: StreamLayout | None) -> CacheLayout | None:
        """Of ``gpu``, which has ``stream``. None where the plan has no cache, or the GPU no layer with one. Raises
        HetcompError if the cache is for other layers than those whose experts are streamed."""
        cache = plan.expert_cache
        if cache is None:
            return None
        answered = [h.flag for h in exchange.hand_overs if h.answered]
        planned = cache.on(gpu)
        if plan.stream is None or len(answered) != len(cache.first) or (planned is None) != (stream is None):
            raise HetcompError(
                "The plan's expert cache is for other layers than those that are streamed; plan it again."
            )
        if planned is None or stream is None:
            return None
        first = dict(zip(answered, cache.first, strict=True))
        sizes: dict[str, int] = {}
        layers = []
        for row, layer in enumerate(stream.layers):
            operands = _operands(layer, planned.slots, sizes)
            layers.append(CachedLayer(layer, row, operands, first[layer.hand_over]))
        most = max(layer.experts for layer in stream.layers)
        return CacheLayout(cache.policy, planned, tuple(layers), aligned(4 * most, 64), tuple(sizes.items()))


def _operands(layer: StreamedLayer, slots: int, sizes: dict[str, int]) -> tuple[CachedOperand, ...]:
    found = []
    for streamed in layer.operands:
        buffer = f"cache_{streamed.operand}_{streamed.bytes}"
        offset = sizes.get(buffer, 0)
        sizes[buffer] = offset + aligned(slots * streamed.bytes, _ALIGNMENT)
        rows = replace(streamed.slots.type, shape=(slots, *streamed.slots.type.shape[1:]))
        value = replace(streamed.slots, id=f"{buffer} {offset}", type=rows)
        found.append(CachedOperand(streamed.operand, buffer, offset, value))
    return tuple(found)
