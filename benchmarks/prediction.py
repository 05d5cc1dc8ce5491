"""Predictions held against runs on this machine: demo-moe and qwen3moe-1b in every CPU format.

python -m benchmarks.prediction [--rounds N] [--formats q4,bf16]

Measures the profile first (what `hetcomp profile` does), then runs `hetcomp bench` on every artifact, each in a process
of its own as users do, and records the deviations: predicted / measured - 1. A virtual machine's cores move on their
host: within one die or not, their read bandwidth and what they pay to meet differ by factors. So deviations are also
given of those rounds alone before which the memory read as fast as when the profile was measured.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import hetcomp
from benchmarks import models
from benchmarks.record import Record, Series
from hetcomp.backends.packing import FORMATS
from hetcomp.bench import BenchRecord, read_record, record_path
from hetcomp.hardware.detect import detect_machine
from hetcomp.models_zoo import find
from hetcomp.profiler.measure_machine import measure_machine

# A round counts as in the profile's state if plain reads before it were within this of the profile's.
SAME_STATE = 0.15
CONTEXT = 2304  # room for a prompt of 2048 and the decode steps behind it


def main() -> None:
    """Runs, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    rounds, formats = options.rounds, options.formats.split(",")
    record = Record("prediction", {"rounds": rounds, "context": CONTEXT, "formats": formats})
    artifacts = []
    for name in ("qwen3moe-1b", "demo-moe"):
        for form in formats:
            folder = models.FOLDER / f"{name}-{form}-prediction.hetc"
            source = models.checkpoint(name) if name != "demo-moe" else find(name)
            hetcomp.compile(source, context_length=CONTEXT, formats=form, out=folder)
            artifacts.append((f"{name} {form}", folder))
    profile = measure_machine(detect_machine())
    described = models.FOLDER / "prediction-profile.json"
    described.write_text(profile.to_json(), encoding="utf-8")
    every, same = list[float](), list[float]()
    for name, folder in artifacts:
        result = _bench(folder, described, rounds)
        in_state = [i for i, gb in enumerate(result.read_gb_per_s) if _same_state(gb, result.profile_gb_per_s)]
        for case in result.cases:
            every.append(case.deviation)
            chosen = [case.samples_ms[i] for i in in_state]
            record.series.append(Series(f"{name}, {case.name}, measured", "ms", list(case.samples_ms), False))
            record.series.append(Series(f"{name}, {case.name}, predicted", "ms", [case.predicted_ms], False))
            shown = (
                f"{name:18} {case.name:16} {case.predicted_ms:10.3f} {case.measured_ms:10.3f} ms {case.deviation:+7.1%}"
            )
            if chosen:
                same.append(case.predicted_ms / statistics.median(chosen) - 1)
                shown += f"; {len(chosen)} rounds in the profile's state {same[-1]:+7.1%}"
            print(shown, flush=True)
    record.derived = _errors("all rounds", every) | _errors("rounds in the profile's state", same)
    record.derived["cases with rounds in the profile's state"] = len(same)
    print(*(f"{name}: {value:.3g}" for name, value in record.derived.items()), record.write(), sep="\n")


def _same_state(now: float, then: float | None) -> bool:
    return then is not None and abs(now / then - 1) <= SAME_STATE


def _errors(of: str, deviations: list[float]) -> dict[str, float]:
    sizes = [abs(d) for d in deviations]
    if not sizes:
        return {}
    beyond = sum(size > 0.2 for size in sizes) / len(sizes)
    return {
        f"median error, {of}": statistics.median(sizes),
        f"worst error, {of}": max(sizes),
        f"part of the cases beyond 20 %, {of}": beyond,
    }


def _bench(artifact: Path, profile: Path, rounds: int) -> BenchRecord:
    command = [sys.executable, "-c", "from hetcomp.cli.start import main; main()", "bench", str(artifact)]
    subprocess.run([*command, "--hw", str(profile), "--rounds", str(rounds)], check=True, capture_output=True)
    return read_record(record_path(artifact))


if __name__ == "__main__":
    main()
