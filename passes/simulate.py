"""Runs the plan on simulated lanes: the predicted timeline of decode and prefill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetcomp.ir.annotations import AdapterRoom, LaneShare, Timeline
from hetcomp.ir.events import Event
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.plan import Plan
from hetcomp.passes.adapter_memory import pair_bytes_on
from hetcomp.passes.annotate_cost import cost_plan
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import joint_gb_per_s
from hetcomp.passes.lane_engine import Run, Task, run_lanes
from hetcomp.passes.lane_tasks import StepTasks
from hetcomp.passes.phases import Phase, phases
from hetcomp.passes.registry import plan_pass
from hetcomp.passes.routing import ReplayedStep

# Routings drawn for a step of few tokens, where lanes race; the mean's error is then about a percent.
SAMPLES = 24
# With more tokens the numbers hardly vary.
SAMPLES_OF_MANY = 4
CRITICAL_ENTRIES = 12


@dataclass(frozen=True)
class SampledStep:
    """A step with one routing, simulated."""

    tasks: Sequence[Task]
    run: Run


@plan_pass(requires=("memory_planned",), establishes=("simulated",))
def simulate(plan: Plan, context: Context) -> Plan:
    """Sets ``timelines``: a discrete-event simulation of in-order lanes (CPU nodes, GPUs, their copy engines).

    An op starts when its lane is free and its inputs are there; barriers and hand-shakes cost what the profile says;
    reads of CPU cores and copies share the memory's bandwidth. Where experts live on several devices, routings are
    sampled and the mean is taken, because the mean of the slower lane is not the slower lane's mean.
    """
    simulated = replace(plan, timelines=tuple(timeline(plan, i, s, context) for i, s in enumerate(phases(plan))))
    return simulated if plan.adapter_room is None else _with_adapter(simulated, plan.adapter_room, context)


def _with_adapter(plan: Plan, room: AdapterRoom, context: Context) -> Plan:
    """Also predicts decode with an adapter of the rank that there is room for."""
    i, step = next((i, step) for i, step in enumerate(phases(plan)) if step.name == "decode")
    adapted = replace(context, adapted_rank=room.rank)
    us = timeline(cost_plan(plan, (step,), adapted), 0, step, adapted).total_us
    where = ", ".join(f"{pair_bytes_on(plan, context, gpu) / 1e9:.2f} GB of {gpu}" for gpu in on_gpu(plan))
    note = (
        f"LoRA adapters: room for {room.count} of rank {room.rank}{f' ({where})' if where else ''}; a step of decoding "
        f"with one on attention, dense layers and experts takes {us / 1e3:.3f} ms, "
        f"{plan.timelines[i].total_us / 1e3:.3f} without"
    )
    return replace(plan, adapter_room=replace(room, decode_us=us), notes=(*plan.notes, note))


def timeline(plan: Plan, phase: int, step: Phase, context: Context) -> Timeline:
    """The simulated step whose costs are entry ``phase`` of every op's."""
    samples = sampled_steps(plan, phase, step, context)
    totals = [s.run.total_us for s in samples]
    total = float(np.mean(totals))
    return Timeline(
        phase=step.name,
        tokens=step.tokens,
        total_us=total,
        tokens_per_s=step.tokens / total * 1e6 if total else 0.0,
        lanes=tuple(LaneShare(lane, us) for lane, us in sorted(_lane_times(samples).items())),
        roles=tuple(sorted(_role_times(samples).items(), key=lambda item: -item[1])),
        critical=_critical(_middle(samples)),
        low_us=float(np.percentile(totals, 10)),
        high_us=float(np.percentile(totals, 90)),
    )


def replayed_us(
    plan: Plan, phase: int, step: Phase, context: Context, replayed: Sequence[ReplayedStep]
) -> tuple[float, ...]:
    """Microseconds of the simulated step with each of the recorded routings."""
    builder, joint = StepTasks(plan, phase, step, context), joint_gb_per_s(context.profile)
    return tuple(run_lanes(builder.tasks(0, routing), joint).total_us for routing in replayed)


def trace(plan: Plan, phase: int, step: Phase, context: Context) -> tuple[Event, ...]:
    """What happens when in the sample whose total is the median."""
    sample = _middle(sampled_steps(plan, phase, step, context))
    run, critical = sample.run, set(sample.run.critical())
    return tuple(
        Event(_name(task), task.role, task.layer, task.lane, run.start[i], run.end[i] - run.start[i], i in critical)
        for i, task in enumerate(sample.tasks)
    )


def sampled_steps(plan: Plan, phase: int, step: Phase, context: Context) -> list[SampledStep]:
    """The step with as many routings as its time needs; the same ones for every plan."""
    builder = StepTasks(plan, phase, step, context)
    joint = joint_gb_per_s(context.profile)
    first = builder.tasks(0)
    samples = [SampledStep(first, run_lanes(first, joint))]
    if _races(plan, context):
        for seed in range(1, SAMPLES if step.tokens <= 64 else SAMPLES_OF_MANY):
            tasks = builder.tasks(seed)
            samples.append(SampledStep(tasks, run_lanes(tasks, joint)))
    return samples


def _middle(samples: Sequence[SampledStep]) -> SampledStep:
    """The sample whose total is the median."""
    return sorted(samples, key=lambda s: s.run.total_us)[len(samples) // 2]


def _races(plan: Plan, context: Context) -> bool:
    """Whether the routing changes the step's time."""
    runs = (run for call in plan.calls for _, placement in call.placements for run in placement.experts)
    homes = {run.device.partition(":")[0] for run in runs}
    return bool(homes) and (homes != {"cpu"} or context.statistics is not None or plan.expert_cache is not None)


def _lane_times(samples: Sequence[SampledStep]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for sample in samples:
        for i, task in enumerate(sample.tasks):
            sums[task.lane] += (sample.run.end[i] - sample.run.start[i]) / len(samples)
    return sums


def _role_times(samples: Sequence[SampledStep]) -> dict[str, float]:
    """Time by role; of an op that occupies several lanes at once the longest, so that CPU-only times add up."""
    sums: dict[str, float] = defaultdict(float)
    for sample in samples:
        spans: dict[tuple[str, int | None, float], float] = {}
        for i, task in enumerate(sample.tasks):
            key = (task.role, task.layer, sample.run.start[i])
            spans[key] = max(spans.get(key, 0.0), sample.run.end[i] - sample.run.start[i])
        for (role, _, _), us in spans.items():
            sums[role] += us / len(samples)
    return sums


def _critical(sample: SampledStep) -> tuple[tuple[str, float], ...]:
    several = len({task.lane for task in sample.tasks}) > 1
    sums: dict[str, float] = defaultdict(float)
    for i in sample.run.critical():
        task = sample.tasks[i]
        name = f"{task.role} on {task.lane}" if several else task.role
        sums[name] += sample.run.end[i] - sample.run.start[i]
    return tuple(sorted(sums.items(), key=lambda item: -item[1])[:CRITICAL_ENTRIES])


def _name(task: Task) -> str:
    return task.role if task.layer is None else f"layer {task.layer} {task.role}"
