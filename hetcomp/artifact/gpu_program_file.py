"""Writes what the runtime reads of a GPU's part of an artifact: ``gpu/program-N.json``, ``gpu/constants-N.bin``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from hetcomp.artifact.external_weights import ExternalRecord
from hetcomp.artifact.weight_files import WeightRecord, tensor_name
from hetcomp.backends.exchange import EXPERT_SUM
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.expert_cache import CACHE_TABLE, CacheLayout
from hetcomp.backends.gpu.expert_stream import TABLES, StreamLayout
from hetcomp.backends.gpu.gpu_program import CONSTANTS, RECURRENT, STATES, WEIGHTS, GpuBuffer, GpuProgram
from hetcomp.backends.gpu.low_rank import PAIR_TABLE, PAIRS
from hetcomp.backends.gpu.pair_layout import PairLayout
from hetcomp.backends.gpu.step_graph import StepGraph
from hetcomp.backends.gpu.weight_stream import RING
from hetcomp.ir.kv_pool import BLOCK_POSITIONS, GRANULE_BYTES, recurrent_bytes

_SCHEMA = [5, 1]  # 5.1: states of recurrences


def write_gpu_program(
    program: GpuProgram,
    records: Sequence[WeightRecord | ExternalRecord],
    cpu_weights: Sequence[str],
    compiled: Sequence[CompiledKernel],
    folder: Path,
    sources: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Writes into the artifact ``folder`` and returns the program's entry in the manifest. ``records``: where its
    weights are, in their order; ``cpu_weights``: ids of the CPU program's weights in theirs; ``sources``: as
    :func:`hetcomp.artifact.writer.write_manifest`."""
    (folder / "gpu").mkdir(exist_ok=True)
    if program.constants:
        (folder / _constants(program)).write_bytes(program.constants)
    document = {
        "schema": _SCHEMA,
        "device": program.device,
        "device_bytes": program.device_bytes(compiled),
        "flags": len(program.exchange.hand_overs),
        "buffers": [_buffer(buffer, program, records) for buffer in program.buffers()],
        "graphs": [_graph(graph, cpu_weights) for graph in program.graphs],
    }
    if sources:
        document["sources"] = list(sources)
    if program.pairs is not None:
        document["adapters"] = _adapters(program.pairs)
    if program.stream is not None:
        document["stream"] = _stream(program.stream, program, cpu_weights)
    if program.ring is not None:
        flags = {"first_flag": program.ring.first_flag, "flags": program.weight_flags}
        document["weight_stream"] = {"buffer": RING, **flags}
    if program.expert_cache is not None:
        document["expert_cache"] = _expert_cache(program.expert_cache, program)
    file = f"gpu/program-{program.number}.json"
    (folder / file).write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    weight_files = sorted({record.file for record in records if isinstance(record, WeightRecord)})
    return {"device": program.device, "program": file, "weight_files": weight_files}


def _graph(graph: StepGraph, cpu_weights: Sequence[str]) -> dict[str, Any]:
    number = {name: i for i, name in enumerate(cpu_weights)}
    portions = [
        {
            "flag": portion.flag,
            **({} if portion.after is None else {"after": portion.after}),
            "copies": [{"weight": number[a.weight], "bytes": a.bytes, "to": a.to} for a in portion.arrivals],
        }
        for portion in graph.portions
    ]
    return {
        "batch": graph.rows.count,
        "exact": graph.rows.exact,
        "adapted": graph.adapted,
        "nodes": graph.nodes,
        **({"portions": portions} if portions else {}),
    }


def _constants(program: GpuProgram) -> str:
    return f"gpu/constants-{program.number}.bin"


def _buffer(buffer: GpuBuffer, program: GpuProgram, records: Sequence[WeightRecord | ExternalRecord]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": buffer.name, "bytes": buffer.bytes, "kind": buffer.kind}
    if buffer.name == WEIGHTS:
        places = (program.places[value.id].offset for value in program.weights)
        entry["sources"] = [_source(record, to) for record, to in zip(records, places, strict=True)]
    elif buffer.name == CONSTANTS:
        digest = xxhash.xxh3_64(program.constants).hexdigest()
        entry["sources"] = [_source(WeightRecord(CONSTANTS, _constants(program), 0, buffer.bytes, digest), 0)]
    elif buffer.name == STATES:
        entry["cache"] = _cache(program)
    elif buffer.name == RECURRENT:
        entry["recurrent"] = {
            "slots": program.plan.dim("slots").max,
            "states": [
                {"offset": program.places[value.id].offset, "slot_bytes": recurrent_bytes(value.type)}
                for value in program.recurrent
            ],
        }
    return entry


def _stream(stream: StreamLayout, program: GpuProgram, cpu_weights: Sequence[str]) -> dict[str, Any]:
    planned = program.plan.stream
    assert planned is not None
    number = {name: i for i, name in enumerate(cpu_weights)}
    routing = {h.flag: program.exchange.buffer(h, "ids").name for h in program.exchange.hand_overs if h.answered}
    layers = [
        {
            "hand_over": layer.hand_over,
            "experts": layer.experts,
            "top_k": layer.top_k,
            "hidden": layer.hidden,
            "ids": routing[layer.hand_over],
            "waves": layer.waves,
            "spine_us": layer.spine_us,
            "operands": [
                {
                    "buffer": operand.buffer,
                    "expert_bytes": operand.bytes,
                    "sources": [{"weight": number[s.weight], "experts": s.experts} for s in operand.sources],
                }
                for operand in layer.operands
            ],
        }
        for layer in stream.layers
    ]
    return {
        "slots": stream.slots,
        "wave": stream.wave,
        "first_flag": stream.first_flag,
        "tables": {
            "buffer": TABLES,
            "row_bytes": stream.row_bytes,
            "part_offset": stream.part_offset,
            "ask_offset": stream.ask_offset,
        },
        "rates": asdict(planned.rates),
        "layers": layers,
    }


def _cache(program: GpuProgram) -> dict[str, int]:
    memory = program.cache
    return {
        "slots": program.plan.dim("slots").max,
        "slot_bytes": memory.slot_blocks * memory.block,
        "block_bytes": memory.block,
        "block_positions": BLOCK_POSITIONS,
        "granule_bytes": GRANULE_BYTES,
        "granules": memory.granules or 0,
    }


def _expert_cache(cache: CacheLayout, program: GpuProgram) -> dict[str, Any]:
    sums = {h.flag: h for h in program.exchange.hand_overs}
    return {
        "policy": cache.policy,
        "slots": cache.planned.slots,
        "bytes_per_step": cache.planned.bytes_per_step,
        "table": {"buffer": CACHE_TABLE, "row_bytes": cache.row_bytes},
        "layers": [
            {
                "sum": program.exchange.buffer(sums[layer.streamed.hand_over], EXPERT_SUM).name,
                "first": layer.first,
                "operands": [{"buffer": operand.buffer, "offset": operand.offset} for operand in layer.operands],
            }
            for layer in cache.layers
        ],
    }


def _adapters(pairs: PairLayout) -> dict[str, Any]:
    weights = [{"name": tensor_name(value), **asdict(shape)} for value, shape in pairs.weights]
    return {
        "slots": pairs.room.count,
        "rank": pairs.room.rank,
        "experts": pairs.room.experts,
        "pairs": PAIRS,
        "table": {"buffer": PAIR_TABLE, "row_bytes": pairs.row_bytes},
        "weights": weights,
    }


def _source(record: WeightRecord | ExternalRecord, to: int) -> dict[str, Any]:
    return {"bytes": record.bytes, "to": to, "xxh3_64": record.xxh3_64} | record.place()
