"""Which of a program's candidate tiles are the fastest on this machine's GPU, remembered from one compile to the next.

Every class of launches (hetcomp.backends.gpu.tile_choices) is timed once, on random contents, with all of its
candidates. One that does not compile, needs too much shared memory or writes other numbers than the table's does not
count; one that is hardly faster neither.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetcomp.backends.gpu.compile_kernels import CompiledKernel, compile_candidates, sources_hash, triton_version
from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.backends.gpu.groups import GpuGroup
from hetcomp.backends.gpu.kernels import GpuCode, Operand
from hetcomp.backends.gpu.step_graph import StepGraph
from hetcomp.backends.gpu.tile_choices import MeasuredTile, TileChoices
from hetcomp.backends.gpu.tile_timer import TileTimer, TimedBuffer, TimedLaunch, TimingJob, VariantTime
from hetcomp.backends.gpu.timing_data import TimingData
from hetcomp.backends.native_compiler import cache_folder
from hetcomp.ir.kv_pool import GpuCacheMemory
from hetcomp.ir.plan import Plan
from hetcomp.progress import ProgressSink

# Of all classes together; those that are not reached have the table's.
BUDGET_S = 60.0
# Groups whose kernels are compiled together.
_TOGETHER = 8
# Less than this is noise: medians of nine launches differ by one or two percent from run to run.
_LEAST_GAIN = 0.03
# Outputs that are rounded to bf16, or made from what is (experts' entries, weights of attention), may differ by half a
# unit in the last place of bf16, 2^-9, where sums have another order; in the norm over many numbers by less.
_ROUNDING = 2.0**-8
_BYTES_TYPES = {"f32": "float32", "bf16": "bf16", "i32": "int32"}


@dataclass(frozen=True)
class _Case:
    """A group of launches under every candidate: the group of each program of ``variants``. ``cache``: the KV cache of
    the program."""

    graph: StepGraph
    variants: tuple[GpuGroup, ...]
    cache: GpuCacheMemory

    @property
    def rows(self) -> int:
        """Of the step or, where the group reads rows of logits alone, of those."""
        op = self.variants[0].ops[0]
        shape = self.graph.values[(op.outputs or op.inputs)[0]].type.shape
        return self.graph.rows.logit_rows if shape[0] == "R" else self.graph.rows.count

    def keys(self) -> dict[str, int]:
        """Classes of its launches that have a choice, and between how many."""
        tiles = (launch.tile for launch in self.variants[0].code.launches)
        return {tile.key: tile.candidates for tile in tiles if tile is not None and tile.candidates > 1}


def measure_tiles(
    plan: Plan,
    timer: TileTimer,
    *,
    threads: int,
    progress: ProgressSink,
    budget_s: float = BUDGET_S,
) -> list[MeasuredTile]:
    """The choices of all classes of the plan's GPU programs that were reached in time.

    progress: a stage, if anything must be measured. Raises HetcompError as lower_programs does, or if Triton is not
    installed.
    """
    found: dict[str, MeasuredTile] = {}
    pending: list[_Case] = []
    for case in _cases(plan):
        known = _remembered(case, timer)
        found |= known
        if len(known) < len(case.keys()):
            pending.append(case)
    if pending:
        progress.stage(f"measure tiles on {timer.name}", total=len(pending))
    deadline = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory(prefix="hetcomp-tiles-") as folder:
        for start in range(0, len(pending), _TOGETHER):
            cases = pending[start : start + _TOGETHER]
            kernels = [la.kernel for c in cases for group in c.variants for la in group.code.launches]
            made = compile_candidates(kernels, timer.cc, threads=threads)
            for case in cases:
                if time.monotonic() > deadline:
                    return list(found.values())
                measured = _measure(case, plan, made, timer, Path(folder))
                _remember(case, measured, timer)
                found |= {m.key: m for m in measured}
                progress.advance(1, measured[0].key)
    return list(found.values())


def _cases(plan: Plan) -> Iterator[_Case]:
    """A case for each class, those of the graphs with the most rows first, then decode."""
    # Launches that add an adapter's pairs have the tiles of those that do not.
    plan = replace(plan, adapter_room=None)
    table = lower_programs(plan)
    launches = (la for p in table for g in p.graphs for s in g.groups for la in s.code.launches)
    most = max((la.tile.candidates for la in launches if la.tile), default=1)
    others = [lower_programs(plan, TileChoices(others=i)) for i in range(1, most)]
    graphs = [(p, i) for p in range(len(table)) for i in range(len(table[p].graphs))]
    seen: set[str] = set()
    for p, i in sorted(graphs, key=lambda at: -table[at[0]].graphs[at[1]].rows.count):
        variants = [programs[p].graphs[i].groups for programs in (table, *others)]
        for groups in zip(*variants, strict=True):
            case = _Case(table[p].graphs[i], groups, table[p].cache)
            if set(case.keys()) - seen:
                seen |= set(case.keys())
                yield case


def _measure(
    case: _Case, plan: Plan, made: Mapping[str, CompiledKernel], timer: TileTimer, folder: Path
) -> list[MeasuredTile]:
    """Of all classes of a case."""
    codes = [group.code for group in case.variants]
    # Where a class has fewer candidates than others, the programs of the rest repeat its last.
    different = [i for i, code in enumerate(codes) if code not in codes[:i]]
    able = [i for i in different if all(la.kernel.name in made for la in codes[i].launches)]
    times: dict[int, VariantTime] = {}
    if 0 in able:
        for together in (able, *([0, i] for i in able[1:])):
            # One by one where any of them failed.
            times |= dict(zip(together, timer.time(_job(case, together, plan, made, folder)), strict=False))
            if len(times) == len(able):
                break
    good = {i: t for i, t in times.items() if t.difference <= _ROUNDING}
    return [_choose(key, count, case, good) for key, count in case.keys().items()]


def _choose(key: str, count: int, case: _Case, good: Mapping[int, VariantTime]) -> MeasuredTile:
    us: list[float | None] = [None] * count
    for i, timed in good.items():
        launches = case.variants[i].code.launches
        mine = [t for la, t in zip(launches, timed.us, strict=True) if la.tile is not None and la.tile.key == key]
        number = next(la.tile.chosen for la in launches if la.tile is not None and la.tile.key == key)
        if us[number] is None:
            us[number] = sum(mine)
    chosen = 0
    if us[0] is not None:
        best = min((t, i) for i, t in enumerate(us) if t is not None)
        chosen = best[1] if best[0] < us[0] * (1 - _LEAST_GAIN) else 0
    return MeasuredTile(key, chosen, tuple(us))


def _job(case: _Case, able: Sequence[int], plan: Plan, made: Mapping[str, CompiledKernel], folder: Path) -> TimingJob:
    graph, group = case.graph, case.variants[0]
    dims = graph.rows.dims(plan.max_dims())
    data = TimingData(folder, case.rows, dims, case.cache)
    workspace = max(case.variants[i].code.workspace_bytes for i in able)
    buffers = {"workspace": TimedBuffer(workspace)}
    buffers |= {f"input {n}": data.value(graph.values[n], group, graph.values) for n in group.inputs}
    buffers |= {f"output {n}": data.written(graph.values[n]) for n in group.outputs}
    for i in able:
        for launch in case.variants[i].code.launches:
            buffers |= {f"step {o.name}": data.step(o.name) for o in launch.operands if o.source == "step"}
    outputs = {f"output {n}": _BYTES_TYPES[str(graph.values[n].type.dtype)] for n in group.outputs}
    variants = [_timed(case.variants[i].code, group, case.rows, case.cache.slot_blocks, made) for i in able]
    return TimingJob(buffers, outputs, variants)


def _timed(
    code: GpuCode, group: GpuGroup, rows: int, slot_blocks: int, made: Mapping[str, CompiledKernel]
) -> list[TimedLaunch]:
    def argument(operand: Operand) -> dict[str, Any]:
        if operand.source == "slot_blocks":
            return {"i32": slot_blocks}
        names = {"input": group.inputs, "output": group.outputs}
        of_operand = {"workspace": "workspace", "step": f"step {operand.name}"}
        name = of_operand.get(operand.source) or f"{operand.source} {names[operand.source][operand.index]}"
        return {"buffer": name, "offset": operand.offset}

    launches = []
    for launch in code.launches:
        x, y, z = (axis.programs(rows) for axis in launch.grid)
        launches.append(TimedLaunch(made[launch.kernel.name], (x, y, z), tuple(map(argument, launch.operands))))
    return launches


def _memory_of(case: _Case, key: str, timer: TileTimer) -> Path:
    """The file that remembers a class's choice: what was measured, where, and between which kernels."""
    variants = [
        [(la.kernel.name, [axis.programs(case.rows) for axis in la.grid]) for la in group.code.launches]
        for group in case.variants
    ]
    what = [timer.name, timer.driver, timer.cc, sources_hash(), triton_version(), key, variants]
    return cache_folder() / f"tile-{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.json"


def _remembered(case: _Case, timer: TileTimer) -> dict[str, MeasuredTile]:
    known = {}
    for key, count in case.keys().items():
        try:
            us = json.loads(_memory_of(case, key, timer).read_text())
            known[key] = MeasuredTile(key, int(us["chosen"]), tuple(us["us"]))
        except (OSError, ValueError, KeyError, TypeError):  # never measured, or not written to its end
            continue
        if not 0 <= known[key].chosen < count:
            del known[key]
    return known


def _remember(case: _Case, measured: Sequence[MeasuredTile], timer: TileTimer) -> None:
    for each in measured:
        if each.us[0] is None:  # nothing was measured
            continue
        path = _memory_of(case, each.key, timer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as staged:
            json.dump({"key": each.key, "chosen": each.chosen, "us": each.us}, staged)
        Path(staged.name).replace(path)
