"""Placements that the user has decided: ``attn@0-3=gpu:0``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Op

_SYNTAX = re.compile(r"(?P<role>[\w.*-]+?)(?:@(?P<first>\d+)(?:-(?P<last>\d+))?)?=(?P<device>cpu|gpu(?::\d+)?)")


@dataclass(frozen=True)
class Pin:
    """Ops whose role is ``role`` or begins with ``role.`` (``*``: all), in layers ``first`` .. ``last`` (None: all, and
    outside of layers), belong on ``device`` (``cpu`` or ``gpu:<index>``)."""

    text: str
    role: str
    first: int | None
    last: int | None
    device: str

    def matches(self, op: Op, layer: int | None) -> bool:
        """Whether the pin speaks of this op."""
        role = op.role or op.kind
        if self.role != "*" and role != self.role and not role.startswith(f"{self.role}."):
            return False
        if self.first is None or self.last is None:
            return True
        return layer is not None and self.first <= layer <= self.last


def parse_pin(text: str) -> Pin:
    """Reads ``ROLE[@LAYER[-LAYER]]=DEVICE``. Raises HetcompError if it is not understood."""
    found = _SYNTAX.fullmatch(text.strip())
    if found is None:
        raise HetcompError(
            f"Pin '{text}' is not understood; write ROLE=DEVICE or ROLE@FIRST-LAST=DEVICE with a role of the plan "
            "(attn, moe.experts, lm_head, ..., or * for all) and cpu, gpu or gpu:N: attn@0-3=gpu:0."
        )
    first = int(found["first"]) if found["first"] else None
    last = int(found["last"]) if found["last"] else first
    if first is not None and last is not None and last < first:
        raise HetcompError(f"Pin '{text}' names the layers {first}-{last}; the first must not be above the last.")
    device = "gpu:0" if found["device"] == "gpu" else found["device"]
    return Pin(text.strip(), found["role"], first, last, device)


def pinned_device(pins: tuple[Pin, ...], op: Op, layer: int | None) -> str | None:
    """Where the pins want the op, None if they do not say; one that names a role goes before ``*``. Raises HetcompError
    if two contradict each other."""
    matching = [pin for pin in pins if pin.matches(op, layer)]
    matching = [pin for pin in matching if pin.role != "*"] or matching
    for pin in matching[1:]:
        if pin.device != matching[0].device:
            where = f"layer {layer}" if layer is not None else "the model's ends"
            raise HetcompError(
                f"The pins '{matching[0].text}' and '{pin.text}' contradict each other for {op.role or op.kind} in "
                f"{where}; leave one of them out."
            )
    return matching[0].device if matching else None


def cached_in_cpu_memory(pins: tuple[Pin, ...], op: Op, layer: int | None) -> str:
    """Where the experts of an expert cache live: ``cpu``; a pin of everything speaks of the rest. Raises HetcompError
    if a pin of theirs says otherwise."""
    for pin in pins:
        if pin.role != "*" and pin.matches(op, layer) and pin.device != "cpu":
            raise HetcompError(
                f"Pin '{pin.text}' and the wish for an expert cache contradict each other: all routed experts are in "
                "CPU memory then; leave one of them out."
            )
    return "cpu"
