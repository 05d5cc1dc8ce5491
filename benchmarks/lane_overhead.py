"""What lanes cost: barriers, regions without work, and short ops that stream weights.

python -m benchmarks.lane_overhead [--threads 15,8,4,2] [--repeats 3] [--free]

Beside ``hetcomp/lane.h`` (``lanes``) stand a barrier where every thread has a line of its own (``gathered``) and work
that is drawn from a shared counter from the first task on (``drawn``), in turns over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.hardware.compilers import find_cxx

_ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread")


def measure(threads: str, repeats: int, bound: bool) -> list[dict[str, float | str]]:
    """The cases in the order of their runs: ``name``, ``threads``, ``us`` a call, ``bytes`` a call."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as folder:
        program = Path(folder) / "lane_overhead"
        include = _ROOT / "runtime_lib" / "include"
        subprocess.run([find_cxx().path, *_FLAGS, f"-I{include}", source, "-o", program], check=True)
        command = [str(program), str(int(bound)), str(repeats), threads]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Command line."""
    here = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    counts = [n for n in (here - 1, 8, 4, 2) if 2 <= n <= here]
    parser.add_argument("--threads", default=",".join(map(str, dict.fromkeys(counts))) or "2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--free", action="store_true", help="threads are not bound to CPUs")
    o = parser.parse_args()
    record = Record("lane_overhead", {"threads": o.threads, "bound": not o.free})
    for case in measure(o.threads, o.repeats, not o.free):
        name = f"{case['threads']} threads, {case['name']}"
        record.add(name, "us", float(case["us"]), higher_is_better=False)
        if case["bytes"]:
            record.add(f"{name}, rate", "GB/s", float(case["bytes"]) / float(case["us"]) / 1e3)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
