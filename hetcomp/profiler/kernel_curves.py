"""Measures our own generated kernels on this machine: the curves of the hardware profile."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hetcomp import installed_runtime
from hetcomp.backends.native_compiler import Source, compile_objects
from hetcomp.backends.protocol import Isa
from hetcomp.backends.templates import render
from hetcomp.backends.tvm import support_source
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.figures import KernelCurve, KernelPoint
from hetcomp.hardware.figures import Source as FigureSource
from hetcomp.profiler.kernel_cases import CONTEXT, STREAM_BYTES, Case, CurvePlan, curve_plans

# Time for the calls of one point; long ones are called three times at least.
POINT_US = 60_000.0
# Repetitions of all points, minutes apart in the readings: memory bandwidth of shared machines comes and goes.
ROUNDS = 2
_KEPT_SAMPLES = 8
_TIMEOUT_S = 300

Progress = Callable[[str], None]


def kernel_curves(
    isa: Isa,
    cpus: Sequence[int],
    barrier_us: float,
    *,
    coarse: bool,
    tail: bool,
    progress: Progress | None = None,
) -> tuple[KernelCurve, ...]:
    """Curves of one instruction set on threads pinned to ``cpus`` (of one node).

    A point is the median of its calls, less the barrier behind each. coarse: few points. tail: elementwise kinds as
    well, which takes TVM. Raises HetcompError if the kernels cannot be built or run.
    """
    plans = list(curve_plans(isa, coarse=coarse, tail=tail))
    with tempfile.TemporaryDirectory(prefix="hetcomp-kernels-") as folder:
        probe = _build(plans, isa, Path(folder), len(cpus), progress)
        rounds = []
        for number in range(1 if coarse else ROUNDS):
            if progress:
                progress(f"time kernels ({isa.value}), round {number + 1}")
            rounds.append(_run(probe, plans, cpus, Path(folder)))
    return tuple(_curve(plan, isa, [r[i] for r in rounds], barrier_us) for i, plan in enumerate(plans))


def _build(plans: Sequence[CurvePlan], isa: Isa, folder: Path, threads: int, progress: Progress | None) -> Path:
    kernels = {plan.kernel.name: plan.kernel for plan in plans}
    driver = render("probe/kernel_probe.cpp.j2", kernels=list(kernels), stream_bytes=STREAM_BYTES, context=CONTEXT)
    sources = [Source(k.name, k.source) for k in kernels.values()]
    sources.append(Source("tvm_support", support_source()))
    compiler, include = find_cxx(), installed_runtime.include()

    def done(stem: str) -> None:
        if progress:
            progress(f"compile kernels ({isa.value}): {stem}")

    objects = compile_objects(sources, isa, include, threads=threads, progress=done)
    for kernel in kernels.values():
        for number, (_, data) in enumerate(kernel.objects):
            path = folder / f"{kernel.name}-{number}.o"
            path.write_bytes(data)
            objects.append(path)
    source, probe = folder / "kernel_probe.cpp", folder / "kernel_probe"
    source.write_text(driver, encoding="utf-8")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{include}"]
    command = [str(compiler.path), *flags, str(source), *map(str, objects), "-o", str(probe)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        last = (built.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{compiler.path} cannot build the kernel probe for {isa.value}: {last}.")
    return probe


def _run(probe: Path, plans: Sequence[CurvePlan], cpus: Sequence[int], folder: Path) -> list[list[list[float]]]:
    """Microseconds of the single calls, by curve and point."""
    names = list(dict.fromkeys(plan.kernel.name for plan in plans))
    lines = [_line(names.index(p.kernel.name), p.kernel.workspace_bytes, c) for p in plans for c in p.cases]
    cases = folder / "cases.txt"
    cases.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [str(probe), str(cases), ",".join(map(str, cpus))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HetcompError(f"The kernel probe cannot be run: {error}.") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"The kernel probe failed with status {done.returncode}: {last}.")
    readings = iter([json.loads(line) for line in done.stdout.splitlines()])
    return [[next(readings) for _ in plan.cases] for plan in plans]


def _line(kernel: int, workspace: int, case: Case) -> str:
    words: list[object] = [kernel, case.rows, POINT_US, case.position, workspace, len(case.inputs)]
    for operand in case.inputs:
        words += [operand.kind, operand.bytes, operand.sets]
    words.append(len(case.outputs))
    for size in case.outputs:
        words += [size, case.output_sets]
    return " ".join(map(str, words))


def _curve(plan: CurvePlan, isa: Isa, rounds: Sequence[Sequence[Sequence[float]]], barrier_us: float) -> KernelCurve:
    points = []
    for i, case in enumerate(plan.cases):
        medians = [statistics.median(r[i]) for r in rounds]
        rates = sorted(case.work / max(us - barrier_us, 0.1 * us) / 1e3 for us in medians)
        spread = sorted(case.work / max(us - barrier_us, 0.1 * us) / 1e3 for r in rounds for us in r[i])
        kept = spread[:: max(1, len(spread) // _KEPT_SAMPLES)]
        points.append(KernelPoint(size=case.size, rate=statistics.median(rates), samples=tuple(kept)))
    return KernelCurve(
        kernel=plan.name,
        variant=plan.variant,
        isa=isa.value,
        weight_format=plan.weight_format,
        shape=plan.shape,
        points=tuple(points),
        source=FigureSource.MEASURED,
    )
