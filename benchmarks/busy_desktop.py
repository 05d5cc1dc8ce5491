"""Decode speed beside one process that eats a core, as a share of the idle speed.

python -m benchmarks.busy_desktop [--peer-python .venv-peers/bin/python]

Worker threads that only spin lose far more than the core that is gone: the thread which was displaced holds
up all others while they burn the time in which it could have run.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import models
from benchmarks.cpu_e2e import CONTEXT, show
from benchmarks.record import Record
from benchmarks.worker import Worker


@contextmanager
def cpu_hog() -> Iterator[None]:
    """One other process that computes without pause and is free to move between the cores."""
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        hog.kill()
        hog.wait()


def run(model: str, peer_python: Path | None, threads: int, rounds: int, tokens: int) -> Record:
    """Measures idle and busy in turns; without ``peer_python`` llama.cpp is left out."""
    artifact = models.artifact(model, "bf16", CONTEXT)
    conditions = {"model": model, "threads": threads, "decode": f"{tokens} tokens after 16", "hogs": 1}
    record = Record("busy_desktop", conditions, plan_sha256=models.plan_sha256(artifact))
    with ExitStack() as stack:
        workers = {"hetcomp": Worker(sys.executable, "hetcomp_worker", artifact, "--threads", str(threads))}
        if peer_python is not None:
            options = ("--threads", str(threads), "--context", str(CONTEXT))
            workers["llama.cpp"] = Worker(peer_python, "llama_cpp_worker", models.gguf(model, peer_python), *options)
        for worker in workers.values():
            stack.enter_context(worker)
        ids = random.Random(0).choices(range(1000), k=16)
        for worker in workers.values():
            record.versions.update(worker.call("version"))
            worker.call("decode", prompt=ids, tokens=4)
        for _ in range(rounds):
            for name, worker in workers.items():
                record.add(f"{name} idle", "tok/s", worker.call("decode", prompt=ids, tokens=tokens))
            with cpu_hog():
                for name, worker in workers.items():
                    record.add(f"{name} busy", "tok/s", worker.call("decode", prompt=ids, tokens=tokens))
    for name in workers:
        record.derived[f"{name} busy / idle"] = record[f"{name} busy"].median / record[f"{name} idle"].median
    return record


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--peer-python", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    record = run(options.model, options.peer_python, options.threads, options.rounds, options.tokens)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
