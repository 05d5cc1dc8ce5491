"""Predictions held against runs on this machine: demo-moe and qwen3moe-1b in every CPU format.

python -m benchmarks.prediction [--rounds N]

Measures the profile first (what `hetcomp profile` does), then runs `hetcomp bench` on every artifact, each in a process
of its own as users do, and records the deviations: predicted / measured - 1.
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
from hetcomp.bench import BenchRecord, read_record, record_path
from hetcomp.hardware.detect import detect_machine
from hetcomp.models_zoo import find
from hetcomp.passes.context import FORMATS
from hetcomp.profiler.measure_machine import measure_machine

CONTEXT = 2304  # room for a prompt of 2048 and the decode steps behind it


def main() -> None:
    """Runs, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    record = Record("prediction", {"rounds": rounds, "context": CONTEXT, "formats": list(FORMATS)})
    artifacts = []
    for name in ("qwen3moe-1b", "demo-moe"):
        for form in FORMATS:
            folder = models.FOLDER / f"{name}-{form}-prediction.hetc"
            source = models.checkpoint(name) if name != "demo-moe" else find(name)
            hetcomp.compile(source, context_length=CONTEXT, formats=form, out=folder)
            artifacts.append((f"{name} {form}", folder))
    profile = measure_machine(detect_machine())
    described = models.FOLDER / "prediction-profile.json"
    described.write_text(profile.to_json(), encoding="utf-8")
    deviations = []
    for name, folder in artifacts:
        result = _bench(folder, described, rounds)
        for case in result.cases:
            deviations.append(case.deviation)
            record.series.append(Series(f"{name}, {case.name}, measured", "ms", list(case.samples_ms), False))
            record.series.append(Series(f"{name}, {case.name}, predicted", "ms", [case.predicted_ms], False))
            print(
                f"{name:18} {case.name:16} {case.predicted_ms:10.3f} {case.measured_ms:10.3f} ms {case.deviation:+7.1%}"
            )
    sizes = [abs(d) for d in deviations]
    record.derived = {"median error": statistics.median(sizes), "worst error": max(sizes)}
    print(f"median error {statistics.median(sizes):.1%}, worst {max(sizes):.1%}; {record.write()}")


def _bench(artifact: Path, profile: Path, rounds: int) -> BenchRecord:
    command = [sys.executable, "-c", "from hetcomp.cli.main import main; main()", "bench", str(artifact)]
    subprocess.run([*command, "--hw", str(profile), "--rounds", str(rounds)], check=True, capture_output=True)
    return read_record(record_path(artifact))


if __name__ == "__main__":
    main()
