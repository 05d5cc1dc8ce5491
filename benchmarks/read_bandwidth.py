"""Measures the machine's DRAM read bandwidth with 1 .. n threads: the bound of every decode figure.

python -m benchmarks.read_bandwidth [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.record import Record

_SOURCE = Path(__file__).with_suffix(".cpp")
_BINARY = Path(__file__).resolve().parent.parent / "build" / "benchmarks" / "read_bandwidth"


def build() -> Path:
    """Compiles the probe for this CPU, if that was not done since its source changed."""
    if not _BINARY.exists() or _BINARY.stat().st_mtime < _SOURCE.stat().st_mtime:
        _BINARY.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
        flags = ["-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(_BINARY)], check=True)
    return _BINARY


def measure(threads: int, repeats: int = 5) -> list[list[float]]:
    """GB/s (10^9 bytes) of ``repeats`` passes over 2 GiB, for 1, 2, .. ``threads`` threads."""
    output = subprocess.run([str(build()), str(threads), "2048", str(repeats)], check=True, capture_output=True)
    samples: list[list[float]] = json.loads(output.stdout)
    return samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    record = Record("read_bandwidth", {"buffer_mib": 2048, "threads": options.threads})
    for threads, samples in enumerate(measure(options.threads), start=1):
        for sample in samples:
            record.add(f"{threads} thread{'s' if threads > 1 else ''}", "GB/s", sample)
        print(f"{threads:3d} threads: best {max(samples):7.1f} GB/s, median {record.series[-1].median:7.1f}")
    print(record.write())


if __name__ == "__main__":
    main()
