"""Launches of linear and head_linear: GEMV for a few exact rows, GEMM otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.gpu.gemv import GEMV_ROWS, Matrix, linear_gemv, pairs_of_gemv
from hetcomp.backends.gpu.kernels import (
    NUMBER_TYPES,
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
from hetcomp.backends.gpu.low_rank import Added, expand_rows, shrink_rows
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.backends.gpu.words import PER_WORD, matrix_words, word_type, words_before_order
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.ops import HeadLinear, Linear
from hetcomp.ir.types import DType

_Argument = tuple[str, Operand] | None
_FULL_GPU = 256  # programs: two for each multiprocessor of a large GPU
_MIN_TURNS = 4  # turns of k below which a part of it is not worth a program
_UNPACKED_ROWS = 1024  # from here on many row tiles would unpack the same weights
_UNPACKED_BYTES = 64 << 20
_COLUMNS = 1024  # of a row, a program of a launch that is memory alone
_UNPACK_COLUMNS, _UNPACK_STEPS = 64, 16


@dataclass(frozen=True)
class GemmTile:
    """A GEMM's tile: rows of activations, columns of the result, words of k; warps of a block; pipeline depths."""

    rows: int
    columns: int
    steps: int
    warps: int
    stages: tuple[int, int]

    def constants(self) -> dict[str, Constant]:
        """The kernel's constants."""
        return {"M_TILE": self.rows, "N_TILE": self.columns, "STEPS": self.steps}


def _tiles(weight_format: str, rows: int) -> tuple[GemmTile, ...]:
    """A linear's tiles: first the fastest of those measured on an H100 at 64, 512 and 4,096 rows
    (benchmarks/gpu_launches.py), then what was close. f32 numbers take twice the memory and three products each."""
    height = next((tile for tile in (16, 32, 64) if rows <= tile), 128)
    if weight_format == "f32":
        few = (
            GemmTile(height, 32, 32, 4, (3, 2)),
            GemmTile(height, 64, 32, 4, (3, 2)),
            GemmTile(height, 32, 32, 4, (2, 1)),
        )
        many = GemmTile(128, 64, 32, 8, (3, 2)), GemmTile(128, 64, 32, 4, (3, 2)), GemmTile(64, 64, 32, 4, (2, 2))
        return many if height == 128 else few
    steps = 64 // PER_WORD[weight_format]
    if height == 128:
        return (
            GemmTile(128, 64, steps, 4, (3, 2)),
            GemmTile(128, 64, steps, 8, (3, 2)),
            GemmTile(128, 128, steps, 8, (3, 2)),
            GemmTile(64, 64, steps, 4, (4, 2)),
        )
    return (
        GemmTile(height, 64, steps, 4, (4, 2)),
        GemmTile(height, 32, steps, 4, (4, 2)),
        GemmTile(height, 64, steps, 4, (3, 2)),
        GemmTile(height, 128, steps, 4, (3, 2)),
    )


def _unpacked_tiles(n: int) -> tuple[GemmTile, ...]:
    """Of products with weights that are bf16 already; ``steps`` are numbers. The first as in _tiles."""
    narrow = GemmTile(128, 128, 64, 8, (3, 2)), GemmTile(128, 128, 64, 8, (4, 2)), GemmTile(128, 128, 64, 4, (4, 2))
    wide = GemmTile(128, 256, 64, 8, (3, 2)), GemmTile(128, 256, 64, 8, (4, 2))
    return (*wide, *narrow) if n >= 1024 else narrow


def _parts(tile: GemmTile, programs: int, k: int, weight_format: str) -> int:
    """Parts of k, each a program's, so that there are enough programs."""
    turns = k // (tile.steps * PER_WORD[weight_format])
    parts = 1
    while programs * parts < _FULL_GPU and turns // (2 * parts) >= _MIN_TURNS:
        parts *= 2
    return parts


def n_rows(request: GpuRequest) -> tuple[str, Operand]:
    """The step's number of rows."""
    first = (request.outputs or request.inputs)[0].type.shape[0]
    return ("*i32", Operand("step", name="logit_row_count" if first == "R" else "rows"))


def rounded(request: GpuRequest, width: int, offset: int) -> tuple[tuple[Launch, ...], tuple[str, Operand], int]:
    """The op's first input as bf16, ``width`` elements a row: a launch that rounds it into the workspace from
    ``offset`` on if it is f32, its argument, and the end of the workspace."""
    if request.inputs[0].type.dtype is DType.BF16:
        return (), ("*bf16", Operand("input", 0)), offset
    made = round_rows(request, width, Operand("workspace", offset=offset))
    return (made,), ("*bf16", Operand("workspace", offset=offset)), offset + aligned(2 * request.max_rows() * width)


def round_rows(request: GpuRequest, width: int, y: Operand) -> Launch:
    """Rounds the op's first input, f32 of ``width`` elements a row, to bf16."""
    columns = min(power_of_two(width), _COLUMNS)
    return launch(
        "elementwise",
        "round_rows",
        f"round_rows_{width}",
        (ROWS, GridAxis(-(-width // columns)), ONE),
        {"x": ("*fp32", Operand("input", 0)), "n_rows": n_rows(request), "y": ("*bf16", y)},
        {"WIDTH": width, "COLUMNS": columns},
    )


def _activations(request: GpuRequest, width: int, offset: int) -> tuple[tuple[Launch, ...], tuple[str, Operand], int]:
    """As :func:`rounded`, with columns in the order that the weight's have."""
    weight = request.inputs[1]
    if not has_act_order(weight.type.layout):
        return rounded(request, width, offset)
    rows, weight_format = int(weight.type.shape[0]), str(weight.format)
    y, columns = ("*bf16", Operand("workspace", offset=offset)), min(power_of_two(width), _COLUMNS)
    made = launch(
        "elementwise",
        "rows_in_order",
        f"rows_in_order_{width}",
        (ROWS, GridAxis(-(-width // columns)), ONE),
        {
            "x": (NUMBER_TYPES[request.inputs[0].type.dtype], Operand("input", 0)),
            "order": (word_type(weight_format), Operand("input", 1)),
            "n_rows": n_rows(request),
            "y": y,
        },
        {
            "WIDTH": width,
            "WORDS": words_before_order(rows, width, weight_format, weight.type.layout),
            "COLUMNS": columns,
        },
    )
    return (made,), y, offset + aligned(2 * request.max_rows() * width)


def linear(request: GpuRequest) -> GpuCode:
    """``linear`` and ``head_linear``; the first input f32 or, unless there are at most GEMV_ROWS exact rows, bf16."""
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    if request.rows is not None and request.rows <= GEMV_ROWS:
        return _gemv(request, request.rows)
    heads = attrs.heads if isinstance(attrs, HeadLinear) else 1
    size = 2 * attrs.in_features * attrs.out_features
    wide = request.inputs[1].format != "f32"
    if wide and heads == 1 and request.max_rows() >= _UNPACKED_ROWS and size <= _UNPACKED_BYTES:
        return _with_pairs(request, _unpacked(request), heads)
    return _with_pairs(request, _packed(request, heads), heads)


def _with_pairs(request: GpuRequest, code: GpuCode, heads: int) -> GpuCode:
    """With what adapters add to the result, if they do."""
    attrs, pairs = request.op.attrs, request.pairs
    assert isinstance(attrs, (Linear, HeadLinear))
    if pairs is None:
        return code
    x = (NUMBER_TYPES[request.inputs[0].type.dtype], Operand("input", 0))
    h, rows = Operand("workspace", offset=code.workspace_bytes), request.max_rows()
    made = shrink_rows(pairs, x, h, attrs.in_features, heads, rows, n_rows(request))
    y = expand_rows(Added(pairs, h), Operand("output", 0), attrs.out_features, heads, rows, n_rows(request))
    size = code.workspace_bytes + aligned(4 * rows * heads * pairs.rank)
    return GpuCode((*code.launches, made, y), size)


def _stem(request: GpuRequest) -> str:
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    return f"{request.op.kind}_{request.inputs[1].format}_n{attrs.out_features}_k{attrs.in_features}"


def _bias(request: GpuRequest) -> Operand | None:
    attrs = request.op.attrs
    return Operand("input", 2) if isinstance(attrs, Linear) and attrs.bias else None


def _gemv(request: GpuRequest, rows: int) -> GpuCode:
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    heads = attrs.heads if isinstance(attrs, HeadLinear) else 1
    matrix = Matrix(Operand("input", 1), _bias(request), Operand("output", 0), attrs.out_features)
    k, weight_format = attrs.in_features, str(request.inputs[1].format)
    stem, x = _stem(request), Operand("input", 0)
    before, pairs, size = pairs_of_gemv(request.pairs, x, k, rows, 0, heads=heads)
    act_order = has_act_order(request.inputs[1].type.layout)
    made = linear_gemv(
        stem,
        x,
        (matrix,),
        k,
        weight_format,
        rows,
        heads=heads,
        tiles=request.tiles,
        pairs=pairs,
        act_order=act_order,
    )
    return GpuCode((*before, made), size)


def _packed(request: GpuRequest, heads: int) -> GpuCode:
    """Weights unpacked by every program that multiplies with them."""
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    n, k, weight_format = attrs.out_features, attrs.in_features, str(request.inputs[1].format)
    key = f"{_stem(request)} of {heads} heads, {'exactly' if request.rows else 'up to'} {request.max_rows()} rows"
    tile, choice = request.tiles.pick(key, _tiles(weight_format, request.max_rows()))
    row_tiles, column_tiles = -(-request.max_rows() // tile.rows), -(-n // tile.columns)
    parts = _parts(tile, row_tiles * column_tiles * heads, k, weight_format)
    before: tuple[Launch, ...] = ()
    x: tuple[str, Operand] = ("*fp32", Operand("input", 0))
    size = 0
    if weight_format != "f32":
        before, x, size = _activations(request, heads * k, 0)
    bias, y = _bias(request), ("*fp32", Operand("output", 0))
    its_bias = ("*fp32", bias) if bias else None
    sums = ("*fp32", Operand("workspace", offset=size)) if parts > 1 else y
    shape: dict[str, Constant] = {"N": n, "HEADS": heads, "PARTS": parts, "M_TILE": tile.rows}
    made = launch(
        "gemm",
        "linear_gemm",
        f"{_stem(request)}_tile{tile.rows}",
        (GridAxis(tile=tile.rows), GridAxis(column_tiles), GridAxis(heads * parts)),
        {
            "x": x,
            "w": (word_type(weight_format), Operand("input", 1)),
            "bias": its_bias if parts == 1 else None,
            "y": sums,
            "n_rows": n_rows(request),
        },
        {
            **shape,
            "K": k,
            "MATRIX": matrix_words(n, k, weight_format, packing.PANELS),
            "FORMAT": weight_format,
            **tile.constants(),
        },
        warps=tile.warps,
        stages=tile.stages,
        tile=choice,
    )
    if parts == 1:
        return GpuCode((*before, made), size)
    columns = min(power_of_two(n), _COLUMNS)
    join = launch(
        "gemm",
        "add_parts",
        f"{_stem(request)}_parts{parts}",
        (ROWS, GridAxis(-(-n // columns)), GridAxis(heads)),
        {"parts": sums, "bias": its_bias, "y": y, "n_rows": n_rows(request)},
        {**shape, "COLUMNS": columns},
        tile=choice,
    )
    return GpuCode((*before, made, join), size + aligned(4 * parts * heads * row_tiles * tile.rows * n))


def _unpacked(request: GpuRequest) -> GpuCode:
    """Weights unpacked once, as bf16, into the workspace."""
    attrs = request.op.attrs
    assert isinstance(attrs, Linear)
    n, k, weight_format = attrs.out_features, attrs.in_features, str(request.inputs[1].format)
    before, x, size = _activations(request, k, 0)
    w, bias = ("*bf16", Operand("workspace", offset=size)), _bias(request)
    per_program = _UNPACK_STEPS * PER_WORD[weight_format]
    unpack = launch(
        "gemm",
        "unpack",
        f"unpack_{weight_format}_n{n}_k{k}",
        (GridAxis(-(-k // per_program)), GridAxis(-(-n // _UNPACK_COLUMNS)), ONE),
        {"w": (word_type(weight_format), Operand("input", 1)), "out": w},
        {"K": k, "N": n, "FORMAT": weight_format, "COLUMNS": _UNPACK_COLUMNS, "STEPS": _UNPACK_STEPS},
    )
    key = f"unpacked_n{n}_k{k}, up to {request.max_rows()} rows"
    tile, choice = request.tiles.pick(key, _unpacked_tiles(n))
    made = launch(
        "gemm",
        "unpacked_gemm",
        f"{_stem(request)}_unpacked",
        (GridAxis(tile=tile.rows), GridAxis(-(-n // tile.columns)), ONE),
        {
            "x": x,
            "w": w,
            "bias": ("*fp32", bias) if bias else None,
            "y": ("*fp32", Operand("output", 0)),
            "n_rows": n_rows(request),
        },
        {"K": k, "N": n, "M_TILE": tile.rows, "N_TILE": tile.columns, "K_TILE": tile.steps},
        warps=tile.warps,
        stages=tile.stages,
        tile=choice,
    )
    return GpuCode((*before, unpack, made), size + aligned(2 * n * k))
