"""A GPU's part of an artifact: buffers, and a graph for every number of rows that steps may have."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.candidates import CANDIDATE_WORDS
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.expert_cache import CACHE_TABLE, CacheLayout
from hetcomp.backends.gpu.expert_stream import TABLES, StreamLayout
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.backends.gpu.low_rank import OF_ROW, PAIR_TABLE, PAIRS
from hetcomp.backends.gpu.lower_step import ARENA, BEST, CANDIDATES, LOGITS, StepLowering
from hetcomp.backends.gpu.pair_layout import PairLayout
from hetcomp.backends.gpu.prompt_ops import PromptOps, prompt_ops
from hetcomp.backends.gpu.step_events import step_events
from hetcomp.backends.gpu.step_graph import Place, Rows, StepGraph
from hetcomp.backends.gpu.tile_choices import BY_TABLE, TileChoices
from hetcomp.backends.gpu.tiles import aligned
from hetcomp.backends.gpu.weight_stream import RING, WeightRing
from hetcomp.ir.flat_ops import FlatOp, flat_ops
from hetcomp.ir.homes import number, on_gpu, read_in
from hetcomp.ir.kv_pool import GpuCacheMemory, KvPool, block_bytes
from hetcomp.ir.node_parts import Cut, gpu_cut_weights
from hetcomp.ir.plan import Plan, Value, ValueKind
from hetcomp.ir.step_rows import decode_rows, prompt_rows

WEIGHTS, STATES, RECURRENT, CONSTANTS = "weights", "states", "recurrent", "constants"
_ALIGNMENT = 256  # of everything in a buffer: what cuMemAlloc gives
# Buffers that the host fills for each step, and the dimension of their i32, or f32 (empty: one number).
_STEP = {
    "ids": "T",
    "positions": "T",
    "slots": "T",
    "logit_rows": "R",
    **{name: dim for dim, name in OF_ROW.items()},
    "rows": "",
    "logit_row_count": "",
    "inverse_temperatures": "R",
}


@dataclass(frozen=True)
class GpuBuffer:
    """Memory of the program; ``kind`` as in gpu/program-N.json (runtime_lib/src/gpu/program_record.h)."""

    name: str
    bytes: int
    kind: str


@dataclass(frozen=True)
class GpuProgram:
    """``device``: the plan's name of the GPU. ``weights`` in the order of their places in the buffer of weights;
    ``cuts``: of those that are a GPU's part of one, by id: the whole weight and the cut. ``cache``: the memory whose
    blocks the caches among the states lie in; ``recurrent``: the other states, in the order of their places in a buffer
    of their own, each for all slots and then for the rows of nobody. ``constants``: bytes of the buffer of constants.
    ``pairs``: memory for adapters, which half of the graphs then add: there is one of each number of rows with and one
    without."""

    plan: Plan
    device: str
    weights: tuple[Value, ...]
    cuts: Mapping[str, tuple[Value, Cut]]
    cache: GpuCacheMemory
    recurrent: tuple[Value, ...]
    places: Mapping[str, Place]
    constants: bytes
    graphs: tuple[StepGraph, ...]
    exchange: Exchange
    stream: StreamLayout | None
    expert_cache: CacheLayout | None
    pairs: PairLayout | None
    ring: WeightRing | None

    @property
    def weight_flags(self) -> int:
        """Of portions of streamed weights, in any graph."""
        return max(len(graph.portions) for graph in self.graphs)

    @property
    def number(self) -> int:
        """1 of ``gpu:1``."""
        return number(self.device)

    @property
    def kernels(self) -> tuple[GpuKernel, ...]:
        """Every kernel once."""
        return tuple({name: kernel for graph in self.graphs for name, kernel in graph.kernels.items()}.values())

    def device_bytes(self, compiled: Sequence[CompiledKernel]) -> int:
        """Device memory of all buffers, and of the kernels' scratch."""
        scratch: dict[str, int] = defaultdict(int)  # a block
        for made in compiled:
            scratch[made.kernel.name] = max(scratch[made.kernel.name], made.global_scratch_bytes)
        size = sum(
            aligned(b.bytes, _ALIGNMENT) for b in self.buffers() if b.kind not in ("state", "pinned_in", "pinned_out")
        )
        size += aligned(self.cache.bytes, _ALIGNMENT)
        for graph in self.graphs:
            each = [math.prod(node["grid"]) * scratch[node["kernel"]] for node in graph.nodes if "kernel" in node]
            size += max(each, default=0)  # nodes run one after the other
        return size

    def buffers(self) -> tuple[GpuBuffer, ...]:
        """All buffers but empty ones."""
        dims = self.plan.max_dims()
        exact = max((g.rows.count for g in self.graphs if g.rows.exact), default=0)
        named = {a["buffer"] for g in self.graphs for n in g.nodes for a in n.get("arguments", ()) if "buffer" in a}
        found = [
            GpuBuffer(WEIGHTS, self._end(self.weights), "weight"),
            GpuBuffer(STATES, self.cache.addresses, "state"),
            GpuBuffer(RECURRENT, self._recurrent_end(), "recurrent"),
            GpuBuffer(CONSTANTS, len(self.constants), "constant"),
            GpuBuffer(ARENA, max(g.arena_bytes for g in self.graphs), "arena"),
            *(GpuBuffer(name, 4 * dims.get(dim, 1), "step") for name, dim in _STEP.items() if name in named),
            *([GpuBuffer(LOGITS, 4 * dims["R"] * self.plan.model.vocab, "result")] if LOGITS in named else []),
            *([GpuBuffer(BEST, 4 * dims["R"], "pinned_out")] if BEST in named else []),
            *([GpuBuffer(CANDIDATES, 4 * CANDIDATE_WORDS * exact, "pinned_out")] if CANDIDATES in named else []),
            *(
                GpuBuffer(name, self.exchange.buffers[name].bytes, "pinned_out" if writes else "pinned_in")
                for name, writes in self.exchange.of_side(self.device).items()
            ),
            *self._stream_buffers(),
            *self._cache_buffers(),
            *self._pair_buffers(),
        ]
        return tuple(buffer for buffer in found if buffer.bytes)

    def _stream_buffers(self) -> list[GpuBuffer]:
        ring = [GpuBuffer(RING, self.ring.bytes, "stream")] if self.ring is not None else []
        if self.stream is None:
            return ring
        slots = [GpuBuffer(name, size, "stream") for name, size in self.stream.buffers]
        return [*ring, *slots, GpuBuffer(TABLES, self.stream.tables_bytes, "stream")]

    def _cache_buffers(self) -> list[GpuBuffer]:
        if self.expert_cache is None:
            return []
        slots = [GpuBuffer(name, size, "stream") for name, size in self.expert_cache.buffers]
        return [*slots, GpuBuffer(CACHE_TABLE, self.expert_cache.table_bytes, "stream")]

    def _pair_buffers(self) -> list[GpuBuffer]:
        if self.pairs is None:
            return []
        return [
            GpuBuffer(PAIRS, self.pairs.pair_bytes, "pairs"),
            GpuBuffer(PAIR_TABLE, self.pairs.table_bytes, "pairs"),
        ]

    def _end(self, values: Sequence[Value]) -> int:
        return max((self.places[v.id].offset + packing.packed_bytes(v) for v in values), default=0)

    def _recurrent_end(self) -> int:
        pool = KvPool.of(self.plan.max_dims())
        return max((self.places[v.id].offset + pool.gpu_bytes(v.type) for v in self.recurrent), default=0)


def lower_programs(plan: Plan, tiles: TileChoices = BY_TABLE) -> tuple[GpuProgram, ...]:
    """The GPUs' parts of a plan whose memory is planned, one a GPU that it uses, in their order. ``tiles``: of the
    launches.

    Raises HetcompError if there is no kernel for an op that is placed on a GPU.
    """
    exchange, flat = Exchange.of(plan), flat_ops(plan)
    streams = {gpu: StreamLayout.of(plan, exchange, gpu) for gpu in on_gpu(plan)}
    waves = sum(layer.waves for stream in streams.values() if stream is not None for layer in stream.layers)
    flag = len(exchange.hand_overs) + waves
    programs: list[GpuProgram] = []
    for gpu, stream in streams.items():
        programs.append(_lower(plan, gpu, exchange, tiles, stream, flag, *flat))
        flag += programs[-1].weight_flags
    return tuple(programs)


def _lower(
    plan: Plan,
    gpu: str,
    exchange: Exchange,
    tiles: TileChoices,
    stream: StreamLayout | None,
    first_weight_flag: int,
    ops: tuple[FlatOp, ...],
    values: Mapping[str, Value],
) -> GpuProgram:
    expert_cache = CacheLayout.of(plan, exchange, gpu, stream)
    cuts = gpu_cut_weights(plan, gpu)
    readers = read_in(plan)
    stored = [v for v in plan.values if v.kind in (ValueKind.WEIGHT, ValueKind.CONST)]
    weights = [cuts[v.id][0] if v.id in cuts else v for v in stored if v.id in cuts or gpu in readers[v.id]]
    states = [v for v in plan.values if v.kind is ValueKind.STATE and gpu in readers[v.id]]
    in_block, block = _in_block([v for v in states if v.type.is_cache])
    recurrent, pool = [v for v in states if not v.type.is_cache], KvPool.of(plan.max_dims())
    cache = pool.gpu_memory(block)
    dims = {**plan.max_dims(), "cache_block": block, "slot_blocks": cache.slot_blocks}
    places = {**_in_a_row(WEIGHTS, {v.id: packing.packed_bytes(v) for v in weights}), **in_block}
    places |= _in_a_row(RECURRENT, {v.id: pool.gpu_bytes(v.type) for v in recurrent})
    places |= {v.id: Place(v.fqn or v.id) for v in plan.values if v.kind is ValueKind.INPUT}
    constants: dict[tuple[int, ...], int] = {}
    pairs = PairLayout.of(plan, gpu)
    usual = PromptOps(ops, dict(values), {})
    moved, ring = prompt_ops(ops, values, gpu, places), None
    if plan.weight_stream is not None and moved.arriving:
        ring = WeightRing(plan.weight_stream.ring_bytes, first_weight_flag)
    graphs = []
    for tables in (None, *([pairs.tables()] if pairs else [])):
        for rows in _all_rows(plan):
            # Adapters are added where the plan has their weights, so that graphs which add them leave them there.
            streams = plan.weight_stream is not None and tables is None and rows.streams(plan.weight_stream)
            step = moved if streams else usual
            lowering = StepLowering(
                gpu,
                step_events(step.ops, exchange, gpu),
                dict(step.values),
                dict(places),
                exchange,
                stream,
                expert_cache,
                dims,
                rows,
                constants,
                tiles,
                tables,
                step.arriving,
                ring if streams else None,
            )
            graphs.append(lowering.lower())
    by_part = {cuts[v.id][0].id: (v, cuts[v.id][1]) for v in stored if v.id in cuts}
    table = b"".join(struct.pack(f"<{len(row)}i", *row).ljust(-(-4 * len(row) // 64) * 64, b"\0") for row in constants)
    return GpuProgram(
        plan,
        gpu,
        tuple(weights),
        by_part,
        cache,
        tuple(recurrent),
        places,
        table,
        tuple(graphs),
        exchange,
        stream,
        expert_cache,
        pairs,
        ring,
    )


def _all_rows(plan: Plan) -> list[Rows]:
    exact = [Rows(n, True, n) for n in decode_rows(plan)]
    return [*exact, *(Rows(n, False, min(n, plan.dim("R").max)) for n in prompt_rows(plan))]


def _in_a_row(buffer: str, sizes: Mapping[str, int]) -> dict[str, Place]:
    """Places one after the other in a buffer, by id."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = Place(buffer, end)
        end = aligned(end + size, _ALIGNMENT)
    return places


def _in_block(states: Sequence[Value]) -> tuple[dict[str, Place], int]:
    """The caches' places in the first block of the KV cache, and its bytes."""
    places, end = {}, 0
    for state in states:
        places[state.id] = Place(STATES, end)
        end += block_bytes(state.type)
    return places, end
