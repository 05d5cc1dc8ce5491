"""Time and memory of a whole compile, beside what the disk takes to read the checkpoint and to write the artifact; and
how soon the artifact's first token comes.

python -m benchmarks.compile_cost [--model qwen3moe-1b [--layers N] | --checkpoint FOLDER] [--formats q4] [--rounds 3]

Each sample is `hetcomp compile` in a process of its own. The checkpoint leaves the page cache before each, as after a
download that was larger than memory, and the disk is read and written (past the page cache, and up to fsync) before
each as well. The memory to hold against: the largest tensor of the checkpoint plus 1 GB. First tokens are those of
hetcomp-run with the weights in the page cache, mapped and copied to memory, from the start of the process to its end.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.page_cache import leave_page_cache
from benchmarks.record import Record
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.models_zoo.synthesise import synthesise
from hetcomp.profiler.disk import measure_disk

_WRITTEN = 2 << 30
_BLOCK = 64 << 20


def _largest_tensor_gb(checkpoint: Path) -> float:
    sizes = [t.bytes for file in checkpoint.glob("*.safetensors") for t in read_header(file).values()]
    return max(sizes, default=math.nan) / 1e9


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def _write_gb_per_s(folder: Path) -> float:
    """Of a file of 2 GiB, flushed to the disk."""
    block = os.urandom(_BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-") as file:
        start = time.perf_counter()
        for _ in range(_WRITTEN // _BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (time.perf_counter() - start) / 1e9


def _compile(checkpoint: Path, formats: str, out: Path, cache: Path) -> tuple[float, float]:
    """Seconds, and the largest memory of the process or of one that it started, in GB."""
    shutil.rmtree(out, ignore_errors=True)
    program = [sys.executable, "-c", "from hetcomp.cli.start import main; main()"]
    command = [*program, "compile", str(checkpoint), "--formats", formats, "--context", "1024", "-o", str(out)]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "HETCOMP_CACHE": str(cache)}
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def _first_token(artifact: Path, weights: str) -> float:
    """Seconds from starting hetcomp-run to its end, after one token."""
    command = [str(artifact / "bin" / "hetcomp-run"), str(artifact), "--prompt", "Once", "-n", "1"]
    start = time.perf_counter()
    subprocess.run([*command, "--weights", weights], check=True, capture_output=True)
    return time.perf_counter() - start


def _warm(artifact: Path) -> None:
    for file in artifact.glob("*.safetensors"):
        with file.open("rb", buffering=0) as data:
            while data.read(_BLOCK):
                pass


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shapes; made, and removed again")
    parser.add_argument("--formats", default="q4")
    parser.add_argument("--rounds", type=int, default=3, help="compiles with kernels from the cache")
    parser.add_argument("--checkpoint", type=Path, help="an existing folder instead of a model of the zoo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=models.FOLDER) as folder:
        if options.checkpoint:
            checkpoint = options.checkpoint
        elif options.layers:
            checkpoint = _synthesised(options.model, Path(folder) / "checkpoint", options.layers)
        else:
            checkpoint = models.checkpoint(options.model)
        _run(checkpoint, Path(folder), options)


def _synthesised(model: str, folder: Path, layers: int) -> Path:
    """In a process of its own: what this one has had in memory would count as the peak of those that it starts."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(synthesise, model, folder, layers=layers).result()


def _run(checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    name = options.checkpoint.name if options.checkpoint else options.model
    given = {"model": name, "layers": options.layers or "all", "formats": options.formats, "rounds": options.rounds}
    record = Record("compile_cost", {**given, "checkpoint GB": _gigabytes(checkpoint)})
    out = folder / "out.hetc"
    for number in range(options.rounds + 1):
        leave_page_cache(checkpoint.glob("*.safetensors"))
        record.add("disk, read", "GB/s", measure_disk(folder)[0].gb_per_s)
        record.add("disk, write", "GB/s", _write_gb_per_s(folder))
        seconds, memory = _compile(checkpoint, options.formats, out, folder / "cache")
        record.add(f"time, {'kernels cached' if number else 'cold'}", "s", seconds, higher_is_better=False)
        record.add("max RSS", "GB", memory, higher_is_better=False)
    _warm(out)
    for _ in range(max(3, options.rounds)):
        for weights in ("mmap", "ram"):
            record.add(f"first token, --weights {weights}", "s", _first_token(out, weights), higher_is_better=False)
    series = {s.name: s.median for s in record.series}
    disk = _gigabytes(checkpoint) / series["disk, read"] + _gigabytes(out) / series["disk, write"]
    record.derived = {
        "largest tensor, GB": _largest_tensor_gb(checkpoint),
        "artifact, GB": _gigabytes(out),
        "reading and writing at the disk's speed, s": disk,
        "compile over that": record["time, kernels cached"].median / disk,
    }
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
