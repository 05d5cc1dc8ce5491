"""Launches of causal_conv and gated_delta: row by row for a few exact rows, chunks of rows otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.gpu.attention import DECODE_ROWS
from hetcomp.backends.gpu.kernels import (
    ONE,
    Constant,
    GpuCode,
    GpuRequest,
    GridAxis,
    Launch,
    Operand,
    launch,
)
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.ir.ops import CausalConv, GatedDelta

MAX_KEY_DIM = 128  # of a head: a chunk's queries and keys of 256 leave their registers by kilobytes
CHUNK = 64  # rows, as in codegen_templates/gpu/gated_delta.py
# Of the rows of a step with several slots in a graph of many rows: programs look for rows of slots in one each.
_ROW_PARTS = 16


@dataclass(frozen=True)
class ColumnTile:
    """Columns of the values that a program takes, its warps, and pipeline depths if it has any."""

    columns: int
    warps: int
    stages: tuple[int, int] | None = None


@dataclass(frozen=True)
class ConvTile:
    """Rows and channels that a program takes (of exact rows: all), and its warps."""

    rows: int
    channels: int
    warps: int


# First the fastest on an H200 at Qwen3-Next's shape, then what was close (benchmarks/gpu_linear_attention.py).
_ROW_TILES = (ColumnTile(16, 2), ColumnTile(32, 4), ColumnTile(16, 4), ColumnTile(8, 1))
_BATCH_TILES = (ColumnTile(32, 4), ColumnTile(64, 4))
# 64 rows are the tensor cores' of four warps: more compute the same.
_CHUNK_TILES = (ColumnTile(128, 4), ColumnTile(64, 4), ColumnTile(32, 4))
_SCAN_TILES = (ColumnTile(32, 4, (3, 1)), ColumnTile(16, 4, (3, 1)), ColumnTile(64, 4, (3, 1)))
_EXACT_CONV_TILES = (ConvTile(0, 64, 2), ConvTile(0, 128, 4), ConvTile(0, 32, 1), ConvTile(0, 64, 4))
_CONV_TILES = (ConvTile(16, 128, 4), ConvTile(32, 128, 4), ConvTile(8, 256, 4))
_STATE_CHANNELS = 256  # of a program that leaves the state of a convolution


def causal_conv(request: GpuRequest) -> GpuCode:
    """``causal_conv``."""
    a = request.op.attrs
    assert isinstance(a, CausalConv)
    exact = request.rows is not None and request.rows <= DECODE_ROWS
    stem = f"causal_conv_{a.channels}x{a.width}"
    key = f"{stem}, {'exactly' if exact else 'up to'} {request.max_rows()} rows"
    tile, choice = request.tiles.pick(key, _EXACT_CONV_TILES if exact else _CONV_TILES)
    row_tile = power_of_two(request.max_rows()) if exact else tile.rows
    channels = min(power_of_two(a.channels), tile.channels)
    grid = GridAxis(-(-a.channels // channels)), ONE if exact else GridAxis(tile=row_tile), ONE
    x, state = ("*fp32", Operand("input", 0)), ("*fp32", Operand("input", 2))
    step = {name: ("*i32", Operand("step", name=name)) for name in ("positions", "slots")}
    n_rows = None if exact else ("*i32", Operand("step", name="rows"))
    shape: dict[str, Constant] = {"CHANNELS": a.channels, "WIDTH": a.width}
    sides: dict[str, Constant] = {"ROW_TILE": row_tile, "CHANNEL_TILE": channels}
    made = launch(
        "causal_conv",
        "causal_conv",
        stem,
        grid,
        {
            "x": x,
            "weight": ("*fp32", Operand("input", 1)),
            "bias": ("*fp32", Operand("input", 3)) if a.bias else None,
            "state": state,
            **step,
            "n_rows": n_rows,
            "y": ("*fp32", Operand("output", 0)),
        },
        {**shape, "FUNCTION": a.function, "ROWS": request.rows if exact else 0, **sides},
        warps=tile.warps,
        tile=choice,
    )
    if exact:
        return GpuCode((made,))
    channels = min(power_of_two(a.channels), _STATE_CHANNELS)
    row_tile = -(-request.max_rows() // _ROW_PARTS)
    left = launch(
        "causal_conv",
        "leave_state",
        f"{stem}_state",
        (GridAxis(-(-a.channels // channels)), GridAxis(tile=row_tile), ONE),
        {"x": x, "state": state, **step, "n_rows": n_rows},
        {**shape, "ROW_TILE": row_tile, "CHANNEL_TILE": channels},
        warps=4,
    )
    return GpuCode((made, left))


def gated_delta(request: GpuRequest) -> GpuCode:
    """``gated_delta``. In graphs of many rows steps of one slot are computed in chunks, others row by row: whichever
    does not take part in a step leaves at once. Chunks round to bf16: what must not be rounded goes row by row."""
    if request.f32 or (request.rows is not None and request.rows <= DECODE_ROWS):
        return GpuCode((_rows(request, chunks=False),))
    chunks, scan, workspace = _chunks(request)
    return GpuCode((_rows(request, chunks=True), chunks, scan), workspace)


def _shape(a: GatedDelta) -> dict[str, Constant]:
    return {"K_HEADS": a.k_heads, "V_HEADS": a.v_heads, "K_DIM": a.k_dim, "V_DIM": a.v_dim, "SCALE": a.scale}


def _stem(a: GatedDelta) -> str:
    return f"gated_delta_{a.k_heads}x{a.k_dim}_{a.v_heads}x{a.v_dim}"


def _columns(a: GatedDelta, tiles: tuple[ColumnTile, ...]) -> tuple[ColumnTile, ...]:
    """Those no wider than the values; the narrowest if none is."""
    most = max(16, power_of_two(a.v_dim))
    return tuple(tile for tile in tiles if tile.columns <= most) or (min(tiles, key=lambda tile: tile.columns),)


_INPUTS = {name: ("*fp32", Operand("input", index)) for index, name in enumerate(("qkv", "a", "b", "a_log", "dt_bias"))}
_STATE = ("*fp32", Operand("input", 5))
_STEP = {name: ("*i32", Operand("step", name=name)) for name in ("positions", "slots")}
_N_ROWS = ("*i32", Operand("step", name="rows"))
_Y = ("*fp32", Operand("output", 0))


def _rows(request: GpuRequest, chunks: bool) -> Launch:
    """``chunks``: other launches compute steps of one slot."""
    a = request.op.attrs
    assert isinstance(a, GatedDelta)
    rows, most = request.rows, request.max_rows()
    exact = rows is not None and rows <= DECODE_ROWS
    row_tile = 1 if exact else -(-most // _ROW_PARTS)
    key = f"{_stem(a)}, {'exactly' if exact else 'several slots in up to'} {most} rows"
    tile, choice = request.tiles.pick(key, _columns(a, _ROW_TILES if exact else _BATCH_TILES))
    return launch(
        "gated_delta",
        "gated_delta_rows",
        f"{_stem(a)}_rows",
        (GridAxis(-(-a.v_dim // tile.columns)), GridAxis(a.v_heads), GridAxis(tile=row_tile)),
        {**_INPUTS, "state": _STATE, **_STEP, "n_rows": None if exact else _N_ROWS, "y": _Y},
        {
            **_shape(a),
            "L2_EPS": a.l2_eps,
            "K_PADDED": power_of_two(a.k_dim),
            "V_TILE": tile.columns,
            "ROWS": rows if exact else 0,
            "ROW_TILE": row_tile,
            "CHUNKS": chunks,
        },
        warps=tile.warps,
        tile=choice,
    )


def _chunks(request: GpuRequest) -> tuple[Launch, Launch, int]:
    """The chunks by themselves, the scan over them, and the bytes of the workspace between them."""
    a = request.op.attrs
    assert isinstance(a, GatedDelta)
    rows = -(-request.max_rows() // CHUNK) * CHUNK
    chunk_key, scan_key = (f"{_stem(a)}, {what} of up to {rows} rows" for what in ("chunks", "scan"))
    chunk_tile, chunk_choice = request.tiles.pick(chunk_key, _columns(a, _CHUNK_TILES))
    scan_tile, scan_choice = request.tiles.pick(scan_key, _columns(a, _SCAN_TILES))
    padded, values = max(16, power_of_two(a.k_dim)), max(chunk_tile.columns, scan_tile.columns, power_of_two(a.v_dim))
    sizes = {
        "queries": ("*bf16", 2 * rows * a.k_heads * padded),
        "keys": ("*bf16", 2 * rows * a.k_heads * padded),
        "w": ("*bf16", 2 * rows * a.v_heads * padded),
        "u": ("*fp32", 4 * rows * a.v_heads * values),
        "within": ("*bf16", 2 * rows * a.v_heads * CHUNK),
        "sums": ("*fp32", 4 * rows * a.v_heads),
    }
    between: dict[str, tuple[str, Operand]] = {}
    end = 0
    for name, (kind, size) in sizes.items():
        between[name] = (kind, Operand("workspace", offset=end))
        end = aligned(end + size)
    shape = {**_shape(a), "K_PADDED": padded, "V_PADDED": values}
    chunks = launch(
        "gated_delta",
        "gated_delta_chunks",
        f"{_stem(a)}_chunks",
        (GridAxis(tile=CHUNK), GridAxis(a.v_heads), ONE),
        {**_INPUTS, "slots": _STEP["slots"], "n_rows": _N_ROWS, **between},
        {**shape, "L2_EPS": a.l2_eps, "V_TILE": chunk_tile.columns},
        warps=chunk_tile.warps,
        tile=chunk_choice,
    )
    scan = launch(
        "gated_delta",
        "gated_delta_scan",
        f"{_stem(a)}_scan",
        (GridAxis(-(-a.v_dim // scan_tile.columns)), GridAxis(a.v_heads), ONE),
        {**between, "state": _STATE, **_STEP, "n_rows": _N_ROWS, "y": _Y},
        {**shape, "V_TILE": scan_tile.columns},
        warps=scan_tile.warps,
        stages=scan_tile.stages,
        tile=scan_choice,
    )
    return chunks, scan, end
