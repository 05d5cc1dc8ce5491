"""Runs every benchmark one after the other: what `make bench` does.

python -m benchmarks.run_all [--peer-python .venv-peers/bin/python]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

_WITH_PEERS = ("cpu_e2e", "busy_desktop", "quality")
_ALONE = ("read_bandwidth", "trace_cost", "compile_cost")


def main() -> int:
    """Command line; returns the number of benchmarks that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, default=None)
    options = parser.parse_args()
    peers = ["--peer-python", str(options.peer_python)] if options.peer_python else []
    failed = 0
    for name in (*_ALONE, *_WITH_PEERS):
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *(peers if name in _WITH_PEERS else [])]
        failed += subprocess.run(command).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
