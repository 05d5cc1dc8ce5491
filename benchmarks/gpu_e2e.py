"""Decode and prefill of artifacts with GPU code, each in a process of its own, beside what their plans predict.

python -m benchmarks.gpu_e2e OUT.hetc [MORE.hetc ..] [--rounds 3] [--tokens 128] [--prompts 512,4096] [--batches 1,8]

Decode is that of sequences with 16 tokens each; a batch's speed counts the
tokens of all of them. Device memory is what the program has taken of the plan's figure. Where the plan defers experts,
decode is measured without that too, in turns. Beside each decode the machine's read bandwidth is measured: what
the CPU's lanes do in a step is bound by it, and on a virtual machine it changes from minute to minute.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from pathlib import Path

from benchmarks import models, read_bandwidth
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.ir.deferral import deferrals
from hetcomp.passes.phases import mix_of

_WARM_UP = 16


def run(record: Record, o: argparse.Namespace) -> None:
    """All rounds of every artifact."""
    ids = random.Random(0).choices(range(models.plan(o.artifacts[0]).model.vocab), k=max(o.prompts))
    for artifact in o.artifacts:
        # One artifact is loaded at a time: their weights together may be more than the memory.
        options = ("--threads", str(o.threads), "--weights", o.weights, *(("--gpus", o.gpus) if o.gpus else ()))
        with Worker(sys.executable, "hetcomp_worker", artifact, *options) as worker:
            _measure(record, o, artifact, worker, ids)
            _compare(record, artifact)


def _measure(record: Record, o: argparse.Namespace, artifact: Path, worker: Worker, ids: list[int]) -> None:
    name, deferring = artifact.stem, bool(deferrals(models.plan(artifact)))
    record.versions.update(worker.call("version"))
    worker.call("decode", prompt=ids[:16], tokens=_WARM_UP)
    for length in o.prompts:
        worker.call("prefill", prompt=ids[:length])
    for _ in range(o.rounds):
        before = read_bandwidth.readings(o.threads)
        worker.call("decode", prompt=ids[:16], tokens=_WARM_UP)
        record.add(f"{name} decode", "tok/s", worker.call("decode", prompt=ids[:16], tokens=o.tokens))
        readings = [*before, *read_bandwidth.readings(o.threads)]
        record.add(f"read bandwidth beside {name}, median", "GB/s", statistics.median(readings))
        if deferring:
            worker.call("set_deferral", which="none")
            plain = worker.call("decode", prompt=ids[:16], tokens=o.tokens)
            record.add(f"{name} decode, nothing deferred", "tok/s", plain)
            worker.call("set_deferral", which="generated")
        for batch in (b for b in o.batches if b > 1):
            speed = worker.call("decode_batch", prompt=ids[:16], sequences=batch, tokens=o.tokens // 2)
            record.add(f"{name} decode of {batch}", "tok/s", speed)
        for length in o.prompts:
            record.add(f"{name} prefill {length}", "tok/s", worker.call("prefill", prompt=ids[:length]))
    stats = worker.call("stats")
    for i, device in enumerate(stats["gpu"]["devices"] if "gpu" in stats else ()):
        record.derived[f"{name} device bytes of GPU {i}"] = float(device["bytes"])
    record.conditions.setdefault("stats", {})[name] = stats


def _compare(record: Record, artifact: Path) -> None:
    """The plan's predictions, of a decode step and of the prompt that it is made for, beside what was measured."""
    name, plan = artifact.stem, models.plan(artifact)
    record.conditions[f"{name} plan_sha256"] = models.plan_sha256(artifact)
    for timeline in plan.timelines:
        what = f"{name} decode" if timeline.phase == "decode" else f"{name} prefill {mix_of(plan).prompt}"
        if timeline.phase in ("decode", "prefill") and any(s.name == what for s in record.series):
            record.derived[f"{what}, predicted tok/s"] = timeline.tokens_per_s
            record.derived[f"{what}, predicted / measured"] = timeline.tokens_per_s / record[what].median


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[512])
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--weights", default="auto", help="ram, mmap or auto, as hetcomp.load takes it")
    parser.add_argument("--gpus", help="numbers of the artifacts' GPUs: 0,1; 0,0 runs two programs on one")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    record = Record("gpu_e2e", {"artifacts": [a.stem for a in o.artifacts], "prompts": o.prompts, "batches": o.batches})
    record.add("read bandwidth", "GB/s", max(max(samples) for samples in read_bandwidth.measure(o.threads, repeats=3)))
    run(record, o)
    stats = record.conditions.pop("stats")
    show(record)
    record.conditions["stats"] = stats
    print(record.write(o.out) if o.out else record.write())


if __name__ == "__main__":
    main()
