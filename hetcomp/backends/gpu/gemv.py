"""Launches of GEMVs: linears for a few exact rows, with the norm in front of them and what is added behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.gpu import low_rank
from hetcomp.backends.gpu.kernels import ONE, Constant, GridAxis, Launch, Operand, launch
from hetcomp.backends.gpu.low_rank import Added, rank_constant
from hetcomp.backends.gpu.tile_choices import BY_TABLE, TileChoices
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.backends.gpu.words import MORE_THAN_SCALES, ORDERED, PER_WORD, matrix_words, word_type
from hetcomp.ir.ops import Glu

GEMV_ROWS = 8
MAX_MATRICES = 4  # of one launch
MAX_ADDED = 2
_GEMV_STEPS = (256, 128, 64, 32, 16)
_MAX_PARTS = 16  # of a split GEMV: its reader loads them one after the other
_SPLIT_PROGRAMS = 256  # two for each multiprocessor of a large GPU
_FEW_PANELS = 512  # programs that fill no GPU: each then has more threads

Arguments = Mapping[str, tuple[str, Operand] | None]


@dataclass(frozen=True)
class GemvTurn:
    """Words of a column that a turn of a GEMV takes, and the warps that share them: a thread has two vectors of 16
    bytes of a panel, and fewer steps than threads (codegen_templates/gpu/gemv.py says why)."""

    steps: int
    warps: int


def gemv_turns(columns: int, weight_format: str, programs: int, rows: int = 1, panels: int = 1) -> tuple[GemvTurn, ...]:
    """Turns for a GEMV of ``programs`` programs, each of ``rows`` rows and ``panels`` panels: first the largest size
    that wastes the fewest steps, then those next to it. A thread has a sum for each of its weights and each row, and
    another before the scales: many rows want the registers of fewer threads."""
    needed = packing.padded_columns(columns, weight_format) // PER_WORD[weight_format]
    sizes = _GEMV_STEPS if programs <= _FEW_PANELS else _GEMV_STEPS[2:]
    most = _GEMV_STEPS[0 if rows * panels <= 4 else 1 if rows * panels <= 8 else 2]
    # With more than scales, two vectors of two panels do not fit into the registers of many threads: one each, of 256
    # (gate and up of one token's experts on an H100: 10.7 us in q4k, 12.8 in q6k, where 256 steps took 17.2 and 27.9).
    more = weight_format in MORE_THAN_SCALES and panels > 1 and programs <= _FEW_PANELS
    if more:
        most = min(most, _GEMV_STEPS[2])
    first = min((s for s in sizes if s <= most), key=lambda size: (-(-needed // size) * size, -size))
    # Two panels of many rows: one vector of each a thread.
    steps = (first, *(s for s in (first // 2, first * 2) if s in _GEMV_STEPS and s <= most))
    return tuple(GemvTurn(s, max(1, s * (2 if rows * panels > 8 or more else 1) // 16)) for s in steps)


@dataclass(frozen=True)
class Split:
    """A GEMV whose columns are summed in so many parts, each by programs of its own, and the turn of these."""

    parts: int
    turn: GemvTurn


def split_of(matrix_rows: int, columns: int, weight_format: str) -> Split | None:
    """How a GEMV of few panels fills more of a GPU: in equal parts of whole turns, as few turns as possible, then as
    many parts as possible. None if it has panels enough or cannot be split."""
    steps_needed = packing.padded_columns(columns, weight_format) // PER_WORD[weight_format]
    panels = -(-matrix_rows // packing.PANEL)
    able = [
        (steps_needed // (parts * steps), -parts, steps)
        for parts in range(2, _MAX_PARTS + 1)
        for steps in _GEMV_STEPS[1:-1]
        if steps_needed % (parts * steps) == 0 and panels * parts <= _SPLIT_PROGRAMS
    ]
    if not able:
        return None
    _, parts, steps = min(able)
    return Split(-parts, GemvTurn(steps, steps // 16))


@dataclass(frozen=True)
class Norm:
    """An rms_norm of whole rows that a GEMV does on the way: its weight, and its attributes."""

    weight: Operand
    eps: float
    weight_offset: float


@dataclass(frozen=True)
class Matrix:
    """One linear of a launch: weight, bias, result, rows of the matrix."""

    w: Operand
    bias: Operand | None
    y: Operand
    rows: int


def norm_argument(norm: Norm | None) -> Arguments:
    """The argument ``norm`` of a kernel."""
    return {"norm": floats(norm.weight if norm else None)}


def norm_constants(norm: Norm | None) -> dict[str, Constant]:
    """The constants that go with it."""
    return {"EPS": norm.eps, "WEIGHT_OFFSET": norm.weight_offset} if norm else {"EPS": 0.0, "WEIGHT_OFFSET": 0.0}


def floats(operand: Operand | None) -> tuple[str, Operand] | None:
    """An argument that is f32, or absent."""
    return None if operand is None else ("*fp32", operand)


def added_arguments(added: Sequence[Operand]) -> Arguments:
    """The arguments ``added`` and ``added_1`` of a kernel: at most two."""
    padded: list[Operand | None] = [*added, None, None]
    return {"added": floats(padded[0]), "added_1": floats(padded[1])}


def linear_gemv(
    stem: str,
    x: Operand,
    matrices: Sequence[Matrix],
    columns: int,
    weight_format: str,
    rows: int,
    *,
    heads: int = 1,
    head_gaps: tuple[int, int] = (0, 0),
    norm: Norm | None = None,
    added: Sequence[Operand] = (),
    normed: Operand | None = None,
    split: Split | None = None,
    tiles: TileChoices = BY_TABLE,
    pairs: Added | None = None,
    act_order: bool = False,
) -> Launch:
    """Products of x with one matrix (of ``heads`` heads) or up to four; all of them have a bias or none has.

    head_gaps: elements of x and of the result behind each head that are others' business. added: what is added to the
    result of the only matrix. normed: where the norm's own result is to be written. split: the result of the only
    matrix is sums of parts, f32[parts, rows, n]. pairs: what adapters add. act_order: columns of the matrices have
    orders of their own.
    """
    word = word_type(weight_format)
    stem = f"{stem}{ORDERED * act_order}"
    first, *others = matrices
    panels = [-(-m.rows // packing.PANEL) for m in matrices]
    if split:
        turn, choice = split.turn, None
    else:
        turns = gemv_turns(columns, weight_format, sum(panels) * heads, rows)
        turn, choice = tiles.pick(f"{stem} of {heads} heads, exactly {rows} rows", turns)
    parts = split.parts if split else 1
    arguments: dict[str, tuple[str, Operand] | None] = {
        "x": floats(x),
        **norm_argument(norm),
        "w": (word, first.w),
        "bias": floats(first.bias),
        **added_arguments(added),
        "y": floats(first.y),
    }
    sizes: dict[str, Constant] = {"K": columns, "N": first.rows}
    for i in range(1, MAX_MATRICES):
        other = others[i - 1] if i <= len(others) else None
        arguments |= {
            f"w_{i}": (word, other.w) if other else None,
            f"bias_{i}": floats(other.bias if other else None),
            f"y_{i}": floats(other.y if other else None),
        }
        sizes[f"N_{i}"] = other.rows if other else 0
    return launch(
        "gemv",
        "linear_gemv",
        f"{stem}_rows{rows}",
        (GridAxis(sum(panels)), GridAxis(heads), GridAxis(parts)),
        {**arguments, "normed": floats(normed), **low_rank.added_arguments(pairs)},
        {
            **sizes,
            "HEADS": heads,
            "X_GAP": head_gaps[0],
            "Y_GAP": head_gaps[1],
            "MATRIX": matrix_words(first.rows, columns, weight_format, packing.PANELS),
            **norm_constants(norm),
            "NORMED": power_of_two(-(-columns // sum(panels))),
            "FORMAT": weight_format,
            "ACT_ORDER": act_order,
            "PARTS": parts,
            **rank_constant(pairs),
            "ROWS": rows,
            "STEPS": turn.steps,
        },
        warps=turn.warps,
        tile=choice,
    )


def glu_gemv(
    x: Operand,
    gate: Matrix,
    up: Matrix,
    columns: int,
    weight_format: str,
    rows: int,
    glu: Glu,
    norm: Norm | None,
    tiles: TileChoices = BY_TABLE,
    pairs: Added | None = None,
) -> Launch:
    """``glu`` of two linears of x, written to ``gate.y``. pairs: what adapters add to both."""
    word = word_type(weight_format)
    panels = -(-gate.rows // packing.PANEL)
    stem = f"glu_{weight_format}_n{gate.rows}_k{columns}_rows{rows}"
    turn, choice = tiles.pick(stem, gemv_turns(columns, weight_format, panels, rows, 2))
    return launch(
        "gemv",
        "glu_gemv",
        stem,
        (GridAxis(panels), ONE, ONE),
        {
            "x": floats(x),
            **norm_argument(norm),
            "gate": (word, gate.w),
            "up": (word, up.w),
            "gate_bias": floats(gate.bias),
            "up_bias": floats(up.bias),
            "y": floats(gate.y),
            **low_rank.added_arguments(pairs, ("low_rank", "of_row", "pairs", "table", "table_1")),
        },
        {
            "K": columns,
            "N": gate.rows,
            **norm_constants(norm),
            "FUNCTION": glu.function,
            "ALPHA": glu.alpha,
            "LIMIT": glu.limit,
            "FORMAT": weight_format,
            **rank_constant(pairs),
            "ROWS": rows,
            "STEPS": turn.steps,
        },
        warps=turn.warps,
        tile=choice,
    )


def pairs_of_gemv(
    pairs: low_rank.Pairs | None,
    x: Operand,
    columns: int,
    rows: int,
    at: int,
    *,
    heads: int = 1,
    x_gap: int = 0,
    norm: Norm | None = None,
) -> tuple[tuple[Launch, ...], Added | None, int]:
    """In front of a GEMV of x for exactly ``rows`` rows: the launch that makes h of its weights' pairs, if there are
    any, in the workspace from ``at`` on; what the GEMV then adds; the end of the workspace."""
    if pairs is None:
        return (), None, at
    h = Operand("workspace", offset=at)
    weight, eps, offset = (norm.weight, norm.eps, norm.weight_offset) if norm else (None, 0.0, 0.0)
    made = low_rank.shrink(pairs, x, h, columns, heads=heads, x_gap=x_gap, norm=weight, eps=eps, weight_offset=offset)
    return (made,), Added(pairs, h), at + aligned(4 * len(pairs.tables) * rows * heads * pairs.rank)
