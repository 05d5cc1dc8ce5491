"""Time and memory of a whole compile: kernels cold and from the cache, weights packed one matrix at a time.

python -m benchmarks.compile_cost [--model qwen3moe-1b]

Each sample is a process of its own. The memory to hold against: the largest tensor of the checkpoint plus 1 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.frontend.safetensors_header import read_header


def _measure_here(checkpoint: Path, out: Path) -> dict[str, float]:
    import hetcomp

    start = time.perf_counter()
    hetcomp.compile(checkpoint, formats="bf16", context_length=1024, out=out)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "max_rss_gb": usage.ru_maxrss * 1024 / 1e9}


def _largest_tensor_gb(checkpoint: Path) -> float:
    sizes = [t.bytes for file in checkpoint.glob("*.safetensors") for t in read_header(file).values()]
    return max(sizes, default=math.nan) / 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--here", type=Path, help="compile to this place in this process and print JSON")
    options = parser.parse_args()
    checkpoint = models.checkpoint(options.model)
    if options.here:
        print(json.dumps(_measure_here(checkpoint, options.here)))
        return
    record = Record("compile_cost", {"model": options.model, "formats": "bf16"})
    with tempfile.TemporaryDirectory(dir=models.FOLDER) as folder:
        environment = {**os.environ, "HETCOMP_CACHE": str(Path(folder) / "cache")}
        for name in ("cold", "kernels cached"):
            command = [sys.executable, "-m", "benchmarks.compile_cost", "--model", options.model]
            done = subprocess.run(
                [*command, "--here", str(Path(folder) / "out.hetc")],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            sample = json.loads(done.stdout.splitlines()[-1])
            record.add(f"time, {name}", "s", sample["seconds"], higher_is_better=False)
            record.add("max RSS", "GB", sample["max_rss_gb"], higher_is_better=False)
    record.derived["largest tensor, GB"] = _largest_tensor_gb(checkpoint)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
