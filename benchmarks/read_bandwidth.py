"""Measures the machine's DRAM read bandwidth with 1 .. n threads: the bound of every decode figure.

python -m benchmarks.read_bandwidth [--threads N]
"""

from __future__ import annotations

import argparse
import os
import statistics

from benchmarks.record import Record
from hetcomp import read_bandwidth


def measure(threads: int, repeats: int = 5) -> list[list[float]]:
    """GB/s (10^9 bytes) of ``repeats`` passes over 2 GiB, for 1, 2, .. ``threads`` threads."""
    return read_bandwidth.measure(threads, mebibytes=2048, repeats=repeats)


def readings(threads: int) -> list[float]:
    """The machine's read bandwidth at this moment in GB/s, with as many threads as reach most."""
    return max(measure(threads), key=statistics.median)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    record = Record("read_bandwidth", {"buffer_mib": 2048, "threads": options.threads})
    for threads, samples in enumerate(measure(options.threads), start=1):
        for sample in samples:
            record.add(f"{threads} thread{'s' if threads > 1 else ''}", "GB/s", sample)
        print(f"{threads:3d} threads: best {max(samples):7.1f} GB/s, median {record.series[-1].median:7.1f}")
    print(record.write())


if __name__ == "__main__":
    main()
