"""Tables of the plan's terminal report that need the machine: intensity against ridge points, layers, memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.table import Table

from hetcomp.cli.plan_figures import DeviceMemory, Roof, Step, layer_us
from hetcomp.cli.plan_placement import layer_runs
from hetcomp.cli.plan_summary import OpGroup, PlanSummary
from hetcomp.ir.plan import Plan

# Op classes below this part of every phase are left out of the intensity table.
SMALLEST_SHARE = 0.01


def gib(bytes: float) -> str:
    """Bytes in GiB, as memories are sold."""
    return f"{bytes / 2**30:.2f}"


def _table(title: str) -> Table:
    # Lines between columns only: with boxes the widest would need more than 100 columns.
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def intensity_table(plan: Plan, summary: PlanSummary, roofs: Sequence[Roof]) -> Table | None:
    """FLOP a byte of the op classes that matter, and what would limit them on each device; alike ones share a line."""
    phases = [p for p in ("decode", plan.timelines[-1].phase if plan.timelines else "prefill") if p in summary.phases()]
    lines: dict[tuple[tuple[float, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for group in summary.groups:
        if not _matters(group, summary):
            continue
        values = [round(p.intensity, 2) if (p := group.phase(name)) else 0.0 for name in phases]
        limits = tuple(roof.limit(value) for value in values for roof in roofs)
        lines[tuple(values), limits].append(group.role)
    if not lines or not roofs:
        return None
    table = _table(f"Arithmetic intensity, FLOP/B; ridges of {roofs[0].weight_format}")
    table.add_column("op class")
    for name in phases:
        table.add_column(name, justify="right", no_wrap=True)
        for roof in roofs:
            table.add_column(f"{roof.device}\nridge {roof.ridge:.1f}", no_wrap=True)
    for (shown, limits), roles in lines.items():
        row = []
        for i, value in enumerate(shown):
            row += [f"{value:,.2f}", *limits[i * len(roofs) : (i + 1) * len(roofs)]]
        table.add_row(", ".join(roles), *row)
    return table


def _matters(group: OpGroup, summary: PlanSummary) -> bool:
    for name, phase in group.phases.items():
        whole = sum(p.us for g in summary.groups if (p := g.phase(name)) is not None)
        if phase.flops and whole and phase.us / whole >= SMALLEST_SHARE:
            return True
    return False


def layer_table(plan: Plan, steps: Sequence[Step]) -> Table:
    """One line a run of layers that are placed alike: devices, GiB of weights and KV cache there, and milliseconds by
    which the run holds a decode step and a prefill chunk up."""
    table = _table("Layers")
    table.add_column("layers", no_wrap=True)
    table.add_column("attention, dense")
    table.add_column("experts")
    table.add_column("GiB", no_wrap=True)
    times = [layer_us(step.events) for step in steps]
    for step in steps:
        table.add_column(f"{step.phase.name}\nms", justify="right", no_wrap=True)
    for run in layer_runs(plan):
        held = [f"{sum(t.get(i, 0.0) for i in range(run.first, run.last + 1)) / 1e3:.3f}" for t in times]
        sizes = "\n".join(f"{device} {gib(size)}" for device, size in run.bytes)
        table.add_row(run.layers, run.dense, run.experts, sizes, *held)
    return table


def device_memory_table(memories: Sequence[DeviceMemory]) -> Table:
    """What lies on which device, the sum, the limit and what is left, in GiB."""
    table = _table("Memory by device, GiB")
    table.add_column("what", no_wrap=True)
    for memory in memories:
        table.add_column(memory.device, justify="right", no_wrap=True)
    whats = dict.fromkeys(what for memory in memories for what, _ in memory.parts)
    for i, what in enumerate(whats):
        cells = [dict(memory.parts).get(what) for memory in memories]
        table.add_row(what, *(gib(c) if c else "–" for c in cells), end_section=i == len(whats) - 1)
    table.add_row("sum", *(gib(m.bytes) for m in memories))
    if any(m.limit is not None for m in memories):
        table.add_row("limit", *(gib(m.limit) if m.limit is not None else "–" for m in memories))
        table.add_row("free", *(gib(m.limit - m.bytes) if m.limit is not None else "–" for m in memories))
    return table
