"""Which of its tiles a launch has: the tables' first choice, or the one that was the fastest where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """What decided a launch's tile. ``key``: the class of launches that have the same, ``candidates``: between how many
    there was a choice, ``chosen``: which it was; 0 is the table's."""

    key: str
    candidates: int
    chosen: int


@dataclass(frozen=True)
class TileChoices:
    """Numbers of candidates by key. ``others``: of keys that are not named; the last where there are fewer."""

    chosen: Mapping[str, int] = field(default_factory=dict)
    others: int = 0

    def pick(self, key: str, candidates: Sequence[T]) -> tuple[T, Tile]:
        """The class's candidate. ``candidates``: the table's first."""
        number = min(self.chosen.get(key, self.others), len(candidates) - 1)
        return candidates[number], Tile(key, len(candidates), number)


BY_TABLE = TileChoices()


@dataclass(frozen=True)
class MeasuredTile:
    """A class's choice, and the microseconds of its candidates (None: did not count)."""

    key: str
    chosen: int
    us: tuple[float | None, ...]


def choices_of(measured: Sequence[MeasuredTile]) -> TileChoices:
    """Of classes that were measured; the tables' of all others."""
    return TileChoices({m.key: m.chosen for m in measured if m.chosen})
