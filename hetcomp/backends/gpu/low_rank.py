"""Launches and arguments of what LoRA adapters add to products on a GPU: codegen_templates/gpu/low_rank.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hetcomp.backends.gpu.kernels import ONE, ROWS, Constant, GridAxis, Launch, Operand, launch
from hetcomp.backends.gpu.tiles import power_of_two

PAIRS, PAIR_TABLE = "pairs", "pair_table"
# By the first dimension of an op's result: what a step says of its rows' adapters.
OF_ROW = {"T": "adapters", "R": "logit_adapters"}
_TABLES = ("table", "table_1", "table_2", "table_3")
ADDED = ("low_rank", "of_row", "pairs", *_TABLES)  # what a GEMV that adds pairs takes
_COLUMNS = 1024  # of a row of a, that a block takes at a time
_LEAST_RANK = 16  # of a tensor core's product

Arguments = dict[str, tuple[str, Operand] | None]


@dataclass(frozen=True)
class Pairs:
    """The pairs of the weights of one launch. ``tables``: where each weight's begins in the buffer PAIR_TABLE.
    ``rank``: a power of two, the bound of ranks; ``slots`` of the table; ``numbers``: Triton type of a and b.
    ``rows``: the first dimension of the result."""

    tables: tuple[int, ...]
    rank: int
    slots: int
    numbers: str
    rows: str

    def only(self, which: int) -> Pairs:
        """Those of one of the weights."""
        return replace(self, tables=(self.tables[which],))

    @property
    def of_row(self) -> tuple[str, Operand]:
        """The argument of that name."""
        return "*i32", Operand("step", name=OF_ROW[self.rows])

    def arguments(self) -> Arguments:
        """Those called ``pairs`` and ``table``, ..., of as many weights as a launch may have."""
        found: Arguments = {"pairs": (f"*{self.numbers}", Operand("adapters", name=PAIRS))}
        for name, offset in zip(_TABLES, self.tables, strict=False):
            found[name] = "*i64", Operand("adapters", name=PAIR_TABLE, offset=offset)
        return found


@dataclass(frozen=True)
class Added:
    """Pairs whose h a launch finds at ``h``."""

    pairs: Pairs
    h: Operand

    def arguments(self) -> Arguments:
        """``low_rank``, ``of_row``, ``pairs`` and the tables."""
        return {"low_rank": ("*fp32", self.h), "of_row": self.pairs.of_row, **self.pairs.arguments()}


def added_arguments(
    added: Added | None, names: tuple[str, ...] = ("low_rank", "of_row", "pairs", *_TABLES)
) -> Arguments:
    """The arguments of a kernel that may add pairs, ``names`` in its order."""
    given = added.arguments() if added else {}
    return {name: given.get(name) for name in names}


def rank_constant(added: Added | None) -> dict[str, Constant]:
    """The constant that goes with them."""
    return {"RANK": added.pairs.rank if added else 0}


def slots_constant(added: Added | None) -> dict[str, Constant]:
    """Of kernels that look for every slot's rows."""
    return {"SLOTS": added.pairs.slots if added else 0}


def padded_rank(rank: int) -> int:
    """The constant RANK of kernels for pairs of at most ``rank``."""
    return max(_LEAST_RANK, power_of_two(rank))


def shrink(
    pairs: Pairs,
    x: Operand,
    h: Operand,
    columns: int,
    *,
    heads: int = 1,
    x_heads: int | None = None,
    x_gap: int = 0,
    norm: Operand | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    ids: tuple[str, Operand] | None = None,
    resident: tuple[str, Operand] | None = None,
) -> Launch:
    """h f32[weights, rows, heads, rank] of a few exact rows of x f32[rows, x_heads, columns]."""
    block = min(power_of_two(columns), _COLUMNS)
    count = len(pairs.tables)
    given = pairs.arguments()
    arguments: Arguments = {
        "x": ("*fp32", x),
        "norm": ("*fp32", norm) if norm else None,
        "of_row": pairs.of_row,
        "ids": ids,
        "resident": resident,
        **{name: given.get(name) for name in ("pairs", *_TABLES)},
        "h": ("*fp32", h),
    }
    return launch(
        "low_rank",
        "shrink_gemv",
        f"shrink_{pairs.numbers}_k{columns}_of{count}{f'x{heads}' if heads > 1 else ''}",
        (GridAxis(pairs.rank * count), GridAxis(heads), ROWS),
        arguments,
        {
            "K": columns,
            "HEADS": heads,
            "X_HEADS": heads if x_heads is None else x_heads,
            "X_GAP": x_gap,
            "EPS": eps,
            "WEIGHT_OFFSET": weight_offset,
            "RANK": pairs.rank,
            "COLUMNS": block,
        },
        warps=4 if block >= 512 else 1,
    )


def row_tile(rows: int) -> int:
    """Rows of a tile of the launches for many."""
    return next((tile for tile in (16, 32) if rows <= tile), 64)


def tile_of_columns(columns: int, numbers: str) -> int:
    """Columns of a and x that a turn takes; f32 numbers are multiplied in three products, which takes registers."""
    return max(16, min(32 if numbers == "fp32" else 64, power_of_two(columns)))


def shrink_rows(
    pairs: Pairs, x: tuple[str, Operand], h: Operand, columns: int, heads: int, rows: int, n_rows: tuple[str, Operand]
) -> Launch:
    """h f32[rows, heads, rank] of as many rows of x[rows, heads, columns], f32 or bf16, as the step has."""
    tile = row_tile(rows)
    return launch(
        "low_rank",
        "shrink_gemm",
        f"shrink_{pairs.numbers}_k{columns}x{heads}_tile{tile}",
        (GridAxis(tile=tile), GridAxis(heads), ONE),
        {"x": x, "of_row": pairs.of_row, **pairs.arguments(), "h": ("*fp32", h), "n_rows": n_rows},
        {
            "K": columns,
            "HEADS": heads,
            "RANK": pairs.rank,
            "SLOTS": pairs.slots,
            "M_TILE": tile,
            "K_TILE": tile_of_columns(columns, pairs.numbers),
        },
        stages=(3, 2),
    )


def expand_rows(added: Added, y: Operand, columns: int, heads: int, rows: int, n_rows: tuple[str, Operand]) -> Launch:
    """Adds to y f32[rows, heads, columns]."""
    tile, width = row_tile(rows), max(16, min(64, power_of_two(columns)))
    return launch(
        "low_rank",
        "expand_gemm",
        f"expand_{added.pairs.numbers}_n{columns}x{heads}_tile{tile}",
        (GridAxis(tile=tile), GridAxis(-(-columns // width)), GridAxis(heads)),
        {
            "h": ("*fp32", added.h),
            "of_row": added.pairs.of_row,
            **added.pairs.arguments(),
            "y": ("*fp32", y),
            "n_rows": n_rows,
        },
        {
            "N": columns,
            "HEADS": heads,
            "RANK": added.pairs.rank,
            "SLOTS": added.pairs.slots,
            "M_TILE": tile,
            "N_TILE": width,
        },
    )


@dataclass(frozen=True)
class PairTables:
    """All weights of a GPU that adapters may change: ``offsets`` in the table and ``numbers`` (see Pairs) by id.
    ``nothing``: where a table says that no adapter changes the weight."""

    offsets: Mapping[str, int]
    numbers: Mapping[str, str]
    nothing: int
    rank: int
    slots: int

    def of(self, rows: int | str, *weights: str) -> Pairs | None:
        """The pairs of a launch's weights, all of them f32 or none; None: adapters leave them alone. ``rows``: the
        first dimension of the result."""
        known = next((w for w in weights if w in self.offsets), None)
        if known is None:
            return None
        tables = tuple(self.offsets.get(weight, self.nothing) for weight in weights)
        return Pairs(tables, padded_rank(self.rank), self.slots, self.numbers[known], str(rows))
