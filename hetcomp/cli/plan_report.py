"""The plan as tables for people."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetcomp.cli.plan_figures import Figures, device_memory
from hetcomp.cli.plan_placement import critical_lines, solution_line
from hetcomp.cli.plan_summary import OpGroup, PlanSummary, summarise
from hetcomp.cli.plan_tables import device_memory_table, intensity_table, layer_table
from hetcomp.cli.plan_weights import weight_table
from hetcomp.ir.annotations import Timeline
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import adapter_line

GENERATED = "the plan that hetcomp compile generates code from (--explore: others, too)"
EXPLORED = "explored: may stream weights and use several GPUs, for which hetcomp compile generates no code"


def plan_report(
    plan: Plan, available_bytes: int | None = None, figures: Figures | None = None, *, explored: bool = False
) -> RenderableType:
    """Tables of op groups, predicted speed, layers and memory, and the plan's notes, for rich's Console.

    ``available_bytes``: free memory of the CPU's nodes; ``figures``: of the plan on its machine; where they are known.
    ``explored``: the plan may have what no code is generated for.
    """
    summary = summarise(plan)
    model, dims = plan.model, plan.max_dims()
    title = (
        f"{model.name}: {model.architecture}, {model.layers} layers, vocabulary {model.vocab:,}; "
        f"{KvPool.of(dims)}, steps of up to {dims['T']} tokens"
    )
    parts: list[RenderableType] = [Text(title), Text(EXPLORED if explored else GENERATED), _group_table(summary)]
    if figures is not None and (intensities := intensity_table(plan, summary, figures.roofs)) is not None:
        parts.append(intensities)
    if plan.timelines:
        parts += [_speed_table(plan), critical_lines(plan)]
    if (matrices := weight_table(plan)) is not None:
        parts.append(matrices)
    parts += _memory_parts(plan, summary, available_bytes, figures)
    parts.extend(Text(adapter_line(adapter)) for adapter in plan.adapters)
    if plan.solution is not None:
        parts.append(Text(solution_line(plan, plan.solution, figures.place_seconds if figures else None)))
    parts.extend(Text(f"note: {note}") for note in plan.notes)
    return Group(*parts)


def _memory_parts(
    plan: Plan, summary: PlanSummary, available_bytes: int | None, figures: Figures | None
) -> list[RenderableType]:
    """Of one memory the sum in bytes; of several the layers on them and a table by device."""
    memories = figures.memory if figures is not None else device_memory(plan, None)
    if len(memories) < 2:
        return [_memory_table(summary, available_bytes)]
    return [layer_table(plan, figures.steps if figures is not None else ()), device_memory_table(memories)]


def _group_table(summary: PlanSummary) -> Table:
    phases = summary.phases()
    # Lines between columns only: with boxes the table would need 120 columns.
    table = Table(
        title="Op groups",
        title_justify="left",
        show_footer=True,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("group", "total", no_wrap=True)
    table.add_column("device")
    totals = [
        str(sum(g.ops for g in summary.groups)),
        size(sum(g.weight_bytes for g in summary.groups)),
    ]
    table.add_column("ops", totals[0], justify="right")
    table.add_column("weights", totals[1], justify="right", no_wrap=True)
    if phases:
        first = [g.phase(phases[0]) for g in summary.groups]
        known = [p for p in first if p is not None]
        read, flops = sum(p.weight_bytes for p in known), sum(p.flops for p in known)
        moved = sum(p.moved_bytes for p in known)
        table.add_column("read a\ntoken", size(read), justify="right", no_wrap=True)
        table.add_column("FLOP a\ntoken", count(flops), justify="right", no_wrap=True)
        table.add_column("FLOP/B", f"{flops / moved:.2f}" if moved else "", justify="right")
        table.add_column("bound\nby")
    for phase in phases:
        whole = sum(p.us for g in summary.groups if (p := g.phase(phase)) is not None)
        table.add_column(f"{phase}\nms", f"{whole / 1e3:.3f}", justify="right")
    for group in summary.groups:
        table.add_row(*_group_row(group, phases))
    return table


def _group_row(group: OpGroup, phases: tuple[str, ...]) -> list[str]:
    row = [
        group.role,
        ", ".join(group.devices) or "–",
        str(group.ops),
        size(group.weight_bytes) if group.weight_bytes else "–",
    ]
    if phases:
        decode = group.phase(phases[0])
        row += (
            [
                size(decode.weight_bytes) if decode.weight_bytes else "–",
                count(decode.flops) if decode.flops else "–",
                f"{decode.intensity:.2f}",
                decode.bound,
            ]
            if decode is not None
            else ["–"] * 4
        )
    for name in phases:
        phase = group.phase(name)
        row.append(f"{phase.us / 1e3:.3f}" if phase is not None else "–")
    return row


def _speed_table(plan: Plan) -> Table:
    table = Table(title="Predicted speed", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for name in ("tokens", "ms", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("busy")
    for timeline in plan.timelines:
        whole = max(timeline.total_us, 1e-9)
        table.add_row(
            timeline.phase,
            f"{timeline.tokens:,}",
            f"{timeline.total_us / 1e3:.3f}",
            f"{timeline.tokens_per_s:,.1f}" + _spread(timeline),
            ", ".join(f"{lane.lane} {lane.busy_us / whole:.0%}" for lane in timeline.lanes),
        )
    return table


def _spread(timeline: Timeline) -> str:
    """10th to 90th percentile of tokens/s over sampled routings, where they differ."""
    if timeline.high_us <= timeline.low_us * 1.005 or timeline.low_us <= 0:
        return ""
    low, high = (timeline.tokens / us * 1e6 for us in (timeline.high_us, timeline.low_us))
    return f" ({low:,.0f} .. {high:,.0f})"


def _memory_table(summary: PlanSummary, available_bytes: int | None) -> Table:
    table = Table(title="Memory", title_justify="left", show_footer=True)
    table.add_column("what", "sum", no_wrap=True)
    table.add_column("bytes", f"{summary.memory_bytes:,}", justify="right", no_wrap=True)
    table.add_column("", size(summary.memory_bytes), justify="right", no_wrap=True)
    for item in summary.memory:
        table.add_row(item.what, f"{item.bytes:,}", size(item.bytes))
    if available_bytes is not None:
        table.caption = f"{available_bytes:,} bytes ({size(available_bytes)}) are available"
        table.caption_justify = "left"
    return table


def size(bytes: float) -> str:
    """Bytes in decimal units, as memory bandwidths are given."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes >= scale:
            return f"{bytes / scale:.2f} {unit}"
    return f"{bytes:.0f} B"


def count(number: float) -> str:
    """A number of FLOPs with its prefix."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {prefix}"
    return f"{number:.0f}"
