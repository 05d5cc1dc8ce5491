"""Values of programs that run side by side, and of those among them that take a branch or another turn of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.reference.ttir_operations import Array


@dataclass
class Launch:
    memory: Sequence[range]  # addresses that the kernel may touch
    grid: tuple[int, int, int]


class Frame:
    """Values by name of programs that run side by side. Those of ``outer`` are seen too, of the programs ``lanes``
    (numbers within it) alone."""

    def __init__(self, programs: int, outer: Frame | None = None, lanes: npt.NDArray[np.intp] | None = None) -> None:
        self.programs, self._outer, self._lanes = programs, outer, lanes
        self._values: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        value = self._values.get(name)
        if value is None:
            assert self._outer is not None, name
            value = self._values[name] = of_lanes(self._outer[name], self._lanes)
        return value

    def __setitem__(self, name: str, value: Array) -> None:
        self._values[name] = value

    def of(self, lanes: npt.NDArray[np.intp]) -> Frame:
        """Of some of the programs."""
        return Frame(len(lanes), self, lanes)


def of_lanes(value: Array, lanes: Any) -> Array:
    return value if value.shape[0] == 1 else value[lanes]


def merged(kept: Sequence[Array], lanes: npt.NDArray[np.intp], new: Sequence[Array], programs: int) -> list[Array]:
    """``kept``, if there is anything, with the rows ``lanes`` from ``new``."""
    if len(lanes) == programs:
        return list(new)
    both = []
    for old, value in zip(kept or [np.zeros((1,) * v.ndim, v.dtype) for v in new], new, strict=True):
        shape = np.broadcast_shapes(old.shape[1:], value.shape[1:])
        out = np.array(np.broadcast_to(old, (programs, *shape)))
        out[lanes] = value
        both.append(out)
    return both


def lanes_where(condition: Array, wanted: bool, programs: int) -> npt.NDArray[np.intp]:
    return np.nonzero(np.broadcast_to(condition == wanted, (programs,)))[0]


Step = Callable[[Frame, Launch], None]
