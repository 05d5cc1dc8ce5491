"""Writes what the runtime reads of a GPU's part of an artifact: ``gpu/program-N.json``, ``gpu/constants-N.bin``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from hetcomp.artifact.weight_files import WeightRecord
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.gpu_program import CONSTANTS, WEIGHTS, GpuBuffer, GpuProgram

_SCHEMA = [2, 0]


def write_gpu_program(
    program: GpuProgram, records: Sequence[WeightRecord], compiled: Sequence[CompiledKernel], folder: Path
) -> dict[str, Any]:
    """Writes into the artifact ``folder`` and returns the program's entry in the manifest. ``records``: where its
    weights are, in their order."""
    (folder / "gpu").mkdir(exist_ok=True)
    if program.constants:
        (folder / _constants(program)).write_bytes(program.constants)
    document = {
        "schema": _SCHEMA,
        "device": program.device,
        "device_bytes": program.device_bytes(compiled),
        "flags": len(program.exchange.hand_overs),
        "buffers": [_buffer(buffer, program, records) for buffer in program.buffers()],
        "graphs": [{"batch": g.rows.count, "exact": g.rows.exact, "nodes": g.nodes} for g in program.graphs],
    }
    file = f"gpu/program-{program.number}.json"
    (folder / file).write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    weight_files = sorted({record.file for record in records})
    return {"device": program.device, "program": file, "weight_files": weight_files}


def _constants(program: GpuProgram) -> str:
    return f"gpu/constants-{program.number}.bin"


def _buffer(buffer: GpuBuffer, program: GpuProgram, records: Sequence[WeightRecord]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": buffer.name, "bytes": buffer.bytes, "kind": buffer.kind}
    if buffer.name == WEIGHTS:
        places = (program.places[value.id].offset for value in program.weights)
        entry["sources"] = [_source(record, to) for record, to in zip(records, places, strict=True)]
    elif buffer.name == CONSTANTS:
        digest = xxhash.xxh3_64(program.constants).hexdigest()
        entry["sources"] = [_source(WeightRecord(CONSTANTS, _constants(program), 0, buffer.bytes, digest), 0)]
    return entry


def _source(record: WeightRecord, to: int) -> dict[str, Any]:
    return {
        "file": record.file,
        "offset": record.offset,
        "bytes": record.bytes,
        "to": to,
        "xxh3_64": record.xxh3_64,
    }
