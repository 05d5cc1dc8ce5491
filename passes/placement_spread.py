"""Placement of consecutive layers on each of several GPUs, so that a step crosses from one to the next but once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from hetcomp.passes.placement_assignment import Assignment
from hetcomp.passes.placement_greedy import expert_home, fill_experts
from hetcomp.passes.placement_problem import Problem


def spread(problem: Problem) -> list[Assignment]:
    """Everything on as few GPUs as have the memory for it, the largest first, and on one more, for whole layers may
    leave gaps; on all GPUs where not everything fits. Empty where there is one GPU."""
    rooms = [max(0, size - problem.workspace_bytes) for size in problem.gpu_bytes]
    order = sorted((i for i, room in enumerate(rooms) if room), key=lambda i: (-rooms[i], i))
    if len(problem.gpu_bytes) < 2 or not order:
        return []
    needed = sum(_call_bytes(problem).values())
    enough = next((n for n in range(1, len(order)) if sum(rooms[i] for i in order[:n]) >= needed), len(order))
    counts = range(enough, min(enough + 1, len(order)) + 1)
    return [_over(problem, sorted(order[:n]), rooms) for n in counts]


def _over(problem: Problem, gpus: Sequence[int], rooms: Sequence[int]) -> Assignment:
    """Each GPU gets consecutive calls whose bytes are its part of all GPUs' memory, and of their experts as many as it
    has room for."""
    gpu_of = _cut(_call_bytes(problem), gpus, rooms)
    left = {i: rooms[i] for i in gpus}
    devices = []
    for g in problem.groups:
        device = g.pin if g.pin not in (None, "gpu") else f"gpu:{gpu_of[g.call]}"
        number = int(device[4:]) if device != "cpu" else -1
        if g.pin in (None, "gpu") and g.bytes > left[number]:
            device = "cpu"
        elif number in left:
            left[number] -= g.bytes
        devices.append(device)
    experts = tuple(tuple({expert_home(e): len(c.members)} for c in e.classes) for e in problem.experts)
    by_layer = replace(problem, streaming=False)  # experts stay with their layer
    for gpu in gpus:
        experts = fill_experts(by_layer, devices, experts, gpu, left[gpu], float("-inf"))
    return Assignment(tuple(devices), frozenset(), experts)


def _call_bytes(problem: Problem) -> dict[int, int]:
    """What each call would take of a GPU with all its weights and states, those left out that belong on the CPU."""
    found: dict[int, int] = defaultdict(int)
    for g in problem.groups:
        found[g.call] += g.bytes if g.pin != "cpu" else 0
    for e in problem.experts:
        found[e.call] += sum(len(c.members) for c in e.classes) * e.expert_bytes if e.pin != "cpu" else 0
    return found


def _cut(sizes: dict[int, int], gpus: Sequence[int], rooms: Sequence[int]) -> dict[int, int]:
    """The GPU of every call: that in whose part of the memory the middle of the call's bytes lies."""
    whole, memory = sum(sizes.values()) or 1, sum(rooms[i] for i in gpus)
    ends, end = [], 0
    for gpu in gpus:
        end += rooms[gpu]
        ends.append((end / memory, gpu))
    found, before = {}, 0
    for call in sorted(sizes):
        middle = (before + sizes[call] / 2) / whole
        found[call] = next((gpu for part, gpu in ends if middle <= part), gpus[-1])
        before += sizes[call]
    return found
