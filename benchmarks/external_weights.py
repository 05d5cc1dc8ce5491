"""How long a model takes to load and what it takes on the disk, with a copy of its weights in the artifact and without.

python -m benchmarks.external_weights FILE.gguf [--rounds 5] [--no-verify]

Each sample is a process of its own that loads the artifact into memory (--weights ram), with the files in the page
cache and out of it. The disk's reading speed is measured once a round. The peak of memory counts pages of the process,
not those of the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.page_cache import leave_page_cache
from benchmarks.record import Record
from hetcomp.artifact.inspection import inspect_artifact
from hetcomp.profiler.disk import measure_disk

_BLOCK = 64 << 20
_LOAD = """
import json, resource, sys
from hetcomp.runtime import Runtime
runtime = Runtime.load(sys.argv[1], weights="ram", verify_weights=sys.argv[2] == "verify")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": runtime.stats()["load_seconds"], "peak": peak}))
"""


def _load(artifact: Path, verify: bool) -> dict[str, float]:
    command = [sys.executable, "-c", _LOAD, str(artifact), "verify" if verify else "trust"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded: dict[str, float] = json.loads(done.stdout)
    return loaded


def _files(artifact: Path) -> list[Path]:
    return [*artifact.glob("*.safetensors"), *(Path(s.path) for s in inspect_artifact(artifact).sources)]


def _enter_page_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as data:
            while data.read(_BLOCK):
                pass


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true", help="without comparing hashes")
    options = parser.parse_args()
    record = Record(
        "external_weights",
        {"model": options.model.name, "verified": not options.no_verify, "rounds": options.rounds},
    )
    with tempfile.TemporaryDirectory(dir=options.model.absolute().parent) as folder:
        artifacts = {kind: Path(folder) / f"{kind}.hetc" for kind in ("packed", "external")}
        for kind, artifact in artifacts.items():
            hetcomp.compile(options.model, context_length=1024, out=artifact, weights=kind)
            record.derived[f"artifact, {kind}, GB"] = _bytes(artifact) / 1e9
        record.derived["file, GB"] = options.model.stat().st_size / 1e9
        for _ in range(options.rounds):
            for kind, artifact in artifacts.items():
                _measure(record, kind, artifact, not options.no_verify)
            record.add("disk, read", "GB/s", measure_disk(Path(folder))[0].gb_per_s)
    for state in ("cached", "from the disk"):
        packed, external = (record[f"load, {kind}, {state}"].median for kind in artifacts)
        record.derived[f"external over packed, {state}"] = external / packed
    show(record)
    print(record.write())


def _measure(record: Record, kind: str, artifact: Path, verify: bool) -> None:
    _enter_page_cache(_files(artifact))
    warm = _load(artifact, verify)
    record.add(f"load, {kind}, cached", "s", warm["seconds"], higher_is_better=False)
    record.add(f"max RSS, {kind}", "GB", warm["peak"] / 1e9, higher_is_better=False)
    leave_page_cache(_files(artifact))
    cold = _load(artifact, verify)
    record.add(f"load, {kind}, from the disk", "s", cold["seconds"], higher_is_better=False)


if __name__ == "__main__":
    main()
