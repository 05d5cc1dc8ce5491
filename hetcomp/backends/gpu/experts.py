"""Launches of moe_experts: GEMV an expert for a few exact rows, else entries sorted by expert and GEMMs over them."""

from __future__ import annotations

from collections.abc import Sequence

from hetcomp.backends import packing
from hetcomp.backends.gpu import low_rank
from hetcomp.backends.gpu.expert_operands import Argument, ExpertOperands, number_of, pointer_to
from hetcomp.backends.gpu.gemv import (
    GEMV_ROWS,
    Norm,
    added_arguments,
    gemv_turns,
    norm_argument,
    norm_constants,
)
from hetcomp.backends.gpu.kernels import (
    ONE,
    ROWS,
    Constant,
    GpuCode,
    GpuRequest,
    GridAxis,
    Launch,
    Operand,
    launch,
)
from hetcomp.backends.gpu.linear import GemmTile, round_rows, rounded
from hetcomp.backends.gpu.low_rank import Added, rank_constant, slots_constant
from hetcomp.backends.gpu.ordered_entries import h_in_order, place_of_ordered, x_in_order
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.backends.gpu.words import MORE_THAN_SCALES, PER_WORD
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.types import TensorType

_SORT_ENTRIES = 4096  # entries, at most, that a program of the sort looks at in a turn
_COMBINE_COLUMNS = 1024
_ADDED = ("low_rank", "of_row", "pairs", "table")


def moe_experts(request: GpuRequest) -> GpuCode:
    """``moe_experts``."""
    if request.rows is not None and request.rows <= GEMV_ROWS:
        return _Experts(request).decode(request.rows)
    return _Experts(request).grouped(request)


def fused_experts(request: GpuRequest, rows: int, norm: Norm | None, added: Sequence[Operand]) -> GpuCode:
    """``moe_experts`` of the norm of its first input for exactly ``rows`` rows, at most GEMV_ROWS; ``added``, at most
    two, is added to the result."""
    return _Experts(request).decode(rows, norm, added)


def rounded_rows(request: GpuRequest) -> GpuCode:
    """The op's first input, f32, as bf16: what the products round it to."""
    assert isinstance(request.op.attrs, MoeExperts)
    return GpuCode((round_rows(request, request.op.attrs.hidden, Operand("output", 0)),))


def entries_type(attrs: MoeExperts, weight_format: str) -> TensorType:
    """Of the results of all choices, each times its weight."""
    return TensorType(number_of(weight_format), ("T", attrs.top_k, attrs.hidden))


def wave_of_experts(request: GpuRequest) -> GpuCode:
    """The results of the choices of some experts: with ``resident``, of those that are here; the output is of
    :func:`entries_type`, of which nothing else is written. The first input is what the products read."""
    return _Experts(request).wave(request)


def combined_experts(attrs: MoeExperts, weight_format: str) -> GpuCode:
    """The sums of such results, from inputs: those, ids, and the table of all experts that are here."""
    return GpuCode((_combine(attrs, (pointer_to(weight_format), Operand("input", 0)), ("*i32", Operand("input", 2))),))


class _Experts(ExpertOperands):
    """The op's launches."""

    def decode(self, rows: int, norm: Norm | None = None, added: Sequence[Operand] = ()) -> GpuCode:
        a = self.attrs
        h = ("*fp32", Operand("workspace"))
        size = aligned(4 * rows * a.top_k * a.intermediate)
        before, of_up, size = self._shrink(0, Operand("input", 0), rows, a.hidden, 1, size, norm)
        between, of_down, size = self._shrink(1, Operand("workspace"), rows, a.intermediate, a.top_k, size, None)
        matrices, constants = self.gate_up()
        pairs = -(-a.intermediate // packing.PANEL)
        # A program has two panels: twice the vectors a thread.
        panels = 2 if self.weight_format in MORE_THAN_SCALES else 1
        turns = gemv_turns(a.hidden, self.weight_format, pairs * a.top_k * rows, panels=panels)
        turn, choice = self.tiles.pick(f"{self.stem}, exactly {rows} rows, gate and up", turns)
        up = launch(
            "experts_decode",
            "experts_gate_up_gemv",
            f"{self.stem}_gate_up",
            (GridAxis(pairs), GridAxis(a.top_k), ROWS),
            {
                "x": ("*fp32", Operand("input", 0)),
                **norm_argument(norm),
                "ids": self.ids,
                "resident": self.resident,
                **matrices,
                "h": h,
                **low_rank.added_arguments(of_up, _ADDED),
            },
            {
                **constants,
                "ACT_ORDER": has_act_order(self.up_layout),
                **norm_constants(norm),
                "TOP_K": a.top_k,
                **self.glu(),
                **rank_constant(of_up),
                "STEPS": turn.steps,
            },
            warps=turn.warps,
            tile=choice,
        )
        matrices, constants = self.down()
        panels = -(-a.hidden // packing.PANEL)
        # A token's experts are one product, one after the other.
        columns = a.top_k * packing.padded_columns(a.intermediate, self.down_format)
        turns = gemv_turns(columns, self.down_format, panels * rows)
        turn, choice = self.tiles.pick(f"{self.stem}, exactly {rows} rows, down", turns)
        arguments = {"h": h, "ids": self.ids, "weights": self.weights, "resident": self.resident, **matrices}
        down = launch(
            "experts_decode",
            "experts_down_gemv",
            f"{self.stem}_down",
            (GridAxis(panels), ROWS, ONE),
            {
                **arguments,
                **added_arguments(added),
                "y": ("*fp32", Operand("output", 0)),
                **low_rank.added_arguments(of_down, _ADDED),
            },
            {
                **constants,
                "ACT_ORDER": has_act_order(self.down_layout),
                "TOP_K": a.top_k,
                **rank_constant(of_down),
                "STEPS": turn.steps,
            },
            warps=turn.warps,
            tile=choice,
        )
        return GpuCode((*before, up, *between, down), size)

    def _shrink(
        self, which: int, x: Operand, rows: int, columns: int, x_heads: int, at: int, norm: Norm | None
    ) -> tuple[tuple[Launch, ...], Added | None, int]:
        """As gemv.pairs_of_gemv, of gate and up (0) or down (1)."""
        if self.pairs is None:
            return (), None, at
        pairs, h, top_k = self.pairs.only(which), Operand("workspace", offset=at), self.attrs.top_k
        weight, eps, offset = (norm.weight, norm.eps, norm.weight_offset) if norm else (None, 0.0, 0.0)
        made = low_rank.shrink(
            pairs,
            x,
            h,
            columns,
            heads=top_k,
            x_heads=x_heads,
            norm=weight,
            eps=eps,
            weight_offset=offset,
            ids=self.ids,
            resident=self.resident,
        )
        return (made,), Added(pairs, h), at + aligned(4 * rows * top_k * pairs.rank)

    def grouped(self, request: GpuRequest) -> GpuCode:
        before: tuple[Launch, ...] = ()
        x: tuple[str, Operand] = ("*fp32", Operand("input", 0))
        size = number_of(self.weight_format).row_bytes(1) * request.max_rows() * self.attrs.top_k * self.attrs.hidden
        out, end = (pointer_to(self.weight_format), Operand("workspace")), aligned(size)
        if self.weight_format != "f32":
            before, x, end = rounded(request, self.attrs.hidden, end)
        launches, end = self._entries(request, x, out, end)
        return GpuCode((*before, *launches, _combine(self.attrs, out, self.resident)), end)

    def wave(self, request: GpuRequest) -> GpuCode:
        x = (pointer_to(self.weight_format), Operand("input", 0))
        return GpuCode(*self._entries(request, x, (pointer_to(self.weight_format), Operand("output", 0)), 0))

    def _entries(
        self, request: GpuRequest, x: tuple[str, Operand], out: tuple[str, Operand], at: int
    ) -> tuple[tuple[Launch, ...], int]:
        """Launches that write the results of the choices to ``out``, and the end of the workspace, which they use from
        ``at`` on."""
        a, rows = self.attrs, request.max_rows()
        entries = rows * a.top_k
        offsets, end = _regions(
            at, 4 * (self.here + 1), 4 * entries, number_of(self.weight_format).row_bytes(1) * entries * a.intermediate
        )
        kinds = ("*i32", "*i32", pointer_to(self.weight_format))
        regions = [(kind, Operand("workspace", offset=at)) for kind, at in zip(kinds, offsets, strict=True)]
        starts, order, h = regions
        up_x, end = place_of_ordered(self.up_layout, entries * a.hidden, end)
        down_h, end = place_of_ordered(self.down_layout, entries * a.intermediate, end)
        ends: list[Added | None] = []
        for which in range(2):
            pairs = self.pairs.only(which) if self.pairs else None
            ends.append(Added(pairs, Operand("workspace", offset=end)) if pairs else None)
            end += aligned(4 * entries * pairs.rank) if pairs else 0
        entry_places = starts, order
        up, down = self._products(rows, up_x or x, starts, order, h, down_h, out, ends[0], ends[1])
        before = self._shrink_entries(ends[0], x, a.hidden, *entry_places, rows, by_token=True)
        between = self._shrink_entries(ends[1], h, a.intermediate, *entry_places, rows, by_token=False)
        if up_x is not None:
            before = (*before, x_in_order(self, x, up_x, *entry_places))
        if down_h is not None:
            between = (*between, h_in_order(self, h, down_h, *entry_places))
        return (self._sort(starts, order, entries), *before, up, *between, down), end

    def _shrink_entries(
        self,
        added: Added | None,
        x: Argument,
        columns: int,
        starts: Argument,
        order: Argument,
        rows: int,
        *,
        by_token: bool,
    ) -> tuple[Launch, ...]:
        """Of x of the tokens, or of the entries in their order."""
        if added is None:
            return ()
        pairs, tile = added.pairs, low_rank.row_tile(-(-rows * self.attrs.top_k // self.attrs.experts))
        made = launch(
            "experts_prefill",
            "experts_shrink",
            f"experts_shrink_{pairs.numbers}_k{columns}_tile{tile}",
            (self._row_tiles(tile), ONE, ONE),
            {
                "x": x,
                "starts": starts,
                "order": order,
                "ids": self.ids,
                "of_row": pairs.of_row,
                **pairs.arguments(),
                "h": ("*fp32", added.h),
            },
            {
                "K": columns,
                "BY_TOKEN": by_token,
                **self._runs(),
                "TOP_K": self.attrs.top_k,
                "RANK": pairs.rank,
                "SLOTS": pairs.slots,
                "M_TILE": tile,
                "K_TILE": low_rank.tile_of_columns(columns, pairs.numbers),
            },
            stages=(3, 2),
        )
        return (made,)

    def _row_tiles(self, height: int) -> GridAxis:
        """Each expert's last tile may be part of one."""
        return GridAxis(tile=height, scale=self.attrs.top_k, extra=min(self.here, self.attrs.experts))

    def _runs(self) -> dict[str, Constant]:
        return {"EXPERTS": self.here, "EXPERTS_PADDED": power_of_two(self.here)}

    def _sort(self, starts: Argument, order: Argument, entries: int) -> Launch:
        turn = min(max(power_of_two(entries), 256), _SORT_ENTRIES)
        return launch(
            "experts_prefill",
            "experts_sort",
            f"experts_sort_{self.here}",
            (GridAxis(self.here), ONE, ONE),
            {
                "ids": self.ids,
                "resident": self.resident,
                "n_rows": ("*i32", Operand("step", name="rows")),
                "starts": starts,
                "order": order,
            },
            {"EXPERTS": self.here, "TOP_K": self.attrs.top_k, "ENTRIES": turn},
            warps=max(1, turn // 512),
        )

    def _tiles(self, rows: int) -> tuple[Sequence[GemmTile], Sequence[GemmTile]]:
        """Of gate and up (columns of both together are twice as many) and of down, as linear.py's: measured at 4, 32
        and 256 rows an expert. Tensor cores of an H100 multiply 64 rows at a time: fewer are worth it only where a tile
        has no more."""
        share = -(-rows * self.attrs.top_k // self.attrs.experts)
        if self.weight_format == "f32":
            height = 16 if share <= 16 else 64
            both = GemmTile(height, 32, 32, 4, (3, 2)), GemmTile(height, 32, 32, 4, (2, 1))
            return both, both
        up: Sequence[tuple[int, int, int, int]]  # rows, columns, warps, stages
        down: Sequence[tuple[int, int, int, int]]
        if share > 64:
            up = (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (64, 64, 4, 4)
            down = (128, 128, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3), (64, 128, 4, 3)
        elif share > 16:
            up = (64, 64, 4, 4), (64, 64, 8, 3), (64, 128, 4, 3), (32, 64, 4, 4)
            down = (64, 128, 4, 3), (64, 128, 8, 3), (64, 64, 4, 4), (32, 128, 4, 4)
        else:
            up = (16, 64, 4, 4), (16, 128, 8, 3), (16, 32, 4, 4), (16, 64, 4, 3)
            down = (16, 128, 4, 4), (16, 128, 8, 3), (16, 64, 4, 4), (16, 128, 4, 3)

        def of(tiles: Sequence[tuple[int, int, int, int]], weight_format: str) -> list[GemmTile]:
            steps = 64 // PER_WORD[weight_format]
            return [GemmTile(rows, columns, steps, warps, (deep, 2)) for rows, columns, warps, deep in tiles]

        return of(up, self.weight_format), of(down, self.down_format)

    def _products(
        self,
        rows: int,
        x: Argument,
        starts: Argument,
        order: Argument,
        h: Argument,
        down_h: Argument,
        out: Argument,
        of_up: Added | None,
        of_down: Added | None,
    ) -> tuple[Launch, Launch]:
        """Gate and up, which writes ``h``, and down, which reads it or ``down_h``: in another order."""
        a = self.attrs
        ups, downs = self._tiles(rows)
        key = f"{self.stem}, up to {rows} rows"
        tile, up_choice = self.tiles.pick(f"{key}, gate and up", ups)
        wide, down_choice = self.tiles.pick(f"{key}, down", downs)
        matrices, constants = self.gate_up()
        up = launch(
            "experts_prefill",
            "experts_gate_up_gemm",
            f"{self.stem}_gate_up_tile{tile.rows}",
            (self._row_tiles(tile.rows), GridAxis(-(-a.intermediate // tile.columns)), ONE),
            {"x": x, "starts": starts, "order": order, **matrices, "h": h, **self._added(of_up)},
            {
                **constants,
                **self._runs(),
                "TOP_K": a.top_k,
                **self.glu(),
                **rank_constant(of_up),
                **slots_constant(of_up),
                "BY_ENTRY": has_act_order(self.up_layout),
                **tile.constants(),
            },
            warps=tile.warps,
            stages=tile.stages,
            tile=up_choice,
        )
        matrices, constants = self.down()
        down = launch(
            "experts_prefill",
            "experts_down_gemm",
            f"{self.stem}_down_tile{wide.rows}",
            (self._row_tiles(wide.rows), GridAxis(-(-a.hidden // wide.columns)), ONE),
            {
                "h": down_h or h,
                "starts": starts,
                "order": order,
                "weights": self.weights,
                **matrices,
                "out": out,
                **self._added(of_down),
            },
            {
                **constants,
                **self._runs(),
                "TOP_K": a.top_k,
                **rank_constant(of_down),
                **slots_constant(of_down),
                **wide.constants(),
            },
            warps=wide.warps,
            stages=wide.stages,
            tile=down_choice,
        )
        return up, down

    def _added(self, added: Added | None) -> dict[str, Argument]:
        given = low_rank.added_arguments(added, _ADDED)
        names = ("low_rank", "of_row", "ids", "pairs", "table")
        return {name: given[name] if name != "ids" else self.ids if added else None for name in names}


def _combine(attrs: MoeExperts, out: Argument, resident: Argument) -> Launch:
    columns = min(power_of_two(attrs.hidden), _COMBINE_COLUMNS)
    return launch(
        "experts_prefill",
        "experts_combine",
        f"experts_combine_{attrs.hidden}",
        (ROWS, GridAxis(-(-attrs.hidden // columns)), ONE),
        {
            "out": out,
            "ids": ("*i32", Operand("input", 1)),
            "resident": resident,
            "n_rows": ("*i32", Operand("step", name="rows")),
            "y": ("*fp32", Operand("output", 0)),
        },
        {"HIDDEN": attrs.hidden, "TOP_K": attrs.top_k, "COLUMNS": columns},
    )


def _regions(start: int, *sizes: int) -> tuple[list[int], int]:
    """Offsets of regions one after the other from ``start`` on, multiples of 64, and their end."""
    offsets, end = [], start
    for size in sizes:
        offsets.append(end)
        end += aligned(size)
    return offsets, end
