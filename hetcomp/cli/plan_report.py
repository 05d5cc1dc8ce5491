"""The plan as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetcomp.cli.plan_placement import (
    critical_lines,
    device_bytes,
    device_memory_table,
    layer_runs,
    layer_table,
    solution_line,
    uses_gpus,
)
from hetcomp.cli.plan_summary import OpGroup, PlanSummary, summarise
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import Timeline
from hetcomp.ir.plan import Plan

_SCHEMA = (1, 1)


def plan_report(
    plan: Plan, available_bytes: int | None = None, profile: HardwareProfile | None = None
) -> RenderableType:
    """Tables of op groups, predicted speed and memory, and the plan's notes, for rich's Console.

    ``available_bytes``, ``profile``: free memory and the machine that the plan is for, where they are known.
    """
    summary = summarise(plan)
    model, dims = plan.model, plan.max_dims()
    title = (
        f"{model.name}: {model.architecture}, {model.layers} layers, vocabulary {model.vocab:,}; "
        f"{dims['slots']} x {dims['context']:,} positions, steps of up to {dims['T']} tokens"
    )
    parts: list[RenderableType] = [Text(title), _group_table(summary)]
    if plan.timelines:
        parts.append(_speed_table(plan))
        parts.append(critical_lines(plan))
    parts.append(_memory_table(summary, available_bytes))
    if uses_gpus(plan):
        parts += [layer_table(plan), device_memory_table(plan, profile)]
    if plan.solution is not None:
        parts.append(Text(solution_line(plan, plan.solution)))
    parts.extend(Text(f"note: {note}") for note in plan.notes)
    return Group(*parts)


def plan_report_json(plan: Plan, available_bytes: int | None = None) -> str:
    """The same numbers as JSON: bytes, FLOPs of a whole step, microseconds, tokens/s."""
    summary = summarise(plan)
    model = plan.model
    document = {
        "schema": list(_SCHEMA),
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "layers": model.layers,
            "vocab": model.vocab,
        },
        "dims": plan.max_dims(),
        "groups": [_group_json(group) for group in summary.groups],
        "predictions": [
            {
                "phase": timeline.phase,
                "tokens": timeline.tokens,
                "total_us": timeline.total_us,
                "tokens_per_s": timeline.tokens_per_s,
                "low_us": timeline.low_us,
                "high_us": timeline.high_us,
                "busy_us": {lane.lane: lane.busy_us for lane in timeline.lanes},
                "critical_us": dict(timeline.critical),
            }
            for timeline in plan.timelines
        ],
        "memory": {
            "items": [{"what": item.what, "bytes": item.bytes} for item in summary.memory],
            "bytes": summary.memory_bytes,
            "available_bytes": available_bytes,
        },
        "mix": asdict(plan.mix) if plan.mix else None,
        "solution": asdict(plan.solution) if plan.solution else None,
        "layers": [{"layers": a, "dense": b, "experts": c} for a, b, c in layer_runs(plan)],
        "devices": _devices_json(plan),
        "notes": list(plan.notes),
    }
    return json.dumps(document, indent=2)


def _devices_json(plan: Plan) -> dict[str, dict[str, int]]:
    weights, states = device_bytes(plan)
    return {d: {"weight_bytes": weights[d], "kv_cache_bytes": states[d]} for d in sorted({*weights, *states})}


def _group_json(group: OpGroup) -> dict[str, Any]:
    return {
        "role": group.role,
        "devices": group.devices,
        "ops": group.ops,
        "weight_bytes": group.weight_bytes,
        "phases": [
            {
                "phase": phase.phase,
                "tokens": phase.tokens,
                "flops": phase.flops,
                "weight_bytes_read": phase.weight_bytes,
                "bytes_moved": phase.moved_bytes,
                "intensity": phase.intensity,
                "bound": phase.bound,
                "us": phase.us,
            }
            for phase in group.phases.values()
        ],
    }


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
