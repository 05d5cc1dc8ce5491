"""Memory for values that live for a while: lifetimes to offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetcomp.ir.annotations import ArenaSlot
from hetcomp.ir.node_parts import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A value needs ``bytes`` from ``first`` to ``last`` (epochs, calls or launches, inclusive)."""

    value: str
    bytes: int
    first: int
    last: int


def place_lifetimes(lifetimes: Sequence[Lifetime], base: int) -> tuple[tuple[ArenaSlot, ...], int]:
    """Offsets from ``base`` on such that values alive together never overlap; returns them and the end.

    Largest first, each at the lowest place that is free for its whole life (XLA's GlobalDecreasingSizeBestFit
    without the best-fit rule: a template has tens of values, and the largest decide).
    """
    placed: list[tuple[Lifetime, int]] = []
    for life in sorted(lifetimes, key=lambda it: (-it.bytes, it.first, it.value)):
        offset = base
        for other, at in sorted(placed, key=lambda it: it[1]):
            alive_together = other.first <= life.last and life.first <= other.last
            if alive_together and at < offset + life.bytes and offset < at + other.bytes:
                offset = _align(at + other.bytes)
        placed.append((life, offset))
    slots = tuple(
        ArenaSlot(life.value, at, life.bytes) for life, at in sorted(placed, key=lambda it: (it[1], it[0].value))
    )
    return slots, max((_align(s.offset + s.bytes) for s in slots), default=base)


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
