"""Decode and prefill of whole models on the CPU, beside llama.cpp (and transformers) with weights of the same size.

python -m benchmarks.cpu_e2e --peer-python .venv-peers/bin/python [--formats q4,q8,bf16] [--rounds 5]
python -m benchmarks.cpu_e2e --artifact OUT.hetc            # one artifact, without peers

llama.cpp runs each of its types that stands beside one of our formats with and without repacked weights; the best of
them counts, for each phase by itself. The engines take turns (A B C A B C ..), each in a process that keeps its model
loaded, so that what else the machine does falls on all alike. The machine's read bandwidth is measured before and after
each of hetcomp's decodes; the bound is the best of these readings divided by the bytes that a token reads (plan).
On a virtual machine whose bandwidth changes from second to second the best of short readings is more than a decode of a
second can have: the share of their median stands beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import models, read_bandwidth
from benchmarks.record import Record
from benchmarks.worker import Worker

CONTEXT = 1024
# llama.cpp's types beside our formats; its K-quants of 4 bits take 4.8 bits a weight.
PEER_TYPES = {"q4": ("Q4_0", "Q4_K_M"), "q8": ("Q8_0",), "bf16": ("BF16",)}
# What each format is compared with in logits: the same numbers up to the formats' rounding.
_LEAST_COSINE = {"bf16": 0.99, "q8": 0.98, "q4": 0.8}


def peers(model: str, form: str, peer_python: Path, threads: int) -> Iterator[tuple[str, Worker]]:
    """llama.cpp in every type and setting that stands beside our format."""
    options = ("--threads", str(threads), "--context", str(CONTEXT))
    for kind in PEER_TYPES[form]:
        file = models.gguf(model, peer_python, kind)
        yield f"llama.cpp {kind}", Worker(peer_python, "llama_cpp_worker", file, *options)
        if kind.startswith("Q"):
            yield f"llama.cpp {kind} plain", Worker(peer_python, "llama_cpp_worker", file, *options, "--no-repack")


def run_format(record: Record, o: argparse.Namespace, form: str, artifact: Path) -> None:
    """Measures one format beside its peers."""
    others = dict(peers(o.model, form, o.peer_python, o.threads)) if o.peer_python and form in PEER_TYPES else {}
    if o.transformers and form == "bf16":
        checkpoint = models.checkpoint(o.model)
        others["transformers"] = Worker(sys.executable, "transformers_worker", checkpoint, "--threads", str(o.threads))
    run_beside(record, o, form, artifact, others, _LEAST_COSINE.get(form, 0.0))


def run_beside(
    record: Record, o: argparse.Namespace, form: str, artifact: Path, others: dict[str, Worker], least_cosine: float
) -> None:
    """Measures an artifact, ``form`` in the record, beside other engines whose logits' cosine to its own is at least
    ``least_cosine``."""
    plan = models.plan(artifact)
    with ExitStack() as stack:
        engines = {f"hetcomp {form}": Worker(sys.executable, "hetcomp_worker", artifact, "--threads", str(o.threads))}
        engines |= others
        for worker in engines.values():
            stack.enter_context(worker)
        ids = random.Random(0).choices(range(plan.model.vocab), k=max(o.prompts))
        _check_agreement(record, engines, least_cosine, ids[:16])
        for worker in engines.values():  # warm-up, not recorded
            worker.call("prefill", prompt=ids[: o.prompts[0]])
            worker.call("decode", prompt=ids[:16], tokens=4)
        for _ in range(o.rounds):
            before = read_bandwidth.readings(o.threads)
            for name, worker in engines.items():
                # Not timed: what measured the bandwidth, or the engine before, may still hold the cores.
                worker.call("decode", prompt=ids[:16], tokens=max(8, o.tokens // 4))
                record.add(f"{name} decode", "tok/s", worker.call("decode", prompt=ids[:16], tokens=o.tokens))
                if name.startswith("hetcomp"):
                    readings = [*before, *read_bandwidth.readings(o.threads)]
                    record.add(f"read bandwidth beside {form}", "GB/s", max(readings))
                    record.add(f"read bandwidth beside {form}, median", "GB/s", statistics.median(readings))
            for length in o.prompts:
                for name, worker in engines.items():
                    record.add(f"{name} prefill {length}", "tok/s", worker.call("prefill", prompt=ids[:length]))
    _derive(record, o, form, list(engines), models.decode_bytes(plan))


def _check_agreement(record: Record, engines: dict[str, Worker], least_cosine: float, ids: list[int]) -> None:
    """All engines must compute the same model: cosine of their logits to ours, recorded."""
    logits = {name: np.array(worker.call("logits", prompt=ids)) for name, worker in engines.items()}
    own, *others = logits
    for worker in engines.values():
        record.versions.update(worker.call("version"))
    for name in others:
        scale = np.linalg.norm(logits[name]) * np.linalg.norm(logits[own])
        cosine = float(logits[name] @ logits[own] / scale)
        record.derived[f"{name} logits, cosine to {own}"] = cosine
        if not cosine > least_cosine:
            raise SystemExit(f"{name} computes something else than {own}: cosine of the logits {cosine:.4f}")


def _derive(record: Record, o: argparse.Namespace, form: str, engines: list[str], bytes_a_token: float) -> None:
    own, *others = engines
    record.derived[f"{form} bytes a token"] = bytes_a_token
    bound, of_best = _shares(record, form, own, bytes_a_token, "")
    _, of_median = _shares(record, form, own, bytes_a_token, ", median")
    record.derived[f"{form} decode bound tok/s, median"] = bound
    record.derived[f"{own} decode / its bound, median"] = of_best
    record.derived[f"{own} decode / the median reading, median"] = of_median
    for phase in ("decode", *(f"prefill {length}" for length in o.prompts)):
        ours = record[f"{own} {phase}"].median
        ratios = {name: ours / record[f"{name} {phase}"].median for name in others}
        for name, ratio in ratios.items():
            record.derived[f"{own} / {name} {phase}"] = ratio
        llama = [ratio for name, ratio in ratios.items() if name.startswith("llama.cpp")]
        if llama:
            record.derived[f"{own} / llama.cpp's best {phase}"] = min(llama)


def _shares(record: Record, form: str, own: str, bytes_a_token: float, readings: str) -> tuple[float, float]:
    """Medians of the bound in tokens a second and of what was reached of it.

    Each decode has its own bound: on a virtual machine the bandwidth changes from minute to minute.
    """
    bandwidth = record[f"read bandwidth beside {form}{readings}"].samples
    bounds = [gb_per_s * 1e9 / bytes_a_token for gb_per_s in bandwidth]
    shares = [speed / bound for speed, bound in zip(record[f"{own} decode"].samples, bounds, strict=True)]
    return statistics.median(bounds), statistics.median(shares)


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
    parser.add_argument("--formats", default="q4,q8,bf16")
    parser.add_argument("--artifact", type=Path, help="an artifact instead of the model; its name ends in -FORMAT.hetc")
    parser.add_argument("--peer-python", type=Path, default=None, help="python of the environment with llama.cpp")
    parser.add_argument("--transformers", action="store_true", help="transformers beside bf16 as well")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[512])
    parser.add_argument("--tokens", type=int, default=128)
    o = parser.parse_args()
    conditions = {
        "model": o.artifact.stem if o.artifact else o.model,
        "threads": o.threads,
        "decode": f"{o.tokens} tokens after 16",
        "prefill": o.prompts,
    }
    record = Record("cpu_e2e", conditions)
    if o.artifact:
        record.plan_sha256 = models.plan_sha256(o.artifact)
        run_format(record, o, o.artifact.stem.rpartition("-")[2], o.artifact)
    else:
        for form in o.formats.split(","):
            run_format(record, o, form, models.artifact(o.model, form, CONTEXT))
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
