"""What a trace of GPUs costs and says, and prompts whose experts come through the ring of pinned memory.

python -m benchmarks.gpu_trace OUT.hetc [--prompt 4096] [--tokens 128] [--threads 15] [--leave 18] [--trace FILE]

Decode and a prompt, with a trace and without in turns, and how long kernels, hand-overs and copies of the traced steps
took. --leave: GB of memory that another process leaves to this one, so that the weights are mapped and not pinned.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.models import plan_sha256
from benchmarks.record import Record
from hetcomp.bench import undisturbed
from hetcomp.executable import Executable
from hetcomp.lane_trace import GpuEvent, TracedStep, traced_steps, write_trace

_WARM_UP = 16
_FILL = "import sys; held = bytearray(b'x') * int(sys.argv[1]); print(flush=True); sys.stdin.read()"


@contextmanager
def memory_left(gigabytes: float) -> Iterator[None]:
    """Another process has all of the available memory but ``gigabytes``."""
    with Path("/proc/meminfo").open(encoding="utf-8") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    size = max(0, available - int(gigabytes * 1e9))
    command = [sys.executable, "-c", _FILL, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.communicate()


def measure(record: Record, exe: Executable, ids: Sequence[int], tokens: int, traced: bool) -> list[TracedStep]:
    """A prompt and what the model says behind it; the steps, if they were traced."""
    with traced_steps(exe.runtime) if traced else nullcontext([]) as steps:
        start = time.perf_counter()
        generated = exe.generate(list(ids), max_new_tokens=tokens + 1, ignore_eos=True)
        stamps = [time.perf_counter() for _ in generated]
        how = " traced" if traced else ""
        record.add(f"prefill{how}", "tok/s", len(ids) / (stamps[0] - start))
        times = [(after - before) * 1e3 for before, after in pairwise(stamps)]
        record.add(f"decode{how}", "ms", undisturbed(times, {})[0], higher_is_better=False)
    return steps


def tell(record: Record, step: TracedStep, name: str) -> None:
    """How long the step was, and how long a GPU was busy in it with what; refuses a trace that cannot be."""
    line = [e for e in step.gpu_events if not e.bytes]
    for before, event in pairwise(line):
        assert before.begin_ns <= before.end_ns == event.begin_ns <= event.end_ns, "no line of launches"

    def add(what: str, events: Sequence[GpuEvent]) -> None:
        took = sum(e.end_ns - e.begin_ns for e in events) / 1e6
        record.add(f"{name}: {what} ({len(events)})", "ms", took, higher_is_better=False)

    record.add(f"{name}: the step", "ms", (step.end_ns - step.begin_ns) / 1e6, higher_is_better=False)
    record.add(f"{name}: begin to first kernel", "ms", (line[0].begin_ns - step.begin_ns) / 1e6, higher_is_better=False)
    record.add(f"{name}: last kernel to end", "ms", (step.end_ns - line[-1].end_ns) / 1e6, higher_is_better=False)
    add("hand-overs", [e for e in line if not e.kernel])
    add("copies", [e for e in step.gpu_events if e.bytes])
    for role in sorted({e.role for e in line if e.kernel}):
        add(role, [e for e in line if e.role == role])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--leave", type=float, help="GB of memory")
    parser.add_argument("--trace", type=Path, help="file to write the last round's prompt and three decode steps to")
    o = parser.parse_args()
    conditions = {k: getattr(o, k) for k in ("prompt", "tokens", "threads", "leave")}
    record = Record("gpu_trace", {"artifact": o.artifact.stem, **conditions})
    record.plan_sha256 = plan_sha256(o.artifact)
    with memory_left(o.leave) if o.leave else nullcontext():
        exe = hetcomp.load(o.artifact, threads=o.threads)
        ids = random.Random(0).choices(range(exe.plan.model.vocab), k=o.prompt)
        measure(Record("warm up", {}), exe, ids, _WARM_UP, traced=False)
        steps: list[TracedStep] = []
        for _ in range(o.rounds):
            measure(record, exe, ids, o.tokens, traced=False)
            steps = measure(record, exe, ids, o.tokens, traced=True)
            decoded = sorted((s for s in steps if s.decode), key=lambda s: s.end_ns - s.begin_ns)
            tell(record, decoded[len(decoded) // 2], "median decode step")
            tell(record, max((s for s in steps if not s.decode), key=lambda s: s.tokens), "longest step")
        record.conditions["notes"] = exe.stats["notes"]
        record.conditions["streamed"] = exe.stats["gpu"]["streamed"]
    if o.trace:
        kept = [s for s in steps if not s.decode] + [s for s in steps if s.decode][-3:]
        write_trace(o.trace, kept, exe.plan, list(exe.stats["decode"]["timers_ms"]))
    show(record)
    print(record.conditions["notes"])
    print(record.write())


if __name__ == "__main__":
    main()
