"""Placement by gain a byte: the cross-check of the solver, and optimal where all items are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hetcomp.passes.placement_assignment import Assignment, assignment_us, fits, gpu_used
from hetcomp.passes.placement_problem import ExpertSet, Problem


def greedy(problem: Problem, *, whatever: bool = False) -> Assignment:
    """Starts with everything on the CPU and fills GPU 0, 1, ... with groups first (attention, dense layers), then with
    experts, each in order of the time saved a byte; never streams, and ignores transfers. ``whatever``: what saves no
    time is moved as well, last.

    Where experts are of one size and the rest fits, filling by popularity is the optimum of the knapsack."""
    devices = ["cpu" if g.pin in (None, "gpu") else g.pin for g in problem.groups]
    experts = tuple(tuple({expert_home(e): len(c.members)} for c in e.classes) for e in problem.experts)
    lowest = float("-inf") if whatever else 0.0
    for gpu, capacity in enumerate(problem.gpu_bytes):
        left = capacity - problem.workspace_bytes
        left -= sum(g.bytes for g, d in zip(problem.groups, devices, strict=True) if d == f"gpu:{gpu}")
        for saved, index in sorted(_group_gains(problem, devices, gpu), reverse=True):
            if problem.groups[index].bytes <= left and saved > lowest:
                devices[index] = f"gpu:{gpu}"
                left -= problem.groups[index].bytes
        experts = fill_experts(problem, devices, experts, gpu, left, lowest)
    return Assignment(tuple(devices), frozenset(), experts)


def cpu_only(problem: Problem) -> Assignment:
    """Everything on the CPU that is not pinned elsewhere; what is pinned to any GPU on the largest."""
    largest = max(range(len(problem.gpu_bytes)), key=lambda i: (problem.gpu_bytes[i], -i), default=0)
    homes = {None: "cpu", "gpu": f"gpu:{largest}"}
    experts = tuple(tuple({expert_home(e): len(c.members)} for c in e.classes) for e in problem.experts)
    return Assignment(tuple(homes.get(g.pin, g.pin or "cpu") for g in problem.groups), frozenset(), experts)


def topped_up(problem: Problem, assignment: Assignment) -> Assignment:
    """With experts moved into what the assignment leaves free on the GPUs it uses, where that helps in the linear
    model."""
    experts = assignment.experts
    for gpu, used in enumerate(gpu_used(problem, assignment)):
        if used:
            experts = fill_experts(problem, assignment.groups, experts, gpu, problem.gpu_bytes[gpu] - used, 0.0)
    more = replace(assignment, experts=experts)
    better = fits(problem, more) and assignment_us(problem, more) < assignment_us(problem, assignment)
    return more if better else assignment


def fill_experts(
    problem: Problem,
    devices: Sequence[str],
    experts: tuple[tuple[dict[str, int], ...], ...],
    gpu: int,
    left: int,
    lowest: float,
) -> tuple[tuple[dict[str, int], ...], ...]:
    """Experts of the CPU moved to the GPU into ``left`` bytes."""
    counts = [[dict(options) for options in classes] for classes in experts]
    for saved, index, number in sorted(_expert_gains(problem, gpu), key=lambda item: (-item[0], item[1:])):
        e, options = problem.experts[index], counts[index][number]
        available = options.get("cpu", 0)
        moved = min(available, int(left // e.expert_bytes) if e.expert_bytes else available)
        here = problem.streaming or devices[e.spine] == f"gpu:{gpu}"
        if moved > 0 and e.pin is None and saved > lowest and here:
            options["cpu"] = available - moved
            options[f"gpu:{gpu}"] = options.get(f"gpu:{gpu}", 0) + moved
            left -= moved * e.expert_bytes
    return tuple(tuple({o: n for o, n in c.items() if n} for c in classes) for classes in counts)


def expert_home(e: ExpertSet) -> str:
    """Where its experts are that are not moved."""
    return e.pin or "cpu"


def _group_gains(problem: Problem, devices: list[str], gpu: int) -> list[tuple[float, int]]:
    gains = []
    for index, g in enumerate(problem.groups):
        saved = sum(s.steps * (g.cpu_us[p] - g.gpu_us[gpu][p]) for p, s in enumerate(problem.phases))
        if devices[index] == "cpu" and g.may_be_on(f"gpu:{gpu}"):
            gains.append((float("inf") if g.pin else saved / max(1, g.bytes), index))
    return gains


def _expert_gains(problem: Problem, gpu: int) -> list[tuple[float, int, int]]:
    gains = []
    for index, e in enumerate(problem.experts):
        for number, c in enumerate(e.classes):
            saved = sum(s.steps * (c.cpu_us[p] - c.gpu_us[gpu][p]) for p, s in enumerate(problem.phases))
            gains.append((saved / max(1, e.expert_bytes), index, number))
    return gains
