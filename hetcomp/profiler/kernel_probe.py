"""Builds and runs the program that times generated kernels on pinned threads."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetcomp import installed_runtime
from hetcomp.backends.native_compiler import Source, compile_objects
from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.backends.templates import render
from hetcomp.backends.tvm import support_source
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.profiler.kernel_cases import CONTEXT, Case

_TIMEOUT_S = 300


@dataclass(frozen=True)
class Timing:
    """A case to time for ``budget_us`` microseconds; long calls take up to eight times as much, or a call and the one
    that warms up."""

    kernel: Kernel
    case: Case
    budget_us: float


class KernelProbe:
    """One program of several kernels; they run in a process of their own."""

    def __init__(
        self, kernels: Sequence[Kernel], isa: Isa, folder: Path, threads: int, built: Callable[[str], None]
    ) -> None:
        """Compiles ``kernels`` into ``folder``, ``threads`` at a time; ``built`` hears of each source. Raises
        HetcompError."""
        unique = {kernel.name: kernel for kernel in kernels}
        self._numbers = {name: number for number, name in enumerate(unique)}
        self._isa, self._folder = isa, folder
        main = render("probe/kernel_probe.cpp.j2", kernels=list(unique), context=CONTEXT)
        sources = [Source("kernel_probe", main), *(Source(k.name, k.source) for k in unique.values())]
        if any(k.objects for k in unique.values()):
            sources.append(Source("tvm_support", support_source()))
        objects = compile_objects(sources, isa, installed_runtime.include(), threads=threads, progress=built)
        for kernel in unique.values():
            for number, (_, data) in enumerate(kernel.objects):
                path = folder / f"{kernel.name}-{number}.o"
                path.write_bytes(data)
                objects.append(path)
        self._program = self._link(objects)

    def run(
        self, timings: Sequence[Timing], cpus: Sequence[int], memory: int, seconds: float = math.inf
    ) -> list[list[float]]:
        """Microseconds of the single calls by timing, in order, on threads pinned to ``cpus``.

        memory: bytes for operands that take turns (``stream_bytes``). No timing is begun after ``seconds``: the list is
        shorter then. Raises HetcompError if the program fails."""
        cases = self._folder / "cases.txt"
        cases.write_text("".join(self._line(timing) + "\n" for timing in timings), encoding="utf-8")
        command = [str(self._program), str(cases), ",".join(map(str, cpus)), str(memory), str(seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HetcompError(f"The kernel probe cannot be run: {error}.") from None
        if done.returncode != 0:
            at = len(done.stdout.splitlines())
            where = f" in {timings[at].kernel.name}" if at < len(timings) else ""
            last = _last_line(done.stderr)
            raise HetcompError(f"The kernel probe failed with status {done.returncode}{where}: {last}.")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _link(self, objects: Sequence[Path]) -> Path:
        compiler, program = find_cxx(), self._folder / "kernel_probe"
        command = [str(compiler.path), "-pthread", *map(str, objects), "-o", str(program)]
        linked = subprocess.run(command, capture_output=True, text=True)
        if linked.returncode != 0:
            last = _last_line(linked.stderr)
            raise HetcompError(f"{compiler.path} cannot link the kernel probe for {self._isa.value}: {last}.")
        return program

    def _line(self, timing: Timing) -> str:
        """The case as kernel_probe.cpp.j2 reads it."""
        kernel, case = timing.kernel, timing.case
        words: list[object] = [
            self._numbers[kernel.name],
            case.rows,
            timing.budget_us,
            case.position,
            kernel.workspace_bytes,
            len(case.inputs),
        ]
        for operand in case.inputs:
            words += [operand.kind, operand.bytes, operand.sets]
        words.append(len(case.outputs))
        for size in case.outputs:
            words += [size, case.output_sets]
        return " ".join(map(str, words))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
