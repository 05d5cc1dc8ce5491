"""The GPU's part of an artifact: buffers, and a graph for every number of rows that steps may have."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hetcomp.artifact.weight_files import WeightRecord
from hetcomp.backends import packing
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.flat_ops import flat_ops
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.backends.gpu.lower_step import ARENA, LOGITS, Place, Rows, StepGraph, StepLowering
from hetcomp.backends.gpu.step_events import step_events
from hetcomp.errors import HetcompError
from hetcomp.ir.homes import on_gpu, read_in
from hetcomp.ir.node_parts import Cut, gpu_cut_weights
from hetcomp.ir.plan import Plan, Value, ValueKind

_SCHEMA = [1, 0]
_ALIGNMENT = 256  # of everything in a buffer: what cuMemAlloc gives
_CONSTANTS = "gpu/constants.bin"
# Rows of decode graphs, and the bounds of those for prompts below the largest.
_DECODE_ROWS = (1, 2, 4, 8, 16)
_PROMPT_ROWS = (64, 512)


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

    @property
    def kernels(self) -> tuple[GpuKernel, ...]:
        """Every kernel once."""
        return tuple({name: kernel for graph in self.graphs for name, kernel in graph.kernels.items()}.values())

    def device_bytes(self, compiled: Sequence[CompiledKernel]) -> int:
        """Device memory of all buffers, and of the kernels' scratch."""
        scratch = {made.kernel.name: made.global_scratch_bytes for made in compiled}
        size = sum(int(b["bytes"]) for b in self._buffers({}) if b["kind"] in ("weight", "constant", "state", "arena"))
        size += sum(_aligned(b["bytes"]) for b in self._buffers({}) if b["kind"] == "step")
        for graph in self.graphs:
            for node in graph.nodes:
                x, y, z = node.get("grid", (0, 0, 0))
                size += x * y * z * scratch.get(node.get("kernel", ""), 0)
        return size

    def to_json(self, records: Sequence[WeightRecord], compiled: Sequence[CompiledKernel]) -> str:
        """program.json. ``records``: where the weights are, in their order."""
        by_id = {v.id: r for v, r in zip(self.weights, records, strict=True)}
        graphs = [{"batch": g.rows.count, "exact": g.rows.exact, "nodes": list(g.nodes)} for g in self.graphs]
        document = {
            "schema": _SCHEMA,
            "device_bytes": self.device_bytes(compiled),
            "flags": len(self.exchange.hand_overs),
            "buffers": self._buffers(by_id),
            "graphs": graphs,
        }
        return json.dumps(document, separators=(",", ":"))

    def _buffers(self, records: Mapping[str, WeightRecord]) -> list[dict[str, Any]]:
        dims = self.plan.max_dims()
        buffers: list[dict[str, Any]] = []

        def add(name: str, size: int, kind: str, sources: Sequence[dict[str, Any]] = ()) -> None:
            if size:
                given = {"sources": list(sources)} if sources else {}
                buffers.append({"name": name, "bytes": size, "kind": kind, **given})

        add("weights", self._end(self.weights), "weight", [self._source(v, records) for v in self.weights])
        add("states", self._end(self.states), "state")
        add("constants", len(self.constants), "constant", [_constants_source(self.constants)])
        add(ARENA, max(g.arena_bytes for g in self.graphs), "arena")
        for name in sorted(_named(self.graphs) & set(_STEP)):
            add(name, 4 * (dims[_STEP[name]] if _STEP[name] else 1), "step")
        add(LOGITS, 4 * dims["R"] * self.plan.model.vocab, "pinned_out")
        for pinned in self.exchange.buffers:
            add(pinned.name, pinned.bytes, "pinned_out" if pinned.to_cpu else "pinned_in")
        return buffers

    def _end(self, values: Sequence[Value]) -> int:
        return max((self.places[v.id].offset + _size(v, self.plan) for v in values), default=0)

    def _source(self, value: Value, records: Mapping[str, WeightRecord]) -> dict[str, Any]:
        record = records.get(value.id)
        if record is None:  # only the sizes are asked for
            return {}
        return {
            "file": record.file,
            "offset": record.offset,
            "bytes": record.bytes,
            "to": self.places[value.id].offset,
            "xxh3_64": record.xxh3_64,
        }


# Buffers that the host fills for each step, and the dimension of their i32 (empty: one number).
_STEP = {"ids": "T", "positions": "T", "slots": "T", "logit_rows": "R", "rows": "", "logit_row_count": ""}


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
    ops, values = flat_ops(plan)
    cuts = gpu_cut_weights(plan)
    readers = read_in(plan)
    stored = [v for v in plan.values if v.kind in (ValueKind.WEIGHT, ValueKind.CONST)]
    weights = [cuts[v.id][0] if v.id in cuts else v for v in stored if v.id in cuts or gpu in readers[v.id]]
    states = [v for v in plan.values if v.kind is ValueKind.STATE and gpu in readers[v.id]]
    places = {**_in_a_row("weights", weights, plan), **_in_a_row("states", states, plan)}
    places |= {v.id: Place(v.fqn or v.id) for v in plan.values if v.kind is ValueKind.INPUT}
    events = step_events(ops, exchange, gpu)
    constants: dict[tuple[int, ...], int] = {}
    graphs = [
        StepLowering(events, dict(values), dict(places), exchange, plan.max_dims(), rows, constants).lower()
        for rows in _all_rows(plan)
    ]
    by_part = {cuts[v.id][0].id: (v, cuts[v.id][1]) for v in stored if v.id in cuts}
    table = b"".join(struct.pack(f"<{len(row)}i", *row).ljust(-(-4 * len(row) // 64) * 64, b"\0") for row in constants)
    return GpuProgram(plan, tuple(weights), by_part, tuple(states), places, table, tuple(graphs), exchange)


def write_program(
    program: GpuProgram, records: Sequence[WeightRecord], compiled: Sequence[CompiledKernel], folder: Path
) -> None:
    """Writes ``gpu/program.json`` and what it names beside weights and kernels into the artifact ``folder``."""
    (folder / "gpu").mkdir(exist_ok=True)
    if program.constants:
        (folder / _CONSTANTS).write_bytes(program.constants)
    (folder / "gpu" / "program.json").write_text(program.to_json(records, compiled), encoding="utf-8")


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


def _named(graphs: Sequence[StepGraph]) -> set[str]:
    return {a["buffer"] for g in graphs for node in g.nodes for a in node.get("arguments", ()) if "buffer" in a}


def _constants_source(data: bytes) -> dict[str, Any]:
    digest = xxhash.xxh3_64(data).hexdigest()
    return {"file": _CONSTANTS, "offset": 0, "bytes": len(data), "to": 0, "xxh3_64": digest}
