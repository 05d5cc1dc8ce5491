"""Times variants of launches on this machine's GPU, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hetcomp.backends.gpu.compile_kernels import CompiledKernel


@dataclass(frozen=True)
class TimedLaunch:
    """A compiled kernel, its grid, and its arguments: ``{"buffer": name, "offset": bytes}`` or ``{"i32": number}``."""

    made: CompiledKernel
    grid: tuple[int, int, int]
    arguments: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class TimedBuffer:
    """Device memory: ``bytes``, filled with a file's contents again and again, or None: written by the launches."""

    bytes: int
    pattern: Path | None = None


@dataclass(frozen=True)
class TimingJob:
    """Variants of launches that should write the same ``outputs`` (buffers, and the numpy type of each, or bf16)."""

    buffers: Mapping[str, TimedBuffer]
    outputs: Mapping[str, str]
    variants: Sequence[Sequence[TimedLaunch]]


@dataclass(frozen=True)
class VariantTime:
    """Median microseconds of each launch, and the norm of the difference of the outputs from those of the job's first
    variant, in parts of their norm (infinite where a number is not finite)."""

    us: tuple[float, ...]
    difference: float


class TileTimer(Protocol):
    """A GPU that launches can be timed on. ``name``, ``driver``: of what was measured; ``cc``: compute capability."""

    name: str
    driver: str
    cc: int

    def time(self, job: TimingJob) -> list[VariantTime]:
        """Of all variants; empty if any of them failed."""


class GpuTimer:
    """The first GPU of this machine, as :class:`TileTimer`."""

    def __init__(self, process: subprocess.Popen[str], facts: Mapping[str, Any]) -> None:
        self._process: subprocess.Popen[str] | None = process
        self.name, self.driver, self.cc = str(facts["gpu"]), str(facts["driver"]), int(facts["cc"])

    @classmethod
    def open(cls) -> GpuTimer | None:
        """None where there is no GPU, or no driver that loads."""
        process, facts = _start()
        if "error" in facts:
            _end(process)
            return None
        return cls(process, facts)

    def __enter__(self) -> GpuTimer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = None

    def time(self, job: TimingJob) -> list[VariantTime]:
        """As TileTimer's. A fault of a kernel ends the process; the next job has another."""
        if self._process is None:
            self._process, facts = _start()
            if "error" in facts:
                return []
        answer = _ask(self._process, json.dumps(_described(job)))
        if "error" in answer:
            _end(self._process)
            self._process = None
            return []
        return [VariantTime(tuple(v["us"]), float(v["difference"])) for v in answer["variants"]]


def _start() -> tuple[subprocess.Popen[str], dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "hetcomp.backends.gpu.time_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, _answer(process)


def _ask(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert process.stdin is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return {"error": "the process has ended"}
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "the process has ended"}
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _described(job: TimingJob) -> dict[str, Any]:
    return {
        "buffers": {
            name: {"bytes": b.bytes, "pattern": str(b.pattern) if b.pattern else None}
            for name, b in job.buffers.items()
        },
        "outputs": dict(job.outputs),
        "variants": [[_described_launch(launch) for launch in variant] for variant in job.variants],
    }


def _described_launch(launch: TimedLaunch) -> dict[str, Any]:
    made, (x, y, z) = launch.made, launch.grid
    return {
        "cubin": str(made.cubin),
        "entry": made.entry,
        "grid": [x, y, z],
        "num_warps": made.num_warps,
        "shared_bytes": made.shared_bytes,
        "scratch_bytes": made.global_scratch_bytes * x * y * z,
        "arguments": [dict(a) for a in launch.arguments],
    }
