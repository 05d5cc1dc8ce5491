"""The graph of a step on one GPU: its rows, its nodes, and where their operands are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetcomp.backends.gpu.groups import GpuGroup
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.backends.gpu.weight_stream import Portion
from hetcomp.ir.annotations import WeightStream
from hetcomp.ir.plan import Value


@dataclass(frozen=True)
class Rows:
    """Rows of a graph: exactly ``count`` of them, logits of each; or up to ``count``, and logits of up to
    ``logit_rows``."""

    count: int
    exact: bool
    logit_rows: int

    def dims(self, dims: Mapping[str, int]) -> dict[str, int]:
        """The plan's bounds with those of the rows."""
        return {**dims, "T": self.count, "R": self.logit_rows}

    def streams(self, stream: WeightStream) -> bool:
        """Whether weights are streamed in such steps."""
        return not self.exact and self.count >= stream.tokens


@dataclass(frozen=True)
class Place:
    """Bytes from ``offset`` on of a buffer of the program."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True)
class Raise:
    """Raises the flag for the side that waits for it."""

    flag: int
    to: str


@dataclass(frozen=True)
class Await:
    """Waits for the flag that the other side raises."""

    flag: int
    source: str


@dataclass(frozen=True)
class StepGraph:
    """The nodes of a step, one after the other; ``kernels`` by name, ``arena_bytes`` of device memory. ``groups``: what
    the launches come from, ``values``: what these read and write, by id. ``adapted``: it adds the pairs of adapters.
    ``portions``: weights that are copied to the GPU meanwhile."""

    rows: Rows
    nodes: tuple[dict[str, Any], ...]
    kernels: Mapping[str, GpuKernel]
    arena_bytes: int
    groups: tuple[GpuGroup, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    adapted: bool = False
    portions: tuple[Portion, ...] = ()
