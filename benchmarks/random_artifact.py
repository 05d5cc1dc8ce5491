"""Artifacts of real shapes with random weights: speed needs no checkpoint of 60 GB.

python -m benchmarks.random_artifact NAME OUT.hetc --formats q4 --isa amx_bf16 [--context 4096] [--vram 12G --pin ..]
       [--defer 2 | --expert-cache lru] [--adapters 4 --adapter-rank 16] [--routing zipf:1.1,markov:0.9]
python -m benchmarks.random_artifact --weights-of OUT.hetc [--routing ..]

The first compiles the zoo's config NAME (--hollow: files of weights have their size, but nothing is written to them);
the second only writes the weights of an artifact that was copied here without them (the same bytes: they follow from
the plan). --routing: weights with which the model routes as a trace does (benchmarks/routed_weights.py), as far as
OUT.routing.safetensors goes, which is written beside it for hetcomp bench --replay; or even: tokens choose experts
about evenly (benchmarks/even_weights.py), as a plan without --stats predicts them.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.even_weights import EvenPacker
from benchmarks.random_weights import RandomPacker
from benchmarks.routed_weights import RoutedPacker
from hetcomp import compiler
from hetcomp.artifact import weight_files
from hetcomp.artifact.staging import staged_folder
from hetcomp.artifact.weight_files import write_weights
from hetcomp.backends import packing
from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.backends.program import ProgramLayout
from hetcomp.build_artifact import write_artifact
from hetcomp.cli.options import DEFAULT_ADAPTER_RANK, formats_of, wishes_of
from hetcomp.ir.plan import Plan
from hetcomp.progress import QuietProgress


def build(
    name: str,
    out: Path,
    *,
    formats: str | dict[str, str],
    isa: Sequence[str],
    context: int,
    batch: int,
    kv_tokens: int | None = None,
    hw_profile: str,
    wishes: compiler.PlanWishes,
    routing: str | None = None,
) -> Path:
    """Compiles the zoo's config ``name`` with random weights, which route as ``routing`` says if it is given; returns
    ``out``."""
    planned = compiler.plan_model(
        name,
        hw_profile=hw_profile,
        context_length=context,
        max_batch=batch,
        kv_tokens=kv_tokens,
        formats=formats,
        isa=isa,
        wishes=wishes,
    )
    packer = packer_of(planned.plan, routing)
    with staged_folder(out) as staging:
        write_artifact(planned, packer, staging, QuietProgress())
    if packer.trace is not None:
        packer.trace.write(followed_trace(out))
    return out


def followed_trace(artifact: Path) -> Path:
    """Where the trace lies that an artifact of :func:`build` follows."""
    return artifact.with_name(f"{artifact.stem}.routing.safetensors")


def packer_of(plan: Plan, routing: str | None) -> RandomPacker:
    """The weights of an artifact of ``plan``."""
    if routing == "even":
        return EvenPacker(plan)
    return RandomPacker() if routing is None else RoutedPacker(plan, routing)


class Hollow(io.BufferedIOBase):
    """A file that takes no room: what is written leaves a hole of its size."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0

    def write(self, data: Any) -> int:  # noqa: ANN401 - the buffer protocol
        """Counts the bytes."""
        self._size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def close(self) -> None:
        """Makes the file."""
        if not self.closed:
            self._path.touch()
            os.truncate(self._path, self._size)
        super().close()


def write_weights_of(artifact: Path, routing: str | None) -> None:
    """Writes the weights of an artifact of :func:`build` into it."""
    plan = models.plan(artifact)
    packer = packer_of(plan, routing)
    of_gpus = [(f"gpu{program.number}-weights", program.weights) for program in lower_programs(plan)]
    for stem, values in (("weights", ProgramLayout.of(plan).weights), *of_gpus):
        sizes = [packing.packed_bytes(value) for value in values]
        write_weights(values, sizes, packer.chunks(values), artifact, lambda done, name: None, stem)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--formats", default="q4")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--hw", default="auto")
    parser.add_argument("--vram")
    parser.add_argument("--pin", action="append")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--answer", type=int)
    parser.add_argument("--defer", default="0")
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--stats")
    parser.add_argument("--expert-cache", default="static")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--adapter-rank", type=int, default=DEFAULT_ADAPTER_RANK)
    parser.add_argument("--no-adapter-experts", action="store_true")
    parser.add_argument("--routing", help="even, a trace of hetcomp trace --routing, or zipf:1.1,markov:0.9")
    parser.add_argument("--hollow", action="store_true")
    parser.add_argument("--weights-of", type=Path)
    o = parser.parse_args()
    if o.weights_of:
        write_weights_of(o.weights_of, o.routing)
    elif o.name and o.out:
        if o.hollow:
            # All weights of this process go through it; a file's class serves as the function that opens one.
            weight_files.create = Hollow  # type: ignore[assignment]
        isa = [] if o.isa == "auto" else o.isa.split(",")
        build(
            o.name,
            o.out,
            formats=formats_of(o.formats),
            isa=isa,
            context=o.context,
            batch=o.batch,
            kv_tokens=o.kv_tokens,
            hw_profile=o.hw,
            wishes=wishes_of(
                o.prompt,
                o.answer,
                o.batch,
                o.vram,
                None,
                o.pin,
                o.stats,
                o.defer,
                expert_cache=o.expert_cache,
                from_disk=o.from_disk,
                adapters=o.adapters,
                adapter_rank=o.adapter_rank,
                adapter_experts=not o.no_adapter_experts,
            ),
            routing=o.routing,
        )
    else:
        parser.error("give NAME and OUT, or --weights-of")


if __name__ == "__main__":
    main()
