"""The plan as one HTML file that needs no network: roofline, memory by device, zoomable timeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from hetcomp.backends.program import WAITING
from hetcomp.cli.plan_figures import ClassPoint, DeviceMemory, Figures, Roof, Step
from hetcomp.cli.plan_placement import layer_runs, solution_line
from hetcomp.ir.deferral import whole_role
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan
from hetcomp.lane_trace import BARRIER, HAND_OVER

# What colours stand for, in memory bars and timelines alike; the template has a colour for each.
FAMILIES = ("experts", "attention", "dense", "router", "embedding", "KV cache", "transfer", "waiting", "other")

# Roles of measured steps in which nothing is computed (hetcomp/lane_trace.py).
_WAITING = (BARRIER, HAND_OVER, WAITING)


def plan_html(plan: Plan, figures: Figures, measured: Sequence[Step] = ()) -> str:
    """The report as HTML; ``measured``: steps of a real run, drawn below the predicted ones of their phase."""
    data = {
        "families": list(FAMILIES),
        "speeds": [_speed(plan, i) for i in range(len(plan.timelines))],
        "roofs": [_roof(r) for r in figures.roofs],
        "points": [_point(p, figures.steps) for p in figures.points],
        "memory": [_memory(m) for m in figures.memory],
        "steps": [_step(s) for s in figures.steps],
        "measured": [_step(s) for s in measured],
        "layers": [[run.layers, run.dense, run.experts] for run in layer_runs(plan)],
        "notes": list(plan.notes),
    }
    model, dims = plan.model, plan.max_dims()
    facts = [
        f"{model.architecture}, {model.layers} layers, vocabulary {model.vocab:,}",
        f"{KvPool.of(dims)}, steps of up to {dims['T']:,} tokens",
        f"on {figures.profile.name}: {figures.profile.cpu}",
    ]
    solution = solution_line(plan, plan.solution, figures.place_seconds) if plan.solution is not None else ""
    return _template().render(title=model.name, facts=facts, solution=solution, data=embedded_json(data))


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    path = resources.files("hetcomp.codegen_templates") / "report" / "plan.html.j2"
    return environment.from_string(path.read_text(encoding="utf-8"))


def embedded_json(data: object) -> str:
    """JSON that can stand in a script element whatever names it holds: no ``<``, ``>`` or ``&`` is left in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def family(role: str) -> str:
    """The member of FAMILIES that an op role belongs to."""
    if whole_role(role) == "moe.experts":
        return "experts"
    if role == "transfer":
        return "transfer"
    if role in _WAITING:
        return "waiting"
    if role in ("embed", "lm_head"):
        return "embedding"
    if role in ("moe.router", "moe.route"):
        return "router"
    if role.startswith("attn.") and not role.endswith("norm"):
        return "attention"
    return "dense" if role.startswith(("mlp.", "moe.shared", "ffn.")) else "other"


def _speed(plan: Plan, index: int) -> dict[str, Any]:
    timeline = plan.timelines[index]
    whole = max(timeline.total_us, 1e-9)
    return {
        "phase": timeline.phase,
        "tokens": timeline.tokens,
        "us": timeline.total_us,
        "rate": timeline.tokens_per_s,
        "low": timeline.tokens / timeline.high_us * 1e6 if timeline.high_us else None,
        "high": timeline.tokens / timeline.low_us * 1e6 if timeline.low_us else None,
        "lanes": [[lane.lane, lane.busy_us / whole] for lane in timeline.lanes],
        "critical": [[name, us / whole] for name, us in timeline.critical[:5]],
    }


def _roof(roof: Roof) -> dict[str, Any]:
    return {
        "device": roof.device,
        "name": roof.name,
        "format": roof.weight_format,
        "gflops": roof.gflops,
        "gbs": roof.gb_per_s,
    }


def _point(point: ClassPoint, steps: Sequence[Step]) -> dict[str, Any]:
    total = next((s.total_us for s in steps if s.phase.name == point.phase), 0.0)
    return {
        "device": point.device,
        "role": point.role,
        "phase": point.phase,
        "x": point.intensity,
        "y": point.gflops,
        "us": point.us,
        "share": point.us / total if total else 0.0,
    }


def _memory(memory: DeviceMemory) -> dict[str, Any]:
    parts = [[what, _part_family(what), size] for what, size in memory.parts]
    return {"device": memory.device, "name": memory.name, "limit": memory.limit, "bytes": memory.bytes, "parts": parts}


def _part_family(what: str) -> str:
    role = what.partition(",")[0]
    return role if role in FAMILIES else "other"


def _step(step: Step) -> dict[str, Any]:
    """Events by lane in columns: names are an index into a list, times rounded to nanoseconds."""
    names: dict[str, int] = {}
    lanes: dict[str, list[list[Any]]] = {}
    for event in sorted(step.events, key=lambda e: e.start_us):
        name = names.setdefault(event.name, len(names))
        row = [name, FAMILIES.index(family(event.role)), round(event.start_us, 3), round(event.us, 3)]
        lanes.setdefault(event.lane, []).append([*row, int(event.critical)])
    ordered = sorted(lanes, key=lambda lane: (lane.startswith("cpu"), lane))
    return {
        "phase": step.phase.name,
        "tokens": step.phase.tokens,
        "position": step.phase.position,
        "us": step.total_us,
        "names": list(names),
        "lanes": [{"lane": lane, "events": lanes[lane]} for lane in ordered],
    }
