"""The record that every benchmark writes: one JSON file a run, format ``hetcomp-bench/1``.

It holds what one needs to judge and repeat a figure: machine, commit, plan hash, command, all samples.
Speeds are compared within one record only, never across records.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FORMAT = "hetcomp-bench/1"
_IDLE_LOAD = 0.7  # one-minute load average up to which a machine of any size counts as idle
RESULTS = Path(__file__).resolve().parent / "results"
_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Series:
    """Samples of one quantity in the order in which they were taken; ``higher_is_better`` tells what
    ``best`` is.
    """

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)
    higher_is_better: bool = True

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """The best sample."""
        return max(self.samples) if self.higher_is_better else min(self.samples)


@dataclass
class Record:
    """One run of one benchmark. ``derived`` holds ratios and bounds computed from the series; ``versions``
    the software measured, peers included; ``conditions`` what was asked for (model, threads, lengths).
    """

    benchmark: str
    conditions: dict[str, Any]
    series: list[Series] = field(default_factory=list)
    derived: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    plan_sha256: str | None = None
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def __post_init__(self) -> None:
        if self.load_before > _IDLE_LOAD:
            print(
                f"warning: the load of this machine is {self.load_before:.1f}; speeds measured now are of no use",
                file=sys.stderr,
            )

    def add(self, name: str, unit: str, value: float, higher_is_better: bool = True) -> None:
        """Appends a sample to the series ``name``, which is made at its first sample."""
        for series in self.series:
            if series.name == name:
                series.samples.append(value)
                return
        self.series.append(Series(name, unit, [value], higher_is_better))

    def __getitem__(self, name: str) -> Series:
        for series in self.series:
            if series.name == name:
                return series
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready data, machine and commit included."""
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine() | {"load_before": self.load_before},
            "commit": commit(),
            "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
            "plan_sha256": self.plan_sha256,
            "versions": self.versions,
            "conditions": self.conditions,
            "series": [asdict(s) | {"median": s.median, "best": s.best} for s in self.series],
            "derived": self.derived,
        }

    def write(self, folder: Path = RESULTS) -> Path:
        """Writes the record to ``folder``, named by benchmark, time and commit, and returns the path."""
        data = self.to_json()
        stamp = data["time"].replace(":", "").replace("-", "")[:15]
        path = folder / f"{self.benchmark}-{stamp}-{data['commit']['id'][:7]}.json"
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.rename(path)
        return path


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory, kernel, huge-page policy, instruction sets that matter."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpu_info.splitlines() if ":" in line)
    flags = set(next((value for key, value in fields.items() if key.strip() == "flags"), "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": next((value.strip() for key, value in fields.items() if key.strip() == "model name"), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "none",
        "flags": [flag for flag in wanted if flag in flags],
    }


def commit() -> dict[str, Any]:
    """Commit of the working tree and whether files under version control differ from it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    return {
        "id": git("rev-parse", "HEAD") or "unknown",
        "modified": bool(git("status", "--porcelain", "-uno")),
    }
