"""Decode and prefill out of one GGUF file, ours beside llama.cpp's on the same file, with the machine's read bandwidth.

python -m benchmarks.gguf_speed --peer-python .venv-peers/bin/python [--types Q4_0,Q4_K_M,Q8_0] [--rounds 5]

hetcomp computes in the formats that it takes over by itself; llama.cpp runs with and without repacked weights, and the
better of both counts, for each phase by itself. Turns, readings of the bandwidth and bounds are those of
benchmarks.cpu_e2e. The files are made at first use; --folder names where they lie already.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

import hetcomp
from benchmarks import models
from benchmarks.cpu_e2e import CONTEXT, run_beside, show
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.cli.plan_weights import weight_classes

# Both sides multiply the same weights; what they round activations to differs, and with it, in a model of random
# weights, now and then an expert.
LEAST_COSINE = 0.98


def peers(file: Path, kind: str, peer_python: Path, threads: int) -> dict[str, Worker]:
    """llama.cpp on the file, with repacked weights and with weights as they lie."""
    options = ("--threads", str(threads), "--context", str(CONTEXT))
    return {
        f"llama.cpp {kind}": Worker(peer_python, "llama_cpp_worker", file, *options),
        f"llama.cpp {kind} plain": Worker(peer_python, "llama_cpp_worker", file, *options, "--no-repack"),
    }


def compiled(file: Path, record: Record, kind: str) -> Path:
    """The file's artifact for this machine, compiled anew; records the bits that its weights take."""
    target = models.FOLDER / f"{file.stem}-from-gguf.hetc"
    hetcomp.compile(file, context_length=CONTEXT, out=target)
    numbers, size = Counter[str](), Counter[str]()
    for one in weight_classes(models.plan(target)):
        numbers[one.source] += one.numbers
        size[one.source] += one.bytes
    for source, count in numbers.items():
        record.derived[f"{kind}: bits a weight of {source}"] = 8 * size[source] / count
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q8_0", help="llama.cpp's")
    parser.add_argument("--folder", type=Path, help="where MODEL-TYPE.gguf lie already")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[512])
    parser.add_argument("--tokens", type=int, default=128)
    o = parser.parse_args()
    conditions = {
        "model": o.model,
        "threads": o.threads,
        "decode": f"{o.tokens} tokens after 16",
        "prefill": o.prompts,
    }
    record = Record("gguf-speed", conditions)
    models.FOLDER.mkdir(parents=True, exist_ok=True)
    for kind in o.types.split(","):
        file = o.folder / f"{o.model}-{kind}.gguf" if o.folder else models.gguf(o.model, o.peer_python, kind)
        artifact = compiled(file, record, kind)
        run_beside(record, o, kind, artifact, peers(file, kind, o.peer_python, o.threads), LEAST_COSINE)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
