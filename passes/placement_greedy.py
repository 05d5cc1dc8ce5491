"""Placement by gain a byte: the cross-check of the solver, and optimal where all items are alike."""

from __future__ import annotations

from hetcomp.passes.placement_assignment import Assignment
from hetcomp.passes.placement_problem import ExpertSet, Problem


def greedy(problem: Problem) -> Assignment:
    """Starts with everything on the CPU and fills GPU 0, 1, ... with groups first (attention, dense layers), then with
    experts, each in order of the time saved a byte; never streams, and ignores transfers.

    Where experts are of one size and the rest fits, filling by popularity is the optimum of the knapsack."""
    devices = ["cpu" if g.pin is None else g.pin for g in problem.groups]
    counts = [[{_home(e): len(c.members)} for c in e.classes] for e in problem.experts]
    for gpu, capacity in enumerate(problem.gpu_bytes):
        left = capacity - problem.workspace_bytes
        left -= sum(g.bytes for g, d in zip(problem.groups, devices, strict=True) if d == f"gpu:{gpu}")
        for _, index in sorted(_group_gains(problem, devices, gpu), reverse=True):
            if problem.groups[index].bytes <= left:
                devices[index] = f"gpu:{gpu}"
                left -= problem.groups[index].bytes
        for _, index, number in sorted(_expert_gains(problem, gpu), key=lambda item: (-item[0], item[1:])):
            e = problem.experts[index]
            available = counts[index][number].get("cpu", 0)
            moved = min(available, int(left // e.expert_bytes) if e.expert_bytes else available)
            if moved > 0 and e.pin is None:
                counts[index][number]["cpu"] = available - moved
                counts[index][number][f"gpu:{gpu}"] = moved
                left -= moved * e.expert_bytes
    experts = tuple(tuple({o: n for o, n in c.items() if n} for c in classes) for classes in counts)
    return Assignment(tuple(devices), frozenset(), experts)


def _home(e: ExpertSet) -> str:
    return e.pin or "cpu"


def _number(device: str) -> int:
    return int(device.partition(":")[2])


def _group_gains(problem: Problem, devices: list[str], gpu: int) -> list[tuple[float, int]]:
    gains = []
    for index, g in enumerate(problem.groups):
        saved = sum(s.steps * (g.cpu_us[p] - g.gpu_us[gpu][p]) for p, s in enumerate(problem.phases))
        if devices[index] == "cpu" and g.pin is None and saved > 0:
            gains.append((saved / max(1, g.bytes), index))
    return gains


def _expert_gains(problem: Problem, gpu: int) -> list[tuple[float, int, int]]:
    gains = []
    for index, e in enumerate(problem.experts):
        for number, c in enumerate(e.classes):
            saved = sum(s.steps * (c.cpu_us[p] - c.gpu_us[gpu][p]) for p, s in enumerate(problem.phases))
            if saved > 0:
                gains.append((saved / max(1, e.expert_bytes), index, number))
    return gains
