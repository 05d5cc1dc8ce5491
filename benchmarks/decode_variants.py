"""What bounds decode of whole-number formats on a CPU: the expert layer at one token with constants of its kernel
changed, and on one thread with weights that stay in its second-level cache, where only arithmetic counts.

python -m benchmarks.decode_variants [--formats q4,q8,q4k,q6k] [--threads 2,15] [--rounds 5]

Variants take turns, with a reading of the bandwidth before each round.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from benchmarks import read_bandwidth
from benchmarks.cpu_e2e import show
from benchmarks.cpu_kernels import SHAPES, STREAM_BYTES, Case, huge, measure, moe
from benchmarks.record import Record
from hetcomp.backends import cpu_isa
from hetcomp.backends.cpu_isa import CpuIsa
from hetcomp.backends.protocol import Isa
from hetcomp.hardware.tuning import Tuning
from tests.reference.kernel_harness import isas_here

# Half a megabyte to one of q4 to q8, of which a second-level cache holds all.
_IN_CACHE = replace(SHAPES["qwen3-30b-a3b"], experts=1, top_k=1, intermediate=128)
_TUNINGS: dict[str, Callable[[Tuning], Tuning]] = {
    "as it is": lambda t: t,
    "loads half as far ahead": lambda t: t.model_copy(update={"prefetch_bytes": t.prefetch_bytes // 2}),
    "loads twice as far ahead": lambda t: t.model_copy(update={"prefetch_bytes": t.prefetch_bytes * 2}),
    "draws of a quarter": lambda t: t.model_copy(update={"draw_bytes": t.draw_bytes // 4}),
    "draws four times as long": lambda t: t.model_copy(update={"draw_bytes": t.draw_bytes * 4}),
}
_ISAS: dict[str, Callable[[CpuIsa], CpuIsa]] = {
    "one chain of sums": lambda i: replace(i, chained_rows=0),
}


@contextmanager
def variant(name: str, isa: Isa) -> Iterator[None]:
    """Kernels that are emitted within have its constants."""
    tuning, plain = _TUNINGS.get(name, _TUNINGS["as it is"]), CpuIsa.tuning
    other = _ISAS.get(name, lambda i: i)(cpu_isa.cpu_isa(isa))
    with (
        mock.patch.object(CpuIsa, "tuning", lambda self, form: tuning(plain(self, form))),
        mock.patch.dict(cpu_isa._ISAS, {isa: other}),
    ):
        yield


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = isas_here()
    parser.add_argument("--formats", default="q4,q8,q4k,q6k")
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[len(os.sched_getaffinity(0))]
    )
    parser.add_argument("--isa", type=Isa, default=here[-1], choices=here)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    conditions = {"threads": o.threads, "isa": o.isa.value, "layer": "qwen3-30b-a3b, one token"}
    record = Record("decode_variants", conditions)
    data = huge(STREAM_BYTES)

    def first(name: str, form: str) -> Case:
        with variant(name, o.isa):
            return next(moe(SHAPES["qwen3-30b-a3b"], o.isa, form, data, tokens=(1,)))

    for form in o.formats.split(","):
        names = [*_TUNINGS, *_ISAS]
        cases = {name: first(name, form) for name in names}
        cached = next(moe(_IN_CACHE, o.isa, form, huge(1 << 20), tokens=(1,)))
        for threads, _ in itertools.product(o.threads, range(o.rounds)):
            on = f"on {threads}"
            record.add(f"read bandwidth {on}", "GB/s", max(read_bandwidth.measure(threads, 3)[threads - 1]))
            for name, case in cases.items():
                record.add(f"{form}, {name}, {on}", "GB/s", case.bytes / measure(case, threads, 0.3) / 1e9)
        for _ in range(o.rounds):
            record.add(f"{form}, in cache, on one", "GB/s", cached.bytes / measure(cached, 1, 0.2) / 1e9)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
