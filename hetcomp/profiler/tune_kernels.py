"""Finds the constants of the CPU kernels that suit this machine's caches and memory: a short search by timing."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path

from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.hardware.tuning import Constant, KernelTuning, Trial, Tuning
from hetcomp.profiler.kernel_cases import CurvePlan, expert_plan, linear_plan, stream_bytes
from hetcomp.profiler.kernel_probe import KernelProbe, Timing
from hetcomp.progress import ProgressSink

# One format a family of kernels (CpuIsa.family).
FORMATS = ("q4", "bf16")
# A value takes the place of the one that stands if kernels are faster with it by this much.
MARGIN = 1.03
# Rounds over all variants, and fewest that decide.
_ROUNDS, _LEAST_ROUNDS = 9, 5
# No stage begins that would not end within this, going by the longest one before it.
_SECONDS = 12.0
# Of a stage's time, what the calls take; compiling takes the rest.
_TIMING_SECONDS = 3.0


class Work(StrEnum):
    """What is timed to judge a constant: experts on one token from memory; on many tokens; a linear op on few."""

    DECODE = "decode"
    PREFILL = "prefill"
    FEW = "few"


_BUDGET_US = {Work.DECODE: 5_000.0, Work.PREFILL: 2_000.0, Work.FEW: 4_000.0}


@dataclass(frozen=True)
class Knob:
    """A constant, the work that shows its worth, and the values to try, given the one that stands."""

    constant: Constant
    work: Work
    values: Callable[[int], tuple[int, ...]]


# In order of worth as measured on a Zen 4 (docs/decisions/tuned-kernels.md). The knobs of a stage are tried at once:
# they do not touch each other's work. Prefetch of 64: in effect none; 2304: eight groups of q4; 4096: a page; 8192: by
# way of L2 (codegen_templates/cpu/stream.h.j2).
STAGES: tuple[tuple[Knob, ...], ...] = (
    (Knob("prefetch_bytes", Work.DECODE, lambda _: (64, 2304, 4096, 8192)),),
    (Knob("gemv_rows", Work.FEW, lambda now: (now // 2, now * 3 // 2)),),
    (
        Knob("draw_bytes", Work.DECODE, lambda now: (now // 4, now * 4)),
        Knob("task_blocks", Work.PREFILL, lambda now: (now // 2, now * 2)),
    ),
)


@dataclass(frozen=True)
class Variant:
    """Kernels for weights of ``weight_format`` with ``tuning``."""

    weight_format: str
    tuning: Tuning


# Times every variant on every work, round by round: microseconds by round, variant and work.
Timer = Callable[[Sequence[Variant], Sequence[Work]], Sequence[Sequence[Mapping[Work, float]]]]


def tune_kernels(isa: Isa, cpus: Sequence[int], cold_bytes: int, progress: ProgressSink) -> tuple[KernelTuning, ...]:
    """The constants for ``isa`` on threads pinned to ``cpus`` (of one node), one record a family of formats.

    cold_bytes: memory over which weights take turns to be cold. Raises HetcompError if the kernels cannot be built or
    run.
    """
    progress.stage(f"tune kernels ({isa.value})", total=len(STAGES))
    start = tuple(Variant(form, cpu_isa(isa).tuning(form)) for form in FORMATS)

    def timer(variants: Sequence[Variant], works: Sequence[Work]) -> list[list[dict[Work, float]]]:
        found = _time_variants(isa, cpus, cold_bytes, variants, works)
        progress.advance()
        return found

    return tuple(
        KernelTuning(isa=isa.value, weight_format=best.weight_format, constants=best.tuning, trials=trials)
        for best, trials in search(start, timer)
    )


def search(
    start: Sequence[Variant], timer: Timer, clock: Callable[[], float] = time.monotonic
) -> list[tuple[Variant, tuple[Trial, ...]]]:
    """Coordinate descent from every variant of ``start``, stage by stage; what was tried beside what was found."""
    found: list[tuple[Variant, tuple[Trial, ...]]] = [(variant, ()) for variant in start]
    begun, longest = clock(), 0.0
    for stage in STAGES:
        if clock() - begun + longest > _SECONDS:
            break
        before = clock()
        groups = [_variants(variant, stage) for variant, _ in found]
        rounds = timer([v for group in groups for v in group], sorted({knob.work for knob in stage}))
        longest = max(longest, clock() - before)
        if len(rounds) < _LEAST_ROUNDS:
            continue
        at = 0
        for i, group in enumerate(groups):
            mine = [times[at : at + len(group)] for times in rounds]
            at += len(group)
            trials = [trial for knob in stage for trial in _trials(knob, group, mine)]
            found[i] = (_moved(group[0], trials), (*found[i][1], *trials))
    return found


def _variants(now: Variant, stage: Sequence[Knob]) -> list[Variant]:
    """What stands, then one variant for each place in the lists of the knobs' values."""
    columns = []
    for knob in stage:
        old = getattr(now.tuning, knob.constant)
        columns.append([(knob.constant, value) for value in knob.values(old) if value not in (0, old)])
    changes = [dict(filter(None, row)) for row in zip_longest(*columns)]
    return [now, *(Variant(now.weight_format, now.tuning.model_copy(update=change)) for change in changes)]


def _trials(knob: Knob, group: Sequence[Variant], rounds: Sequence[Sequence[Mapping[Work, float]]]) -> Iterator[Trial]:
    """How the knob's values did against the first variant of the group.

    Other processes lengthen some calls several times over, and of few rounds they may hit the same variant in most:
    the ratio of the rounds' medians must hold between undisturbed rounds (the lower quartiles) as well.
    """
    old = getattr(group[0].tuning, knob.constant)
    columns = [[times[i][knob.work] for times in rounds] for i in range(len(group))]
    for variant, column in zip(group, columns, strict=True):
        value = getattr(variant.tuning, knob.constant)
        if value != old:
            ratios = tuple(round(before / now, 4) for before, now in zip(columns[0], column, strict=True))
            speedup = round(min(statistics.median(ratios), _quartile(columns[0]) / _quartile(column)), 4)
            yield Trial(constant=knob.constant, value=value, speedup=speedup, samples=ratios)


def _moved(now: Variant, trials: Sequence[Trial]) -> Variant:
    """The variant with the best value of each constant, where that is better by the margin."""
    rising = sorted((trial for trial in trials if trial.speedup > MARGIN), key=lambda trial: trial.speedup)
    changes: dict[str, int] = {trial.constant: trial.value for trial in rising}
    return Variant(now.weight_format, now.tuning.model_copy(update=changes))


def _time_variants(
    isa: Isa, cpus: Sequence[int], cold_bytes: int, variants: Sequence[Variant], works: Sequence[Work]
) -> list[list[dict[Work, float]]]:
    """The Timer of this machine. Variants take turns within a round, every other round in reverse, so that neither a
    busy moment nor a drift favours one. In a round a case counts by the lower quartile of its calls, a work of several
    cases by their geometric mean."""
    plans = {(i, work): _plan(isa, variant, work, cold_bytes) for i, variant in enumerate(variants) for work in works}
    order = [place for i in range(len(variants)) for place in plans if place[0] == i]
    schedule = [place for r in range(_ROUNDS) for place in (order if r % 2 == 0 else order[::-1])]
    timings = [Timing(plans[p].kernel, case, _BUDGET_US[p[1]]) for p in schedule for case in plans[p].cases]
    with tempfile.TemporaryDirectory(prefix="hetcomp-tune-") as folder:
        kernels = [plan.kernel for plan in plans.values()]
        probe = KernelProbe(kernels, isa, Path(folder), len(cpus), lambda stem: None)
        readings = probe.run(timings, cpus, stream_bytes(list(plans.values())), _TIMING_SECONDS)
    return list(_rounds(plans, schedule, readings))


def _plan(isa: Isa, variant: Variant, work: Work, cold_bytes: int) -> CurvePlan:
    tuning = KernelTuning(isa=isa.value, weight_format=variant.weight_format, constants=variant.tuning)
    if work is Work.FEW:
        default = cpu_isa(isa).tuning(variant.weight_format).gemv_rows
        tokens = sorted({default // 2 + 1, default, default * 3 // 2})
        return linear_plan(isa, tuning, tokens, cold_bytes)
    return expert_plan(isa, tuning, (1,) if work is Work.DECODE else (64, 512), cold_bytes)


def _rounds(
    plans: Mapping[tuple[int, Work], CurvePlan],
    schedule: Sequence[tuple[int, Work]],
    readings: Sequence[Sequence[float]],
) -> Iterator[list[dict[Work, float]]]:
    """The rounds that were timed whole."""
    at, n_variants = 0, 1 + max(i for i, _ in plans)
    for first in range(0, len(schedule), len(plans)):
        times: list[dict[Work, float]] = [{} for _ in range(n_variants)]
        for i, work in schedule[first : first + len(plans)]:
            calls = readings[at : at + len(plans[i, work].cases)]
            if len(calls) < len(plans[i, work].cases):
                return
            at += len(calls)
            times[i][work] = math.exp(statistics.fmean(math.log(_quartile(call)) for call in calls))
        yield times


def _quartile(times: Sequence[float]) -> float:
    """The lower quartile: other processes only ever make calls longer."""
    return sorted(times)[len(times) // 4]
