"""Artifacts of real shapes with random weights: speed needs no checkpoint of 60 GB.

python -m benchmarks.random_artifact NAME OUT.hetc --formats q4 --isa amx_bf16 [--context 4096] [--vram 12G --pin ..]
       [--defer 2]
python -m benchmarks.random_artifact --weights-of OUT.hetc

The first compiles the zoo's config NAME (--hollow: files of weights have their size, but nothing is written to them);
the second only writes the weights of an artifact that was copied here without them (the same bytes: they follow from
the plan).
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Generator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import models
from hetcomp import compiler
from hetcomp.artifact import weight_files
from hetcomp.artifact.staging import staged_folder
from hetcomp.artifact.weight_files import write_weights
from hetcomp.backends import packing
from hetcomp.backends.gpu.gpu_program import lower_program
from hetcomp.backends.program import ProgramLayout
from hetcomp.build_artifact import write_artifact
from hetcomp.cli.options import formats_of, wishes_of
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.progress import QuietProgress

_PANELS = 8  # different panels that a weight is made of
_CHUNK_BYTES = 64 << 20


class RandomPacker:
    """Packed bytes of normal numbers of standard deviation 0.02, repeated; norm weights are ones."""

    not_finite: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()

    def chunks(self, values: Sequence[Value]) -> Generator[tuple[Value, NDArray[np.uint8]]]:
        """As :meth:`hetcomp.backends.pack_weights.WeightPacker.chunks`."""
        for value in values:
            if value.kind is ValueKind.CONST or value.type.layout == packing.ROW_MAJOR:
                shape = [int(d) for d in value.type.shape]
                numbers = np.ones(shape) if value.data is None else np.asarray(value.data).reshape(shape)
                yield value, packing.pack(numbers.astype(np.float32), value)[0]
                continue
            pattern = _panels(int(value.type.shape[-1]), str(value.format))
            size = packing.packed_bytes(value)
            piece = np.tile(pattern, min(-(-size // pattern.size), max(1, _CHUNK_BYTES // pattern.size)))
            for at in range(0, size, piece.size):
                yield value, piece[: size - at]


@cache
def _panels(columns: int, weight_format: str) -> NDArray[np.uint8]:
    shape = (_PANELS * packing.PANEL, columns)
    value = Value("w", TensorType(DType.F32, shape, packing.PANELS), ValueKind.WEIGHT, fqn="w", format=weight_format)
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    return packing.pack(numbers, value, threads=1)[0]


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
) -> Path:
    """Compiles the zoo's config ``name`` with random weights; returns ``out``."""
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
    with staged_folder(out) as staging:
        write_artifact(planned, RandomPacker(), staging, QuietProgress())
    return out


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


def write_weights_of(artifact: Path) -> None:
    """Writes the weights of an artifact of :func:`build` into it."""
    plan = models.plan(artifact)
    gpu = lower_program(plan)
    for stem, values in (("weights", ProgramLayout.of(plan).weights), ("gpu-weights", gpu.weights if gpu else ())):
        sizes = [packing.packed_bytes(value) for value in values]
        write_weights(values, sizes, RandomPacker().chunks(values), artifact, lambda done, name: None, stem)


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
    parser.add_argument("--hollow", action="store_true")
    parser.add_argument("--weights-of", type=Path)
    o = parser.parse_args()
    if o.weights_of:
        write_weights_of(o.weights_of)
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
            wishes=wishes_of(o.prompt, o.answer, o.batch, o.vram, None, o.pin, None, o.defer),
        )
    else:
        parser.error("give NAME and OUT, or --weights-of")


if __name__ == "__main__":
    main()
