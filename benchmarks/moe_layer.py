"""One MoE layer (2048 x 768, top-8) beside kt-kernel's, in turns, with the read bandwidth of the same moment.

python -m benchmarks.moe_layer [--peer-python PYTHON --peer-class AMXInt4_MOE] [--experts 128] [--formats q4]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import read_bandwidth
from benchmarks.cpu_kernels import SHAPES, STREAM_BYTES, Case, huge, measure, moe
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.backends.protocol import Isa
from tests.reference.kernel_harness import isas_here

TOKENS = (1, 8, 64, 512, 2048)


def calls_of(tokens: int) -> int:
    """Calls of a sample: a decode step takes some hundred microseconds."""
    return {1: 200, 8: 50, 64: 20}.get(tokens, 4)


def cases(experts: int, isa: Isa, weight_format: str) -> Iterator[Case]:
    """Our kernel at each number of tokens; weights take turns in memory."""
    shape = replace(SHAPES["qwen3-30b-a3b"], experts=experts)
    size = 3 * experts * shape.hidden * shape.intermediate
    data = huge(max(STREAM_BYTES, 2 * size))
    yield from (case for case in moe(shape, isa, weight_format, data, TOKENS) if not case.name.endswith("hot"))


def run(o: argparse.Namespace) -> Record:
    """Measures in turns: for each number of tokens a sample of each, ``rounds`` times."""
    conditions = {"experts": o.experts, "threads": o.threads, "isa": o.isa.value, "formats": o.formats}
    record = Record("moe_layer", conditions)
    ours = {form: list(cases(o.experts, o.isa, form)) for form in o.formats.split(",")}
    shape = SHAPES["qwen3-30b-a3b"]
    with ExitStack() as stack:
        peers: Mapping[str, Worker] = {}
        if o.peer_python:
            sizes = ("--experts", str(o.experts), "--hidden", str(shape.hidden), "--top-k", str(shape.top_k))
            sizes += ("--intermediate", str(shape.intermediate), "--most-tokens", str(max(TOKENS)))
            threads = ("--threads", str(o.peer_threads or o.threads))
            peers = {
                name: stack.enter_context(Worker(o.peer_python, "kt_kernel_worker", name, *threads, *sizes))
                for name in o.peer_class.split(",")
            }
        for peer in peers.values():
            record.versions.update(peer.call("version"))
        for at, tokens in enumerate(TOKENS):
            for _ in range(o.rounds):
                bound = max(read_bandwidth.measure(o.threads, 3)[o.threads - 1])
                record.add(f"read bandwidth, {tokens} tokens", "GB/s", bound)
                for form, of_format in ours.items():
                    case = of_format[at]
                    seconds = measure(case, o.threads, o.seconds)
                    record.add(f"{form}, {tokens} tokens", "us", seconds * 1e6, higher_is_better=False)
                    record.add(f"{form} streams, {tokens} tokens", "GB/s", case.bytes / seconds / 1e9)
                    record.add(f"{form} computes, {tokens} tokens", "TFLOP/s", case.flops / seconds / 1e12)
                for name, peer in peers.items():
                    seconds = peer.call("seconds", tokens=tokens, calls=calls_of(tokens))
                    record.add(f"kt {name}, {tokens} tokens", "us", seconds * 1e6, higher_is_better=False)
            for form in ours:
                mine = record[f"{form}, {tokens} tokens"].samples
                bounds = record[f"read bandwidth, {tokens} tokens"].samples
                streams = record[f"{form} streams, {tokens} tokens"].samples
                record.derived[f"{form} part of the bandwidth, {tokens} tokens"] = statistics.median(
                    s / b for s, b in zip(streams, bounds, strict=True)
                )
                for name in peers:
                    theirs = record[f"kt {name}, {tokens} tokens"].samples
                    record.derived[f"{form} / {name}, {tokens} tokens"] = statistics.median(theirs) / statistics.median(
                        mine
                    )
                print(
                    f"{form} {tokens} tokens: "
                    + ", ".join(
                        f"{s.name.split(',')[0]} {s.median:.4g} {s.unit}"
                        for s in record.series
                        if s.name.endswith(f", {tokens} tokens")
                    ),
                    flush=True,
                )
    return record


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = isas_here()
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-class", default="AMXInt4_MOE")
    parser.add_argument("--peer-threads", type=int)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--formats", default="q4")
    parser.add_argument("--isa", type=Isa, default=here[-1], choices=here)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3)
    record = run(parser.parse_args())
    for name, value in record.derived.items():
        print(f"{name:60s} {value:8.3f}")
    print(record.write())


if __name__ == "__main__":
    main()
