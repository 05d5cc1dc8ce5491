"""What happens on one GPU in a step, in order: runs of ops, and the hand-overs between them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from hetcomp.backends.exchange import Exchange
from hetcomp.ir.flat_ops import FlatOp
from hetcomp.ir.hand_overs import HandOver
from hetcomp.ir.homes import memory_of
from hetcomp.ir.node_parts import NodePart, gpu_part
from hetcomp.ir.ops import Add, Transfer
from hetcomp.ir.plan import Op


@dataclass(frozen=True)
class Run:
    """Ops that are wholly on the GPU."""

    ops: tuple[Op, ...]


@dataclass(frozen=True)
class SomeExperts:
    """Of a moe_experts op what the GPU has: all the experts of ``part``."""

    op: Op
    part: NodePart


@dataclass(frozen=True)
class AskExperts:
    """Hands the input of the op's experts to the CPU."""

    op: Op
    hand_over: HandOver


@dataclass(frozen=True)
class AwaitExperts:
    """Waits for the sum of the CPU's experts and adds it to that of the GPU's, if it has ``some``; in steps of a prompt
    also to that of those that are streamed to the GPU, if any are. ``added``: an addition to that, done at once."""

    op: Op
    hand_over: HandOver
    some: bool
    added: Op | None = None


@dataclass(frozen=True)
class GiveValue:
    """A transfer to another memory."""

    op: Op
    hand_over: HandOver


@dataclass(frozen=True)
class TakeValue:
    """A transfer from another memory."""

    op: Op
    hand_over: HandOver


@dataclass(frozen=True)
class Result:
    """A transfer of a step's result: it is read when the step is over."""

    op: Op


Event = Run | SomeExperts | AskExperts | AwaitExperts | GiveValue | TakeValue | Result


def step_events(ops: tuple[FlatOp, ...], exchange: Exchange, gpu: str) -> tuple[Event, ...]:
    """The events of ``gpu``.

    The sum of the CPU's experts is awaited as late as possible, so that a shared expert runs meanwhile: before the
    first op that reads it, and before the next hand-over at the latest.
    """
    events: list[Event] = []
    open_sums: list[AwaitExperts] = []
    by_op = {(h.call, h.op): h for h in exchange.hand_overs}

    def run(op: Op) -> None:
        last = events[-1] if events else None
        if isinstance(last, Run):
            events[-1] = replace(last, ops=(*last.ops, op))
        else:
            events.append(Run((op,)))

    def close(op: Op | None) -> None:
        for awaited in list(open_sums):
            if op is None or awaited.op.outputs[0] in op.inputs:
                open_sums.remove(awaited)
                events.append(awaited)

    for flat in ops:
        op, hand_over = flat.op, by_op.get((flat.call, flat.id))
        if isinstance(op.attrs, Transfer):
            if gpu not in (op.attrs.source, op.attrs.target):
                continue
            close(None if hand_over is not None else op)
            if hand_over is None:
                events.append(Result(op))
            else:
                events.append((GiveValue if hand_over.giver == gpu else TakeValue)(op, hand_over))
        elif memory_of(flat.placement.device) == gpu:
            close(None if hand_over is not None else op)
            if hand_over is not None:
                events.append(AskExperts(op, hand_over))
                part = gpu_part(op, flat.placement)
                events.extend([SomeExperts(op, part)] if part else [])
                open_sums.append(AwaitExperts(op, hand_over, part is not None))
            else:
                run(op)
    close(None)
    return tuple(events)


def added_at_once(events: Sequence[Event], optional: Set[int]) -> tuple[Event, ...]:
    """The events with residual additions of the sums of hand-overs that are ``optional`` done where these are awaited,
    if nothing else reads the sum: a launch less a layer."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(last, AwaitExperts) and last.hand_over.flag in optional and isinstance(event, Run):
            (total,), first = last.op.outputs, event.ops[0]
            alone = sum(reads_of(e).count(total) for e in events) == 1
            if isinstance(first.attrs, Add) and total in first.inputs and alone:
                found[-1] = replace(last, added=first)
                found += [Run(event.ops[1:])] if event.ops[1:] else []
                continue
        found.append(event)
    return tuple(found)


def reads_of(event: Event) -> tuple[str, ...]:
    """Values that the event reads (of experts their input alone, of awaited ones what they are added to)."""
    if isinstance(event, Run):
        return tuple(name for op in event.ops for name in op.inputs)
    if isinstance(event, AwaitExperts):
        return () if event.added is None else tuple(n for n in event.added.inputs if n not in event.op.outputs)
    return event.op.inputs
