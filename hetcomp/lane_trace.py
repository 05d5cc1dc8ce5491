"""What the CPU's lanes did when, in steps of a real run; as a file that Perfetto and chrome://tracing show.

Beside a GPU its line has the times in which lanes waited for it, at hand-overs and at the end of the step: what its
kernels do within a graph has no clock on the host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetcomp.artifact.staged_file import write_whole
from hetcomp.backends.program import WAITING
from hetcomp.errors import HetcompError
from hetcomp.ir.events import Event
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import plan_hash
from hetcomp.runtime import Runtime
from hetcomp.runtime_abi import LaneEventStruct, LaneTraceCallback
from hetcomp.step_callbacks import collected

FORMAT = "hetcomp lane trace 1"
BARRIER = "barrier"  # what a thread does that waits for the others
_AT_BARRIER, _AT_END = -1, -2
_LANES, _STEPS = 1, 2  # processes of the file


@dataclass(frozen=True)
class TracedStep:
    """``begin_ns`` and ``end_ns`` by the machine's clock; ``position``: behind the step's last token. ``events``:
    ``ns`` i64, ``thread``, ``call`` (of the plan) and ``timer`` i32, by thread and then by time: from ``ns`` on the
    thread worked for that timer (-1: waited at a barrier, -2: was done)."""

    decode: bool
    tokens: int
    position: int
    begin_ns: int
    end_ns: int
    events: NDArray[np.void]


@contextmanager
def traced_steps(runtime: Runtime) -> Iterator[list[TracedStep]]:
    """Within, every step of ``runtime`` is added to the list."""
    with collected(runtime.set_lane_trace_callback, LaneTraceCallback, _step) as steps:
        yield steps


def _step(told: Any) -> TracedStep:  # noqa: ANN401 - a structure of ctypes
    if told.dropped:
        raise HetcompError(
            f"A step had {told.dropped} events more than a trace has room for; report this model, which has more "
            "layers than any that is known."
        )
    events = np.ctypeslib.as_array(told.events, (told.n_events,)) if told.n_events else np.zeros(0, LaneEventStruct)
    return TracedStep(
        bool(told.decode), told.n_tokens, told.position, told.begin_ns, told.end_ns, np.array(events, copy=True)
    )


def step_events(step: TracedStep, plan: Plan, timers: Sequence[str]) -> list[Event]:
    """The step's events, times from its begin; ``timers``: the names of the plan's timers."""
    gpus = on_gpu(plan)
    found: list[Event] = []
    for thread in np.unique(step.events["thread"]).tolist():
        mine = step.events[step.events["thread"] == thread].tolist()
        lane = f"cpu thread {thread}"
        for (ns, _, call, timer, _), (until, *_) in pairwise(mine):
            if timer == _AT_END or until == ns:
                continue
            role = BARRIER if timer == _AT_BARRIER else timers[timer]
            found.append(_event(role, plan.calls[call].layer, lane, ns - step.begin_ns, until - ns))
            if thread == 0 and role == WAITING and gpus:
                found.append(_event("waited for", plan.calls[call].layer, gpus[0], ns - step.begin_ns, until - ns))
        if thread == 0 and gpus:
            done = mine[-1][0]
            found.append(_event("end of the step", None, gpus[0], done - step.begin_ns, step.end_ns - done))
    return found


def _event(role: str, layer: int | None, lane: str, ns: int, took: int) -> Event:
    name = role if layer is None else f"layer {layer} {role}"
    return Event(name, role, layer, lane, ns / 1e3, took / 1e3)


def write_trace(path: Path, steps: Sequence[TracedStep], plan: Plan, timers: Sequence[str]) -> None:
    """Writes the steps in the JSON of Chrome's trace events: lanes in one process, steps in another.

    Raises HetcompError if there are none, or the file cannot be written.
    """
    if not steps:
        raise HetcompError("There is no step to trace; give a prompt.")
    origin = steps[0].begin_ns
    lanes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for step in steps:
        start = (step.begin_ns - origin) / 1e3
        arguments = {"tokens": step.tokens, "position": step.position}
        took = (step.end_ns - step.begin_ns) / 1e3
        events.append(_complete(_STEPS, 0, "decode" if step.decode else "prefill", "step", start, took, arguments))
        for event in step_events(step, plan, timers):
            lane = lanes.setdefault(event.lane, len(lanes))
            told = {"layer": event.layer} if event.layer is not None else {}
            events.append(_complete(_LANES, lane, event.name, event.role, start + event.start_us, event.us, told))
    names = [_name("process_name", _LANES, 0, "lanes"), _name("process_name", _STEPS, 0, "steps")]
    names += [_name("thread_name", _LANES, number, lane) for lane, number in lanes.items()]
    facts = {"format": FORMAT, "model": plan.model.name, "plan_sha256": plan_hash(plan)}
    document = {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": [*names, *events]}
    write_whole(path, json.dumps(document, separators=(",", ":")).encode())


def _complete(
    process: int, thread: int, name: str, category: str, start: float, took: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": round(start, 3), "dur": round(took, 3)}
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "cat": category, **times, "args": arguments}


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}
