"""Measures our own generated kernels on this machine: the curves of the hardware profile."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetcomp import installed_runtime
from hetcomp.backends.native_compiler import Source, compile_objects
from hetcomp.backends.protocol import Isa
from hetcomp.backends.templates import render
from hetcomp.backends.tvm import support_source
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.figures import KernelCurve, KernelPoint, KernelRate
from hetcomp.hardware.figures import Source as FigureSource
from hetcomp.profiler.kernel_cases import (
    CONTEXT,
    Case,
    CurvePlan,
    Detail,
    bytes_a_weight,
    curve_plans,
    stream_bytes,
)
from hetcomp.progress import ProgressSink

# Repetitions of all points: memory bandwidth of shared machines comes and goes.
_ROUNDS = {Detail.FULL: 2, Detail.COARSE: 1, Detail.QUICK: 1}
# Seconds for the calls of all points of an instruction set, and what one point gets of it in a round. A point of long
# calls takes up to eight times as much, or a call and the one that warms up.
_SECONDS = {Detail.FULL: 12.0, Detail.COARSE: 3.0, Detail.QUICK: 2.0}
_LEAST_POINT_US, _MOST_POINT_US = 10_000.0, 75_000.0
_KEPT_SAMPLES = 8
_TIMEOUT_S = 300


def kernel_curves(
    isa: Isa, cpus: Sequence[int], barrier_us: float, detail: Detail, cold_bytes: int, progress: ProgressSink
) -> tuple[KernelCurve, ...]:
    """Curves of one instruction set on threads pinned to ``cpus`` (of one node).

    A point is the median of its calls, less the barrier behind each. cold_bytes: memory over which weights take turns
    to be cold. Raises HetcompError if the kernels cannot be built or run; they run in a process of their own.
    """
    plans = list(curve_plans(isa, detail, cold_bytes))
    with tempfile.TemporaryDirectory(prefix="hetcomp-kernels-") as folder:
        probe = _build(plans, isa, Path(folder), len(cpus), progress)
        progress.stage(f"time kernels ({isa.value})", total=_ROUNDS[detail])
        rounds = []
        for _ in range(_ROUNDS[detail]):
            rounds.append(_run(probe, plans, cpus, Path(folder), point_us(plans, detail)))
            progress.advance()
    return tuple(_curve(plan, isa, [r[i] for r in rounds], barrier_us) for i, plan in enumerate(plans))


def point_us(plans: Sequence[CurvePlan], detail: Detail) -> float:
    """Microseconds for the calls of one point in a round: the more curves (formats), the less each gets."""
    points = sum(len(plan.cases) for plan in plans)
    share = _SECONDS[detail] * 1e6 / (points * _ROUNDS[detail])
    return min(max(share, _LEAST_POINT_US), _MOST_POINT_US)


def kernel_rates(curves: Sequence[KernelCurve], threads: int, gb_per_s: float) -> tuple[tuple[KernelRate, ...], float]:
    """Rooflines of the formats that the curves hold, and the node's read bandwidth: ``gb_per_s``, or what a kernel on
    one token streamed if that is more (then the plain loop that measured it was held up by something else)."""
    streams: dict[tuple[str, str], float] = {}
    gflops: dict[tuple[str, str], float] = {}
    for curve in curves:
        if curve.kernel not in ("linear", "moe_experts") or curve.variant != "dram":
            continue
        key = curve.isa, curve.weight_format
        stream = curve.points[0].rate * bytes_a_weight(curve.weight_format)
        streams[key] = max(streams.get(key, 0.0), stream)
        if curve.kernel == "linear":
            gflops[key] = max(2 * p.size * p.rate for p in curve.points) / threads
    peak = max((gb_per_s, *streams.values()))
    rates = tuple(
        KernelRate(
            isa=isa,
            weight_format=form,
            gflops_per_core=gflops[isa, form],
            bandwidth_fraction=streams[isa, form] / peak,
            source=FigureSource.MEASURED,
        )
        for isa, form in gflops
    )
    return rates, peak


def _build(plans: Sequence[CurvePlan], isa: Isa, folder: Path, threads: int, progress: ProgressSink) -> Path:
    kernels = {plan.kernel.name: plan.kernel for plan in plans}
    sources = [Source(k.name, k.source) for k in kernels.values()]
    if any(k.objects for k in kernels.values()):
        sources.append(Source("tvm_support", support_source()))
    progress.stage(f"compile kernels ({isa.value})", total=len(sources))
    compiler, include = find_cxx(), installed_runtime.include()
    objects = compile_objects(
        sources, isa, include, threads=threads, progress=lambda stem: progress.advance(detail=stem)
    )
    for kernel in kernels.values():
        for number, (_, data) in enumerate(kernel.objects):
            path = folder / f"{kernel.name}-{number}.o"
            path.write_bytes(data)
            objects.append(path)
    source, probe = folder / "kernel_probe.cpp", folder / "kernel_probe"
    source.write_text(render("probe/kernel_probe.cpp.j2", kernels=list(kernels), context=CONTEXT), encoding="utf-8")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{include}"]
    command = [str(compiler.path), *flags, str(source), *map(str, objects), "-o", str(probe)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        last = (built.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{compiler.path} cannot build the kernel probe for {isa.value}: {last}.")
    return probe


def _run(
    probe: Path, plans: Sequence[CurvePlan], cpus: Sequence[int], folder: Path, budget_us: float
) -> list[list[list[float]]]:
    """Microseconds of the single calls, by curve and point."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(plan.kernel.name for plan in plans))}
    cases = folder / "cases.txt"
    cases.write_text("".join(_line(numbers, p, c, budget_us) + "\n" for p in plans for c in p.cases), encoding="utf-8")
    command = [str(probe), str(cases), ",".join(map(str, cpus)), str(stream_bytes(plans))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HetcompError(f"The kernel probe cannot be run: {error}.") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        at = len(done.stdout.splitlines())
        names = [plan.kernel.name for plan in plans for _ in plan.cases]
        where = f" in {names[at]}" if at < len(names) else ""
        raise HetcompError(f"The kernel probe failed with status {done.returncode}{where}: {last}.")
    readings = iter([json.loads(line) for line in done.stdout.splitlines()])
    return [[next(readings) for _ in plan.cases] for plan in plans]


def _line(numbers: Mapping[str, int], plan: CurvePlan, case: Case, budget_us: float) -> str:
    """The case as kernel_probe.cpp.j2 reads it."""
    kernel = plan.kernel
    words: list[object] = [
        numbers[kernel.name],
        case.rows,
        budget_us,
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


def _curve(plan: CurvePlan, isa: Isa, rounds: Sequence[Sequence[Sequence[float]]], barrier_us: float) -> KernelCurve:
    points = []
    for i, case in enumerate(plan.cases):
        by_round = [[case.work / max(us - barrier_us, 0.1 * us) / 1e3 for us in r[i]] for r in rounds]
        spread = sorted(rate for rates in by_round for rate in rates)
        kept = spread[:: max(1, -(-len(spread) // _KEPT_SAMPLES))]
        middle = statistics.median(statistics.median(rates) for rates in by_round)
        points.append(KernelPoint(size=case.size, rate=middle, samples=tuple(kept)))
    return KernelCurve(
        kernel=plan.name,
        variant=plan.variant,
        isa=isa.value,
        weight_format=plan.weight_format,
        shape=plan.shape,
        points=tuple(points),
        source=FigureSource.MEASURED,
    )
