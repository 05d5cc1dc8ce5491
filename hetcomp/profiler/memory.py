"""Reads of memory: bandwidth by threads and node, working sets, the barrier. Rounds over a run, so that the minutes in
which other users of the machine take the bandwidth do not decide."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path

from hetcomp import installed_runtime
from hetcomp.backends.native_compiler import isa_flags
from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.detect import Machine, NodeFacts
from hetcomp.hardware.figures import BandwidthPoint, RemoteRead, WorkingSetPoint

# Rounds whose bests are further apart than this part of their median are reported.
SCATTER = 0.15
_TIMEOUT_S = 120


class Mode(StrEnum):
    """What codegen_templates/probe/memory_probe.cpp measures."""

    READ = "read"
    ALL = "all"
    SETS = "sets"
    BARRIER = "barrier"


@dataclass(frozen=True)
class Task:
    """One run of the probe: threads on ``cpus`` read ``mebibytes`` that lie on the node ``memory`` and that
    ``touch`` (CPUs of that node; none: bound by the kernel) wrote first."""

    mode: Mode
    mebibytes: int
    cpus: tuple[int, ...]
    memory: int
    touch: tuple[int, ...]


# Readings of a task by key: GB/s by threads or bytes, or microseconds a barrier.
Readings = Mapping[int, Sequence[float]]
Run = Callable[[Task], Readings]


@dataclass(frozen=True)
class MemoryFigures:
    """Figures of all rounds, by node id where they are a node's. ``samples``: all readings, by the same keys."""

    reads: dict[int, tuple[BandwidthPoint, ...]]
    remote: dict[int, tuple[RemoteRead, ...]]
    cached: tuple[WorkingSetPoint, ...]
    barrier_us: float
    samples: dict[tuple[Mode, int, int, int], tuple[float, ...]]
    scatter: str


class MemoryRounds:
    """Collects rounds of readings. ``run``: runs one task (see :func:`probe_runner`)."""

    def __init__(self, machine: Machine, run: Run) -> None:
        self._machine, self._run = machine, run
        # By mode, node of the cores, node of the memory, and the probe's key: the readings of every round.
        self._rounds: dict[tuple[Mode, int, int, int], list[tuple[float, ...]]] = {}

    def measure(self, *, remote: bool = False) -> None:
        """One more round. remote: also what every node's cores read of the other nodes' memory."""
        found = lanes(self._machine)
        for node, cpus in found:
            size = buffer_mebibytes(self._machine, node)
            self._take(Task(Mode.READ, size, cpus, node.id, cpus), node)
            self._take(Task(Mode.BARRIER, size, cpus, node.id, cpus), node)
        node, cpus = found[0]
        self._take(Task(Mode.SETS, sets_mebibytes(self._machine, node), cpus, node.id, cpus), node)
        if remote:
            self._remote(found)

    def barrier_us(self) -> float:
        """Cost of a barrier, of the node where it takes longest."""
        return max(self._value(key) for key in self._rounds if key[0] is Mode.BARRIER)

    def figures(self) -> MemoryFigures:
        """The figures: of every round the best reading, and of these the median."""
        reads: dict[int, list[BandwidthPoint]] = {}
        remote: dict[int, list[RemoteRead]] = {}
        cached: list[tuple[int, float]] = []
        for key in sorted(self._rounds):
            mode, node, memory, size = key
            if mode is Mode.READ:
                reads.setdefault(node, []).append(BandwidthPoint(threads=size, gb_per_s=self._value(key)))
            elif mode is Mode.ALL:
                remote.setdefault(node, []).append(RemoteRead(memory=memory, gb_per_s=self._value(key)))
            elif mode is Mode.SETS:
                cached.append((size, self._value(key)))
        return MemoryFigures(
            reads={node: tuple(points) for node, points in reads.items()},
            remote={node: tuple(points) for node, points in remote.items()},
            cached=_falling(cached),
            barrier_us=self.barrier_us(),
            samples={key: tuple(x for part in rounds for x in part) for key, rounds in self._rounds.items()},
            scatter=self._scatter(),
        )

    def _remote(self, found: Sequence[tuple[NodeFacts, tuple[int, ...]]]) -> None:
        for node, cpus in found:
            for other in self._machine.nodes:
                if other.id != node.id:
                    size = buffer_mebibytes(self._machine, other)
                    self._take(Task(Mode.ALL, size, cpus, other.id, other.cores), node)

    def _take(self, task: Task, node: NodeFacts) -> None:
        for key, readings in self._run(task).items():
            self._rounds.setdefault((task.mode, node.id, task.memory, key), []).append(tuple(readings))

    def _value(self, key: tuple[Mode, int, int, int]) -> float:
        best = min if key[0] is Mode.BARRIER else max
        return statistics.median(best(readings) for readings in self._rounds[key])

    def _scatter(self) -> str:
        """A sentence on the node whose read bandwidth with all threads differs most between the rounds."""
        worst, text = SCATTER, ""
        for node, cpus in lanes(self._machine):
            bests = [max(r) for r in self._rounds[Mode.READ, node.id, node.id, len(cpus)]]
            spread = (max(bests) - min(bests)) / statistics.median(bests)
            if spread > worst:
                worst = spread
                text = (
                    f"read bandwidth of node {node.id} scattered by {100 * spread:.0f} % between rounds "
                    f"({min(bests):.1f} to {max(bests):.1f} GB/s)"
                )
        return text


def lanes(machine: Machine) -> list[tuple[NodeFacts, tuple[int, ...]]]:
    """The CPUs of every node's lane: one of each core, as many as the thread count gives the node."""
    total = sum(len(node.cores) for node in machine.nodes)
    return [
        (node, node.cores[: max(1, machine.threads * len(node.cores) // total)]) for node in machine.nodes if node.cores
    ]


def buffer_mebibytes(machine: Machine, node: NodeFacts) -> int:
    """Size of the buffer to read: four times the last-level caches, so that they hold little of it, and at
    least 512 MiB; at most an eighth of the node's free memory."""
    return max(16, min(max(4 * _last_level(machine), 512 << 20), node.available_bytes // 8) >> 20)


def sets_mebibytes(machine: Machine, node: NodeFacts) -> int:
    """Largest working set: eight times the last-level caches, at most an eighth of the node's free memory."""
    return max(16, min(8 * max(_last_level(machine), 32 << 20), node.available_bytes // 8) >> 20)


def probe_runner(isa: Isa, folder: Path) -> Run:
    """Builds the memory probe in ``folder``; the result runs it. Raises HetcompError, both here and when it runs."""
    source, probe = folder / "memory_probe.cpp", folder / "memory_probe"
    source.write_text(
        (resources.files("hetcomp.codegen_templates") / "probe" / "memory_probe.cpp").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    compiler = find_cxx()
    flags = ["-std=c++20", "-O3", *isa_flags(isa), "-pthread", f"-I{installed_runtime.include()}"]
    done = subprocess.run([str(compiler.path), *flags, str(source), "-o", str(probe)], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{compiler.path} cannot build the memory probe: {last}.")
    return lambda task: _run(probe, task)


def _run(probe: Path, task: Task) -> Readings:
    cpus, touch = (",".join(map(str, part)) or "-" for part in (task.cpus, task.touch))
    command = [str(probe), task.mode.value, str(task.mebibytes), cpus, str(task.memory), touch]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HetcompError(f"The memory probe cannot be run: {error}.") from None
    if done.returncode != 0:
        raise HetcompError(f"The memory probe failed with status {done.returncode}: {done.stderr.strip()}.")
    return {int(key): readings for key, readings in json.loads(done.stdout)}


def _last_level(machine: Machine) -> int:
    last = max((c.level for c in machine.caches), default=0)
    return sum(c.bytes * c.instances for c in machine.caches if c.level == last)


def _falling(cached: Sequence[tuple[int, float]]) -> tuple[WorkingSetPoint, ...]:
    """A smaller working set is read at least as fast as a larger one; where it was not, something held it up."""
    points: list[WorkingSetPoint] = []
    for size, rate in reversed(cached):
        floor = points[-1].gb_per_s if points else 0.0
        points.append(WorkingSetPoint(bytes=size, gb_per_s=max(rate, floor)))
    return tuple(reversed(points))
