"""What lanes of the CPU and GPUs did when, in steps of a real run; as a file that Perfetto and chrome://tracing show.

A GPU has two lines: its kernels and hand-overs, and the experts that are copied to it.
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
HAND_OVER = "hand-over"  # what a GPU does that tells the CPU or another one something, or waits for it
COPY = "transfer"
_AT_BARRIER, _AT_END = -1, -2
_LANES, _STEPS = 1, 2  # processes of the file


@dataclass(frozen=True)
class GpuEvent:
    """What GPU number ``gpu`` of the plan's did from ``begin_ns`` to ``end_ns``: ``launches`` (nodes of its graph) one
    behind the other, of which the first is ``kernel`` for an op of ``role`` in ``layer`` (-1: none); or without a
    kernel a copy of ``bytes``, or a hand-over."""

    begin_ns: int
    end_ns: int
    gpu: int
    kernel: str
    role: str
    layer: int
    launches: int
    bytes: int

    def facts(self) -> dict[str, Any]:
        """What a file tells of it beside the op."""
        if self.kernel:
            return {"kernel": self.kernel, "launches": self.launches}
        return {"bytes": self.bytes} if self.bytes else {}


@dataclass(frozen=True)
class TracedStep:
    """``begin_ns`` and ``end_ns`` by the machine's clock; ``position``: behind the step's last token. ``events``:
    ``ns`` i64, ``thread``, ``call`` (of the plan) and ``timer`` i32, by thread and then by time: from ``ns`` on the
    thread worked for that timer (-1: waited at a barrier, -2: was done). ``gpu_events`` by the same clock."""

    decode: bool
    tokens: int
    position: int
    begin_ns: int
    end_ns: int
    events: NDArray[np.void]
    gpu_events: tuple[GpuEvent, ...] = ()


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
        bool(told.decode),
        told.n_tokens,
        told.position,
        told.begin_ns,
        told.end_ns,
        np.array(events, copy=True),
        tuple(_gpu_event(told.gpu_events[i]) for i in range(told.n_gpu_events)),
    )


def _gpu_event(told: Any) -> GpuEvent:  # noqa: ANN401 - a structure of ctypes
    kernel, role = told.kernel.decode(), told.role.decode()
    return GpuEvent(told.begin_ns, told.end_ns, told.gpu, kernel, role, told.layer, told.launches, told.bytes)


def step_events(step: TracedStep, plan: Plan, timers: Sequence[str]) -> list[Event]:
    """The step's events, times from its begin; ``timers``: the names of the plan's timers."""
    return _lane_events(step, plan, timers) + _gpu_events(step, plan)


def _lane_events(step: TracedStep, plan: Plan, timers: Sequence[str]) -> list[Event]:
    found: list[Event] = []
    for thread in np.unique(step.events["thread"]).tolist():
        mine = step.events[step.events["thread"] == thread].tolist()
        lane = f"cpu thread {thread}"
        for (ns, _, call, timer, _), (until, *_) in pairwise(mine):
            if timer == _AT_END or until == ns:
                continue
            role = BARRIER if timer == _AT_BARRIER else timers[timer]
            found.append(_event(role, plan.calls[call].layer, lane, ns - step.begin_ns, until - ns))
    return found


def _gpu_events(step: TracedStep, plan: Plan) -> list[Event]:
    gpus = on_gpu(plan)
    return [_on_gpu(event, step, gpus[event.gpu]) for event in step.gpu_events]


def _on_gpu(event: GpuEvent, step: TracedStep, gpu: str) -> Event:
    begin, took = event.begin_ns - step.begin_ns, event.end_ns - event.begin_ns
    if event.bytes:
        return _event(COPY, None, f"{gpu} copy weights", begin, took)
    if not event.kernel:
        return _event(HAND_OVER, None, gpu, begin, took)
    return _event(event.role or event.kernel, event.layer if event.layer >= 0 else None, gpu, begin, took)


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
        timed = [(event, dict[str, Any]()) for event in _lane_events(step, plan, timers)]
        timed += zip(_gpu_events(step, plan), (event.facts() for event in step.gpu_events), strict=True)
        for event, told in timed:
            lane = lanes.setdefault(event.lane, len(lanes))
            if event.layer is not None:
                told["layer"] = event.layer
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
