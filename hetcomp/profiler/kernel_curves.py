"""Measures our own generated kernels on this machine: the curves of the hardware profile."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hetcomp.backends.protocol import Isa
from hetcomp.hardware.figures import KernelCurve, KernelPoint, KernelRate
from hetcomp.hardware.figures import Source as FigureSource
from hetcomp.hardware.tuning import KernelTuning
from hetcomp.profiler.kernel_cases import CurvePlan, Detail, bytes_a_weight, curve_plans, stream_bytes
from hetcomp.profiler.kernel_probe import KernelProbe, Timing
from hetcomp.progress import ProgressSink

# Repetitions of all points: memory bandwidth of shared machines comes and goes.
_ROUNDS = {Detail.FULL: 2, Detail.COARSE: 1, Detail.QUICK: 1}
# Seconds for the calls of all points of an instruction set, and what one point gets of it in a round.
_SECONDS = {Detail.FULL: 13.0, Detail.COARSE: 4.0, Detail.QUICK: 2.0}
_LEAST_POINT_US, _MOST_POINT_US = 10_000.0, 75_000.0
_KEPT_SAMPLES = 8


def kernel_curves(
    isa: Isa,
    cpus: Sequence[int],
    barrier_us: float,
    detail: Detail,
    cold_bytes: int,
    tunings: tuple[KernelTuning, ...],
    progress: ProgressSink,
) -> tuple[KernelCurve, ...]:
    """Curves of one instruction set on threads pinned to ``cpus`` (of one node).

    A point is the median of its calls, less the barrier behind each. cold_bytes: memory over which weights take turns
    to be cold. tunings: constants that the kernels are generated with. Raises HetcompError if the kernels cannot be
    built or run; they run in a process of their own.
    """
    plans = list(curve_plans(isa, detail, cold_bytes, tunings))
    with tempfile.TemporaryDirectory(prefix="hetcomp-kernels-") as folder:
        progress.stage(f"compile kernels ({isa.value})", total=len({plan.kernel.name for plan in plans}) + 1)
        kernels = [plan.kernel for plan in plans]
        probe = KernelProbe(kernels, isa, Path(folder), len(cpus), lambda stem: progress.advance(detail=stem))
        progress.stage(f"time kernels ({isa.value})", total=_ROUNDS[detail])
        budget = point_us(plans, detail)
        timings = [Timing(plan.kernel, case, budget) for plan in plans for case in plan.cases]
        rounds = []
        for _ in range(_ROUNDS[detail]):
            readings = iter(probe.run(timings, cpus, stream_bytes(plans)))
            rounds.append([[next(readings) for _ in plan.cases] for plan in plans])
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
