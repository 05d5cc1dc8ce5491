"""Decode of an artifact that follows a routing trace, and what a trace of its lanes costs.

python -m benchmarks.replayed_decode OUT.hetc [--routing OUT.routing.safetensors] [--threads 15] [--tokens 1280]

The artifact is one of benchmarks/random_artifact.py --routing, or one whose routers the CPU computes. A round decodes
the trace's tokens behind 128 of them; then 256 steps are taken with a trace of the lanes, and 256 without. Times are
means over the middle half of the steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.models import plan_sha256
from benchmarks.random_artifact import followed_trace
from benchmarks.record import Record
from hetcomp.bench import undisturbed
from hetcomp.executable import Executable
from hetcomp.lane_trace import traced_steps
from hetcomp.replay_routing import replayed_routing, routing_of

_PROMPT, _TRACED = 128, 256


def decode_ms(exe: Executable, ids: Sequence[int], tokens: int) -> float:
    """Milliseconds a token of ``tokens`` tokens behind the prompt."""
    times = []
    with exe.runtime.session() as session:
        session.prefill(list(ids[:_PROMPT]))
        for token in ids[_PROMPT : _PROMPT + tokens]:
            start = time.perf_counter()
            exe.runtime.decode([session], [token])
            times.append((time.perf_counter() - start) * 1e3)
    return undisturbed(times, {})[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--routing", help="default: OUT.routing.safetensors beside the artifact")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    exe = hetcomp.load(o.artifact, threads=o.threads)
    trace = routing_of(o.routing or str(followed_trace(o.artifact)), exe.plan)
    name, traced = o.artifact.stem, min(_TRACED, o.tokens)
    record = Record("replayed_decode", {"artifact": name, "threads": o.threads, "tokens": o.tokens})
    record.plan_sha256 = plan_sha256(o.artifact)
    with replayed_routing(exe, trace) as replayed:
        record.conditions["routing"] = replayed.note
        decode_ms(exe, replayed.ids, traced)  # warms up
        for _ in range(o.rounds):
            exe.runtime.reset_stats()
            record.add(f"{name} decode", "ms", decode_ms(exe, replayed.ids, o.tokens), higher_is_better=False)
            record.conditions["cache"] = (exe.stats.get("gpu") or {}).get("cache")
            with traced_steps(exe.runtime):
                ms = decode_ms(exe, replayed.ids, traced)
            record.add(f"{name} decode, lanes traced", "ms", ms, higher_is_better=False)
            ms = decode_ms(exe, replayed.ids, traced)
            record.add(f"{name} decode, not traced", "ms", ms, higher_is_better=False)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
