"""What the GPU backend is asked and what it answers: an op becomes launches of ahead-of-time kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hetcomp.backends.gpu.tile_choices import BY_TABLE, Tile, TileChoices
from hetcomp.ir.plan import Op, Value
from hetcomp.ir.types import DType

if TYPE_CHECKING:
    from hetcomp.backends.gpu.low_rank import Pairs

# Triton pointers to what activations are kept as.
NUMBER_TYPES = {DType.F32: "*fp32", DType.BF16: "*bf16"}
Constant = int | float | bool | str | None


@dataclass(frozen=True)
class GpuRequest:
    """One op to generate launches for. ``inputs``/``outputs`` are the op's values in order, weights with their format
    chosen; ``dims`` are upper bounds of the symbolic dimensions, and of ops on a KV cache ``cache_block``: bytes of a
    block of it (hetcomp.ir.kv_pool), all states together.

    ``rows``: the op always has exactly so many rows (a decode step of fixed batch); None: up to its bound, and kernels
    read the number from memory (prefill). ``resident``: of ``moe_experts``, only some experts' weights are here;
    inputs[3] and what follows then have these experts alone, and a further last input i32[experts] says where each
    expert lies among them, -1 for those elsewhere, which add nothing to the result. ``tiles``: of the launches.
    ``pairs``: what adapters add to products with the op's weights; None: nothing. ``f32``: all weights and caches of
    the step are, so that nothing may be rounded.
    """

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    dims: Mapping[str, int] = field(default_factory=dict)
    rows: int | None = None
    resident: bool = False
    tiles: TileChoices = BY_TABLE
    pairs: Pairs | None = None
    f32: bool = False

    def max_rows(self) -> int:
        """``rows``, or the upper bound of the op's rows (kv_append has no output; its input's)."""
        first = (self.outputs or self.inputs)[0].type.shape[0]
        if self.rows is not None:
            return self.rows
        return first if isinstance(first, int) else self.dims[first]

    def block_elements(self, cache: DType) -> int:
        """Elements between two blocks of a KV cache of that type."""
        return self.dims["cache_block"] // cache.row_bytes(1)


@dataclass(frozen=True)
class Operand:
    """What an argument of a launch is.

    ``input``/``output``: the op's operand number ``index``. ``workspace``: the op's scratch memory from ``offset`` on.
    ``step``: an array that each step brings in device memory, by ``name``: ``positions``, ``slots``, ``logit_rows`` i32
    of a row each, ``adapters`` and ``logit_adapters`` likewise (the slot of a row's adapter, -1: none), ``rows`` i32[1]
    (tokens), ``logit_row_count`` i32[1]. ``slot_blocks``: the number i32 of blocks that
    a slot of the KV cache has. ``adapters``: ``pairs`` or ``pair_table`` by ``name`` (hetcomp.backends.gpu.low_rank).
    ``raises``, ``awaits``: the flag number ``index`` to and from the side ``name``, i32[1]. Pointers are multiples of
    16 bytes.
    """

    source: Literal["input", "output", "workspace", "step", "slot_blocks", "adapters", "raises", "awaits"]
    index: int = 0
    name: str = ""
    offset: int = 0


@dataclass(frozen=True)
class GridAxis:
    """Programs along one axis of a grid: fixed * (ceil(rows * scale / tile) + extra); ``tile`` 0: fixed."""

    fixed: int = 1
    tile: int = 0
    scale: int = 1
    extra: int = 0

    def programs(self, rows: int) -> int:
        """Programs for a step of so many rows."""
        if self.tile == 0:
            return self.fixed
        return self.fixed * (-(-rows * self.scale // self.tile) + self.extra)


Grid = tuple[GridAxis, GridAxis, GridAxis]
ONE = GridAxis()
ROWS = GridAxis(tile=1)


@dataclass(frozen=True)
class GpuKernel:
    """One Triton function of ``codegen_templates/gpu`` with its constants.

    ``arguments``: name and Triton type (``*fp32``, ``i32``) of what a launch passes, in order. ``shallow``: constants
    that are others where a block may have less than 160 KB of shared memory; STAGES among them is of how many turns of
    its loop a kernel holds the loads at once. A constant DESCRIPTORS is False on architectures without tensor copies.
    None of these, nor ``warps``, moves the grid.
    """

    stem: str
    module: str
    function: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int = 4
    shallow: tuple[tuple[str, Constant], ...] = ()

    @property
    def name(self) -> str:
        """Stem and a hash of everything else: equal names are equal kernels."""
        return f"{self.stem}_{hashlib.sha256(repr(self).encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid as a function of the step's rows, and its arguments in order. ``tile``: what decided its tile,
    where there was a choice."""

    kernel: GpuKernel
    grid: Grid
    operands: tuple[Operand, ...]
    tile: Tile | None = None


@dataclass(frozen=True)
class GpuCode:
    """An op as launches, one after the other, and the scratch memory they share (bytes; a multiple of 64)."""

    launches: tuple[Launch, ...]
    workspace_bytes: int = 0


def launch(
    module: str,
    function: str,
    stem: str,
    grid: Grid,
    arguments: Mapping[str, tuple[str, Operand] | None],
    constants: Mapping[str, Constant],
    *,
    warps: int = 4,
    stages: tuple[int, int] | None = None,
    shallow: Mapping[str, Constant] | None = None,
    tile: Tile | None = None,
) -> Launch:
    """A launch whose ``arguments`` name their Triton type and operand. An argument that is None is absent: the kernel
    is compiled without it. ``stages``: the constant STAGES, and what it is among ``shallow``."""
    given = {name: value for name, value in arguments.items() if value is not None}
    absent = {name: None for name, value in arguments.items() if value is None}
    deep, other = ({"STAGES": stages[0]}, {"STAGES": stages[1]}) if stages else ({}, {})
    kernel = GpuKernel(
        stem,
        module,
        function,
        tuple((name, kind) for name, (kind, _) in given.items()),
        tuple({**absent, **constants, **deep}.items()),
        warps,
        tuple({**other, **(shallow or {})}.items()),
    )
    return Launch(kernel, grid, tuple(operand for _, operand in given.values()), tile)
