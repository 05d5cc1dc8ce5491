"""Decode and prefill of artifacts whose weights are more than the memory, beside the disk's speed and the prediction.

python -m benchmarks.from_disk OUT.hetc [PLAIN.hetc ..] [--rounds 4] [--tokens 8] [--prompt 64]

Start it where the memory is limited (``systemd-run --scope -p MemoryMax=8G``, or a memory cgroup); the files are
dropped from the page cache first. Weights are mapped and not verified: only the model's own reads fill the cache.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.runtime import Runtime

_SEQUENTIAL = 1 << 30


def disk_gb_per_s(file: Path) -> float:
    """One reader, in order, past the page cache."""
    done = 0
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while done < _SEQUENTIAL and (part := len(opened.read(8 << 20))):
            done += part
        took = time.perf_counter() - start
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return done / took / 1e9


def read_bytes() -> int:
    """That this process has had the disk read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def measure(record: Record, artifact: Path, o: argparse.Namespace) -> None:
    """Drops the files from the page cache, loads, and runs one prompt and ``rounds`` times ``tokens`` of decode."""
    name, files = artifact.stem, sorted(artifact.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    record.add(f"disk beside {name}", "GB/s", disk_gb_per_s(files[0]))
    runtime = Runtime.load(artifact, threads=o.threads, weights="mmap", verify_weights=False)
    ids = random.Random(1).choices(range(runtime.info.vocab), k=o.prompt + o.rounds * o.tokens)
    with runtime.session() as session:
        start = time.perf_counter()
        session.prefill(ids[: o.prompt])
        record.add(f"{name} prefill {o.prompt}", "tok/s", o.prompt / (time.perf_counter() - start))
        for r in range(o.rounds):
            before, start = read_bytes(), time.perf_counter()
            for i in range(o.tokens):
                runtime.decode([session], [ids[o.prompt + r * o.tokens + i]])
            record.add(f"{name} decode", "tok/s", o.tokens / (time.perf_counter() - start))
            record.add(f"{name} read a token", "GB", (read_bytes() - before) / o.tokens / 1e9, higher_is_better=False)
    runtime.close()
    record.add(f"disk beside {name}", "GB/s", disk_gb_per_s(files[0]))
    plan = models.plan(artifact)
    decode = next(t for t in plan.timelines if t.phase == "decode")
    record.derived[f"{name} decode, predicted tok/s"] = decode.tokens_per_s
    if plan.disk is not None:
        record.derived[f"{name} disk that the plan assumes, GB/s"] = plan.disk.gb_per_s
        record.derived[f"{name} missing part that the plan assumes"] = plan.disk.missing


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    record = Record("from_disk", {"artifacts": [a.stem for a in o.artifacts], "prompt": o.prompt})
    for artifact in o.artifacts:
        measure(record, artifact, o)
    show(record)
    print(record.write(o.out) if o.out else record.write())


if __name__ == "__main__":
    main()
