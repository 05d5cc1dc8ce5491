"""Steps of a real run, as ``hetcomp trace --out`` wrote them, to stand beside the plan's predicted ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetcomp.cli.plan_figures import Step
from hetcomp.errors import HetcompError
from hetcomp.ir.events import Event
from hetcomp.ir.plan import Plan
from hetcomp.lane_trace import FORMAT
from hetcomp.passes.phases import Phase


def measured_steps(path: Path, plan: Plan) -> tuple[Step, ...]:
    """The decode step of median time, and the prompt's step of most tokens.

    Raises HetcompError naming the file if it cannot be read, is no trace of hetcomp's, or is of another model.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Trace {path} cannot be read: {error}.") from None
    except ValueError as error:
        raise HetcompError(f"Trace {path} is not valid JSON: {error}.") from None
    facts = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise HetcompError(f"{path} is no trace of lanes; write one with hetcomp trace MODEL.hetc --out FILE.")
    if facts.get("model") != plan.model.name:
        raise HetcompError(f"Trace {path} is of {facts.get('model')}, the plan of {plan.model.name}.")
    try:
        return _steps(document["traceEvents"])
    except (KeyError, TypeError, ValueError) as error:
        raise HetcompError(f"Trace {path} is damaged ({error}); write it again with hetcomp trace --out.") from None


def _steps(events: Sequence[dict[str, Any]]) -> tuple[Step, ...]:
    steps = [event for event in events if event.get("cat") == "step"]
    decode = sorted((s for s in steps if s["name"] == "decode"), key=lambda s: float(s["dur"]))
    prefill = [s for s in steps if s["name"] == "prefill"]
    chosen = decode[len(decode) // 2 : len(decode) // 2 + 1]
    chosen += [max(prefill, key=lambda s: int(s["args"]["tokens"]))] if prefill else []
    lanes = {e["tid"]: str(e["args"]["name"]) for e in events if e.get("name") == "thread_name"}
    timed = [e for e in events if e.get("ph") == "X" and e.get("cat") != "step"]
    return tuple(_step(step, timed, lanes) for step in chosen)


def _step(step: dict[str, Any], timed: Sequence[dict[str, Any]], lanes: dict[int, str]) -> Step:
    start, took = float(step["ts"]), float(step["dur"])
    mine = [e for e in timed if start <= float(e["ts"]) <= start + took]
    events = tuple(
        Event(
            str(e["name"]),
            str(e["cat"]),
            e["args"].get("layer"),
            lanes[e["tid"]],
            float(e["ts"]) - start,
            float(e["dur"]),
        )
        for e in mine
    )
    tokens, position = int(step["args"]["tokens"]), int(step["args"]["position"])
    sequences = tokens if step["name"] == "decode" else 1
    return Step(Phase(str(step["name"]), tokens, sequences, position), events)
