"""Runs tasks on in-order lanes: a discrete-event simulation in which lanes share the memory's bandwidth and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetcomp.passes.memory_contention import copies_slowdown, reads_slowdown


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one lane: ``us`` alone on the machine, of which memory is read at ``gb_per_s`` (0: none of the shared
    memory). It starts when its lane has done what came before and ``after`` (indices of earlier tasks) are done.
    ``moe_layer``: of experts, which MoE layer's they are, counted from 0. ``link``: the GPU into which it copies from
    the host, with all that its link carries."""

    role: str
    layer: int | None
    lane: str
    us: float
    after: tuple[int, ...]
    gb_per_s: float = 0.0
    moe_layer: int | None = None
    link: str = ""


@dataclass(frozen=True)
class Run:
    """Start and end of every task in microseconds, and for each the task that it waited for last (None: none)."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    waited_for: tuple[int | None, ...]

    @property
    def total_us(self) -> float:
        """When the last task ends."""
        return max(self.end, default=0.0)

    def critical(self) -> list[int]:
        """The chain of tasks, first to last, each of which the next waited for, up to the one that ends last."""
        at: int | None = max(range(len(self.end)), key=lambda i: (self.end[i], i), default=None)
        chain = []
        while at is not None:
            chain.append(at)
            at = self.waited_for[at]
        return chain[::-1]


def run_lanes(tasks: Sequence[Task], joint_gb_per_s: float) -> Run:
    """Simulates the tasks, given in program order.

    While the tasks that run want more than ``joint_gb_per_s`` of the shared memory together, each gets its share in
    proportion, and below that reads by CPU cores and copies over PCIe slow each other down (memory_contention). Copies
    over one link have equal parts of it.
    """
    n = len(tasks)
    start, end, waited = [0.0] * n, [0.0] * n, [None] * n  # type: list[float], list[float], list[int | None]
    last_of: dict[str, int] = {}
    readers: list[list[int]] = [[] for _ in range(n)]
    missing = [0] * n
    for i, task in enumerate(tasks):
        before = last_of.get(task.lane)
        needs = set(task.after) if before is None else {*task.after, before}
        last_of[task.lane] = i
        missing[i] = len(needs)
        for need in needs:
            readers[need].append(i)
    active: dict[int, float] = {i: tasks[i].us for i in range(n) if missing[i] == 0}
    now = 0.0
    while active:
        slowdowns = _slowdowns([tasks[i] for i in active], joint_gb_per_s)
        lasts = {i: left * slowdown for (i, left), slowdown in zip(active.items(), slowdowns, strict=True)}
        step = min(lasts.values())
        now += step
        near = step * (1 + 1e-12)
        done = [i for i, last in lasts.items() if last <= near]
        for i, slowdown in zip(active, slowdowns, strict=True):
            active[i] -= step / slowdown
        for i in done:
            del active[i]
            end[i] = now
            for reader in readers[i]:
                missing[reader] -= 1
                if missing[reader] == 0:
                    start[reader], waited[reader] = now, i
                    active[reader] = tasks[reader].us
    return Run(tuple(start), tuple(end), tuple(waited))


def _slowdowns(running: Sequence[Task], joint_gb_per_s: float) -> list[float]:
    """How many times as long as alone each of the tasks takes while they all run."""
    read = copied = 0.0
    links = [task.link for task in running if task.link]
    for task in running:
        if not task.link:
            read += task.gb_per_s
        elif task.gb_per_s:
            copied += task.gb_per_s / links.count(task.link)
    reads = reads_slowdown(read, copied, joint_gb_per_s) if read else 1.0
    if not links:
        return [reads if task.gb_per_s else 1.0 for task in running]
    copies = copies_slowdown(read, copied, joint_gb_per_s)
    return [
        (reads if task.gb_per_s else 1.0)
        if not task.link
        else links.count(task.link) * (copies if task.gb_per_s else 1.0)
        for task in running
    ]
