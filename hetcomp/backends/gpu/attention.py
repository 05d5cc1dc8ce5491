"""Launches of attention and kv_append: keys in parts for a few exact rows, tiles of tokens otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.gpu.kernels import (
    NUMBER_TYPES,
    ONE,
    ROWS,
    Constant,
    GpuCode,
    GpuRequest,
    GridAxis,
    Operand,
    launch,
)
from hetcomp.backends.gpu.tiles import aligned, power_of_two
from hetcomp.ir.ops import Attention, KvAppend
from hetcomp.ir.types import DType

DECODE_ROWS = 16
# Cache types that the kernels read, and their Triton pointers.
CACHE_TYPES = {DType.BF16: "*bf16", DType.F32: "*fp32", DType.FP8: "*u8"}
MAX_F32_DIM = 256  # of a head in an f32 cache: wider ones do not fit in 99 KB of shared memory

_PARTS_WANTED = 256  # programs over all heads and tokens: two for each multiprocessor of a large GPU
_MIN_PART = 128  # keys below which a part costs more than it saves
_MIN_PARTS, _MAX_PARTS = 8, 64


def split_width(dim: int) -> tuple[int, int]:
    """A width as one or two tiles whose sides are powers of two and at least 16: (all, 0) or (most, rest)."""
    if dim <= 16:
        return 16, 0
    below = power_of_two(dim + 1) // 2
    return (below, 0) if below == dim else (below, max(16, power_of_two(dim - below)))


def _values_are_keys(a: Attention) -> bool:
    """Whether a row's values are the first part of its key, so that one read serves for both."""
    return a.shared_kv and split_width(a.v_head_dim) == (split_width(a.head_dim)[0], 0)


def _shape(a: Attention, request: GpuRequest) -> dict[str, Constant]:
    first, second = split_width(a.head_dim)
    v_first, v_second = split_width(a.v_head_dim)
    return {
        "HEADS": a.heads,
        "KV_HEADS": a.kv_heads,
        "DIM": a.head_dim,
        "FIRST": first,
        "SECOND": second,
        "V_ROW": a.head_dim if a.shared_kv else a.v_head_dim,
        "V_DIM": a.v_head_dim,
        "V_FIRST": v_first,
        "V_SECOND": v_second,
        "SHARED": _values_are_keys(a),
        "SCALE": a.scale,
        "SOFTCAP": a.softcap,
        "WINDOW": a.window,
        "BLOCK": request.block_elements(request.inputs[1].type.dtype),
    }


def _stem(a: Attention, cache: DType) -> str:
    return f"attention_{a.heads}x{a.kv_heads}x{a.head_dim}_{cache}"


def _keys(a: Attention, dtype: DType) -> tuple[int, tuple[int, int]]:
    """Keys of a block and pipeline depths: what fits in shared memory beside the queries."""
    if dtype is DType.F32:
        return 32, (2, 1)
    return (32, (2, 1)) if a.head_dim > 128 else (64, (3, 2))


@dataclass(frozen=True)
class PrefillTile:
    """Rows of queries (tokens times heads of a group), keys of a block, warps, pipeline depths; whether keys come by
    tensor copies, where the architecture has them; keys of a block where blocks have less shared memory."""

    rows: int
    keys: int
    warps: int
    stages: tuple[int, int]
    descriptors: bool = False
    shallow_keys: int = 0  # as many


def _has_descriptors(a: Attention, dtype: DType, block: int) -> bool:
    """Whether attention_prefill can have its keys by tensor copies. block: elements of a block of the cache."""
    rows = a.head_dim == a.v_head_dim == power_of_two(a.head_dim) and 16 <= a.head_dim <= 128
    return rows and block % a.head_dim == 0 and dtype is DType.BF16 and not a.window and not a.softcap


def _prefill_tiles(a: Attention, dtype: DType, block: int) -> tuple[PrefillTile, ...]:
    """First the fastest on an H200, then what was close. Queries, scores and sums stay in registers."""
    keys, stages = _keys(a, dtype)
    if _values_are_keys(a) and a.head_dim > 256:
        return PrefillTile(32, 64, 4, (2, 2), shallow_keys=32), PrefillTile(32, 32, 4, (3, 2))
    if a.head_dim > 256 or dtype is DType.F32:
        return (PrefillTile(32, keys, 8 if a.head_dim > 128 else 4, stages),)
    if a.head_dim > 128:
        return PrefillTile(64, keys, 8, stages), PrefillTile(64, keys, 4, stages), PrefillTile(64, keys, 8, (3, 2))
    copied = (PrefillTile(64, keys, 4, stages, True),) if _has_descriptors(a, dtype, block) else ()
    return (
        *copied,
        PrefillTile(128, keys, 8, stages),
        PrefillTile(128, keys, 8, (4, 2)),
        PrefillTile(64, keys, 4, stages),
        PrefillTile(128, 128, 8, (2, 1)),
    )


def attention(request: GpuRequest) -> GpuCode:
    """``attention``."""
    if request.rows is not None and request.rows <= DECODE_ROWS:
        return _decode(request, request.rows)
    return _prefill(request)


def _operands(request: GpuRequest, a: Attention) -> tuple[dict[str, tuple[str, Operand]], tuple[str, Operand] | None]:
    cache = CACHE_TYPES[request.inputs[1].type.dtype]
    arguments = {
        "q": (NUMBER_TYPES[request.inputs[0].type.dtype], Operand("input", 0)),
        "k": (cache, Operand("input", 1)),
        "v": (cache, Operand("input", 1 if a.shared_kv else 2)),
    }
    return arguments, ("*fp32", Operand("input", 2 if a.shared_kv else 3)) if a.sinks else None


def _decode(request: GpuRequest, rows: int) -> GpuCode:
    a = request.op.attrs
    assert isinstance(a, Attention)
    dtype = request.inputs[1].type.dtype
    group = a.heads // a.kv_heads
    # 16 heads: the side of a tensor core's tile; more where one read of the keys can serve more and the sums still fit.
    heads = min(max(16, power_of_two(group)), 16 if a.v_head_dim > 256 else 64)
    tiles = a.kv_heads * -(-group // heads)
    keys_of_token = min(request.dims["context"], a.window or request.dims["context"])
    with_keys = power_of_two(-(-keys_of_token // _MIN_PART))  # more parts would never have any
    parts = min(_MAX_PARTS, with_keys, max(_MIN_PARTS, power_of_two(-(-_PARTS_WANTED // (tiles * rows)))))
    keys, stages = _keys(a, dtype)
    split: dict[str, Constant] = {"KEYS": keys, "PARTS": parts, "MIN_PART": _MIN_PART}
    stats_at = aligned(4 * rows * a.heads * parts * a.v_head_dim)
    partial, stats = ("*fp32", Operand("workspace")), ("*fp32", Operand("workspace", offset=stats_at))
    positions = ("*i32", Operand("step", name="positions"))
    operands, sinks = _operands(request, a)
    shape = _shape(a, request)
    first = launch(
        "attention",
        "attention_decode",
        f"{_stem(a, dtype)}_decode_parts{parts}",
        (GridAxis(tiles), GridAxis(parts), ROWS),
        {
            **operands,
            "positions": positions,
            "slots": ("*i32", Operand("step", name="slots")),
            "partial": partial,
            "stats": stats,
            "slot_blocks": ("i32", Operand("slot_blocks")),
        },
        {**shape, "HEAD_TILE": heads, **split},
        stages=stages,
    )
    join = launch(
        "attention",
        "attention_combine",
        f"{_stem(a, dtype)}_combine_parts{parts}",
        (GridAxis(a.heads), ROWS, ONE),
        {
            "partial": partial,
            "stats": stats,
            "positions": positions,
            "sinks": sinks,
            "y": ("*fp32", Operand("output", 0)),
        },
        {
            "HEADS": a.heads,
            "V_DIM": a.v_head_dim,
            "V_PADDED": power_of_two(a.v_head_dim),
            "WINDOW": a.window,
            **split,
        },
    )
    return GpuCode((first, join), stats_at + aligned(8 * rows * a.heads * parts))


def _prefill(request: GpuRequest) -> GpuCode:
    a = request.op.attrs
    assert isinstance(a, Attention)
    dtype = request.inputs[1].type.dtype
    key = f"{_stem(a, dtype)}_prefill, window {a.window}, up to {request.max_rows()} rows"
    tile, choice = request.tiles.pick(key, _prefill_tiles(a, dtype, request.block_elements(dtype)))
    group = a.heads // a.kv_heads
    heads = min(power_of_two(group), tile.rows)
    tokens = tile.rows // heads
    operands, sinks = _operands(request, a)
    made = launch(
        "attention",
        "attention_prefill",
        f"{_stem(a, dtype)}_prefill",
        (GridAxis(tile=tokens), GridAxis(a.kv_heads * -(-group // heads)), ONE),
        {
            **operands,
            "sinks": sinks,
            "positions": ("*i32", Operand("step", name="positions")),
            "slots": ("*i32", Operand("step", name="slots")),
            "n_rows": ("*i32", Operand("step", name="rows")),
            "y": (NUMBER_TYPES[request.outputs[0].type.dtype], Operand("output", 0)),
            "slot_blocks": ("i32", Operand("slot_blocks")),
        },
        {
            **_shape(a, request),
            "TOKENS": tokens,
            "HEAD_TILE": heads,
            "KEYS": tile.keys,
            "DESCRIPTORS": tile.descriptors,
        },
        warps=tile.warps,
        stages=tile.stages,
        shallow={"KEYS": tile.shallow_keys or tile.keys},
        tile=choice,
    )
    return GpuCode((made,))


def kv_append(request: GpuRequest) -> GpuCode:
    """``kv_append``."""
    attrs, dtype = request.op.attrs, request.inputs[1].type.dtype
    assert isinstance(attrs, KvAppend)
    made = launch(
        "attention",
        "kv_append",
        f"kv_append_{attrs.heads}x{attrs.head_dim}_{dtype}",
        (ROWS, GridAxis(attrs.heads), ONE),
        {
            "x": ("*fp32", Operand("input", 0)),
            "cache": (CACHE_TYPES[dtype], Operand("input", 1)),
            "positions": ("*i32", Operand("step", name="positions")),
            "slots": ("*i32", Operand("step", name="slots")),
            "n_rows": ("*i32", Operand("step", name="rows")) if request.rows is None else None,
            "slot_blocks": ("i32", Operand("slot_blocks")),
        },
        {
            "HEADS": attrs.heads,
            "DIM": attrs.head_dim,
            "PADDED": power_of_two(attrs.head_dim),
            "BLOCK": request.block_elements(dtype),
        },
        warps=1,
    )
    return GpuCode((made,))
