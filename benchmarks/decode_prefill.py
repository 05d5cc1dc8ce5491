"""Decode and prefill speed of hetcomp beside transformers and llama.cpp on the same bf16 weights.

python -m benchmarks.decode_prefill --peer-python .venv-peers/bin/python [--rounds 5]

The engines take turns (A B C A B C ..), each in a process that keeps its model loaded, so that what else the
machine does falls on all alike. The machine's read bandwidth is measured before and after each of hetcomp's
decodes; the bound is that bandwidth divided by the bytes that a token reads (from the plan).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import models, read_bandwidth
from benchmarks.record import Record
from benchmarks.worker import Worker

CONTEXT = 1024


def run(model: str, peer_python: Path | None, threads: int, rounds: int, prompt: int, tokens: int) -> Record:
    """Measures all engines; without ``peer_python`` llama.cpp is left out."""
    artifact = models.artifact(model, "bf16", CONTEXT)
    checkpoint = models.checkpoint(model)
    plan = models.plan(artifact)
    conditions = {
        "model": model,
        "threads": threads,
        "decode": f"{tokens} tokens after 16",
        "prefill": prompt,
    }
    record = Record("decode_prefill", conditions, plan_sha256=models.plan_sha256(artifact))
    with ExitStack() as stack:
        workers = {
            "hetcomp": Worker(sys.executable, "hetcomp_worker", artifact, "--threads", str(threads)),
            "transformers": Worker(sys.executable, "transformers_worker", checkpoint, "--threads", str(threads)),
        }
        if peer_python is not None:
            options = ("--threads", str(threads), "--context", str(CONTEXT))
            workers["llama.cpp"] = Worker(peer_python, "llama_cpp_worker", models.gguf(model, peer_python), *options)
        for worker in workers.values():
            stack.enter_context(worker)
        ids = random.Random(0).choices(range(plan.model.vocab), k=prompt)
        _check_agreement(record, workers, ids[:16])
        for worker in workers.values():  # warm-up, not recorded
            worker.call("prefill", prompt=ids)
            worker.call("decode", prompt=ids[:16], tokens=4)
        for _ in range(rounds):
            before = _bandwidth(threads)
            for name, worker in workers.items():
                record.add(f"{name} decode", "tok/s", worker.call("decode", prompt=ids[:16], tokens=tokens))
                if name == "hetcomp":
                    record.add("read bandwidth", "GB/s", max(before, _bandwidth(threads)))
            for name, worker in workers.items():
                record.add(f"{name} prefill", "tok/s", worker.call("prefill", prompt=ids))
    _derive(record, models.decode_bytes(plan))
    return record


def _bandwidth(threads: int) -> float:
    """The machine's read bandwidth at this moment in GB/s, with as many threads as reach most."""
    return max(max(samples) for samples in read_bandwidth.measure(threads, repeats=3))


def _check_agreement(record: Record, workers: dict[str, Worker], ids: list[int]) -> None:
    """All engines must compute the same model: cosine of their logits to transformers', recorded."""
    logits = {name: np.array(worker.call("logits", prompt=ids)) for name, worker in workers.items()}
    reference = logits["transformers"]
    for name, worker in workers.items():
        record.versions.update(worker.call("version"))
        cosine = float(logits[name] @ reference / np.linalg.norm(logits[name]) / np.linalg.norm(reference))
        record.derived[f"{name} logits cosine to transformers"] = cosine
        if not cosine > 0.99:
            raise SystemExit(f"{name} computes something else than transformers: cosine of the logits {cosine:.4f}")


def _derive(record: Record, bytes_a_token: float) -> None:
    # Each decode has its own bound: on a virtual machine the bandwidth changes from minute to minute.
    bounds = [bandwidth * 1e9 / bytes_a_token for bandwidth in record["read bandwidth"].samples]
    shares = [speed / bound for speed, bound in zip(record["hetcomp decode"].samples, bounds, strict=True)]
    record.derived["bytes a token"] = bytes_a_token
    record.derived["decode bound tok/s, median"] = statistics.median(bounds)
    record.derived["hetcomp decode / its bound, median"] = statistics.median(shares)
    for peer in ("transformers", "llama.cpp"):
        for phase in ("decode", "prefill"):
            if any(series.name == f"{peer} {phase}" for series in record.series):
                ratio = record[f"hetcomp {phase}"].median / record[f"{peer} {phase}"].median
                record.derived[f"hetcomp / {peer} {phase}"] = ratio


def show(record: Record) -> None:
    """Prints the record as tables."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table("", "unit", "median", "best", "samples", title=f"{record.benchmark} {record.conditions}")
    for series in record.series:
        samples = " ".join(f"{sample:.4g}" for sample in series.samples)
        table.add_row(series.name, series.unit, f"{series.median:.4g}", f"{series.best:.4g}", samples)
    console.print(table)
    derived = Table("derived", "value")
    for name, value in record.derived.items():
        derived.add_row(name, f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}")
    console.print(derived)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--peer-python", type=Path, default=None, help="python of the environment with llama.cpp")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    record = run(options.model, options.peer_python, options.threads, options.rounds, options.prompt, options.tokens)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
