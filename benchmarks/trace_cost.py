"""Time and memory of importing a big model's config: from config.json to the lowered Plan, no weights.

python -m benchmarks.trace_cost [--model qwen3-30b-a3b]

Each sample is a process of its own, so that the memory is that of one import.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from benchmarks.cpu_e2e import show
from benchmarks.record import Record


def _measure_here(model: str) -> dict[str, float]:
    from hetcomp import compiler, frontend

    start = time.perf_counter()
    frontend.load(
        model,
        context_length=None,
        default_context=compiler.DEFAULT_CONTEXT,
        max_batch=1,
        max_tokens=compiler.MAX_STEP_TOKENS,
        max_logit_rows=compiler.MAX_LOGIT_ROWS,
    )
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "max_rss_gb": usage.ru_maxrss * 1024 / 1e9}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(_measure_here(options.model)))
        return
    record = Record("trace_cost", {"model": options.model})
    command = [sys.executable, "-m", "benchmarks.trace_cost", "--here", "--model", options.model]
    for _ in range(options.rounds):
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        sample = json.loads(output.splitlines()[-1])
        record.add("time", "s", sample["seconds"], higher_is_better=False)
        record.add("CPU time, imports included", "s", sample["cpu"], higher_is_better=False)
        record.add("max RSS", "GB", sample["max_rss_gb"], higher_is_better=False)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
