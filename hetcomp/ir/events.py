"""What happened when in a simulated step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One task of a lane: ``name`` as people read it (``layer 3 moe.experts``), op ``role``, ``layer`` (None outside
    of layers), ``lane`` (``cpu:0``, ``gpu:0``, ``gpu:0 copy in``, ``gpu:0 copy out``, ``gpu:0 copy weights``),
    start and duration in microseconds, and whether it lies on the critical path."""

    name: str
    role: str
    layer: int | None
    lane: str
    start_us: float
    us: float
    critical: bool = False
