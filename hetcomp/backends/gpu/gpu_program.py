"""The GPU's part of an artifact: buffers, and a graph for every number of rows that steps may have."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.expert_cache import CACHE_TABLE, CacheLayout
from hetcomp.backends.gpu.expert_stream import TABLES, StreamLayout
from hetcomp.backends.gpu.flat_ops import flat_ops
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.backends.gpu.lower_step import ARENA, BEST, LOGITS, Place, Rows, StepGraph, StepLowering
from hetcomp.backends.gpu.step_events import step_events
from hetcomp.errors import HetcompError
from hetcomp.ir.homes import on_gpu, read_in
from hetcomp.ir.node_parts import Cut, gpu_cut_weights
from hetcomp.ir.plan import Plan, Value, ValueKind

WEIGHTS, STATES, CONSTANTS = "weights", "states", "constants"
_ALIGNMENT = 256  # of everything in a buffer: what cuMemAlloc gives
# Buffers that the host fills for each step, and the dimension of their i32 (empty: one number).
_STEP = {"ids": "T", "positions": "T", "slots": "T", "logit_rows": "R", "rows": "", "logit_row_count": ""}
# Rows of decode graphs, and the bounds of those for prompts below the largest.
_DECODE_ROWS = (1, 2, 4, 8, 16)
_PROMPT_ROWS = (64, 512)


@dataclass(frozen=True)
class GpuBuffer:
    """Memory of the program; ``kind`` as in gpu/program.json (runtime_lib/src/gpu/program_record.h)."""

    name: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class GpuProgram:
    """``weights`` in the order of their places in the buffer of weights; ``cuts``: of those that are a GPU's part of
    one, by id: the whole weight and the cut. ``constants``: bytes of the buffer of constants."""

    plan: Plan
    weights: tuple[Value, ...]
    cuts: Mapping[str, tuple[Value, Cut]]
    states: tuple[Value, ...]
    places: Mapping[str, Place]
    constants: bytes
    graphs: tuple[StepGraph, ...]
    exchange: Exchange
    stream: StreamLayout | None
    expert_cache: CacheLayout | None

    @property
    def kernels(self) -> tuple[GpuKernel, ...]:
        """Every kernel once."""
        return tuple({name: kernel for graph in self.graphs for name, kernel in graph.kernels.items()}.values())

    def device_bytes(self, compiled: Sequence[CompiledKernel]) -> int:
        """Device memory of all buffers, and of the kernels' scratch."""
        scratch = {made.kernel.name: made.global_scratch_bytes for made in compiled}
        size = sum(_aligned(b.bytes) for b in self.buffers() if b.kind not in ("pinned_in", "pinned_out"))
        for graph in self.graphs:
            for node in graph.nodes:
                x, y, z = node.get("grid", (0, 0, 0))
                size += x * y * z * scratch.get(node.get("kernel", ""), 0)
        return size

    def buffers(self) -> tuple[GpuBuffer, ...]:
        """All buffers but empty ones."""
        dims = self.plan.max_dims()
        named = {a["buffer"] for g in self.graphs for n in g.nodes for a in n.get("arguments", ()) if "buffer" in a}
        found = [
            GpuBuffer(WEIGHTS, self._end(self.weights), "weight"),
            GpuBuffer(STATES, self._end(self.states), "state"),
            GpuBuffer(CONSTANTS, len(self.constants), "constant"),
            GpuBuffer(ARENA, max(g.arena_bytes for g in self.graphs), "arena"),
            *(GpuBuffer(name, 4 * dims.get(dim, 1), "step") for name, dim in _STEP.items() if name in named),
            *([GpuBuffer(LOGITS, 4 * dims["R"] * self.plan.model.vocab, "result")] if LOGITS in named else []),
            *([GpuBuffer(BEST, 4 * dims["R"], "pinned_out")] if BEST in named else []),
            *(GpuBuffer(b.name, b.bytes, "pinned_out" if b.to_cpu else "pinned_in") for b in self.exchange.buffers),
            *self._stream_buffers(),
            *self._expert_cache_buffers(),
        ]
        return tuple(buffer for buffer in found if buffer.bytes)

    def _stream_buffers(self) -> list[GpuBuffer]:
        if self.stream is None:
            return []
        slots = [GpuBuffer(name, size, "stream") for name, size in self.stream.buffers]
        return [*slots, GpuBuffer(TABLES, self.stream.tables_bytes, "stream")]

    def _expert_cache_buffers(self) -> list[GpuBuffer]:
        if self.expert_cache is None:
            return []
        slots = [GpuBuffer(name, size, "stream") for name, size in self.expert_cache.buffers]
        return [*slots, GpuBuffer(CACHE_TABLE, self.expert_cache.table_bytes, "stream")]

    def _end(self, values: Sequence[Value]) -> int:
        return max((self.places[v.id].offset + _size(v, self.plan) for v in values), default=0)


def lower_program(plan: Plan) -> GpuProgram | None:
    """The GPU's part of a plan whose memory is planned; None where the plan uses none.

    Raises HetcompError if there is no kernel for an op that is placed on the GPU, or if it is placed on several.
    """
    gpus = on_gpu(plan)
    if not gpus:
        return None
    if len(gpus) > 1:
        raise HetcompError(
            f"The plan uses {', '.join(gpus)}; code is generated for one GPU: give --vram or pins for it."
        )
    gpu, exchange = gpus[0], Exchange.of(plan)
    stream = StreamLayout.of(plan, exchange)
    expert_cache = CacheLayout.of(plan, stream)
    ops, values = flat_ops(plan)
    cuts = gpu_cut_weights(plan)
    readers = read_in(plan)
    stored = [v for v in plan.values if v.kind in (ValueKind.WEIGHT, ValueKind.CONST)]
    weights = [cuts[v.id][0] if v.id in cuts else v for v in stored if v.id in cuts or gpu in readers[v.id]]
    states = [v for v in plan.values if v.kind is ValueKind.STATE and gpu in readers[v.id]]
    places = {**_in_a_row(WEIGHTS, weights, plan), **_in_a_row(STATES, states, plan)}
    places |= {v.id: Place(v.fqn or v.id) for v in plan.values if v.kind is ValueKind.INPUT}
    events = step_events(ops, exchange, gpu)
    constants: dict[tuple[int, ...], int] = {}
    graphs = [
        StepLowering(
            events, dict(values), dict(places), exchange, stream, expert_cache, plan.max_dims(), rows, constants
        ).lower()
        for rows in _all_rows(plan)
    ]
    by_part = {cuts[v.id][0].id: (v, cuts[v.id][1]) for v in stored if v.id in cuts}
    table = b"".join(struct.pack(f"<{len(row)}i", *row).ljust(-(-4 * len(row) // 64) * 64, b"\0") for row in constants)
    return GpuProgram(
        plan, tuple(weights), by_part, tuple(states), places, table, tuple(graphs), exchange, stream, expert_cache
    )


def _all_rows(plan: Plan) -> list[Rows]:
    tokens, logit_rows, slots = plan.dim("T").max, plan.dim("R").max, plan.dim("slots").max
    most = min(tokens, logit_rows)
    decode = [n for i, n in enumerate(_DECODE_ROWS) if n <= most and (i == 0 or _DECODE_ROWS[i - 1] < slots)]
    prompts = sorted({*(n for n in _PROMPT_ROWS if n < tokens), tokens} - set(decode))
    exact = [Rows(n, True, n) for n in decode]
    return [*exact, *(Rows(n, False, min(n, logit_rows)) for n in prompts)]


def _size(value: Value, plan: Plan) -> int:
    return value.type.bytes(plan.max_dims()) if value.kind is ValueKind.STATE else packing.packed_bytes(value)


def _in_a_row(buffer: str, values: Sequence[Value], plan: Plan) -> dict[str, Place]:
    places, end = {}, 0
    for value in values:
        places[value.id] = Place(buffer, end)
        end = _aligned(end + _size(value, plan))
    return places


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
