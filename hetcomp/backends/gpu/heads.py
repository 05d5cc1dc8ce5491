"""Launch of what is done to heads between their projections and attention."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends.gpu.attention import CACHE_TYPES
from hetcomp.backends.gpu.gemv import GEMV_ROWS
from hetcomp.backends.gpu.kernels import NUMBER_TYPES, ONE, ROWS, GpuCode, GridAxis, Operand, launch
from hetcomp.backends.gpu.tiles import power_of_two
from hetcomp.ir.ops import KvAppend, RmsNorm, Rope
from hetcomp.ir.types import DType

_ELEMENTS = 1024  # of heads, that a program of many rows takes


@dataclass(frozen=True)
class HeadOperands:
    """``heads_to_cache``'s operands; norms are None where heads have none."""

    q: Operand
    k: Operand
    v: Operand
    q_norm: Operand | None
    k_norm: Operand | None
    cos: Operand
    sin: Operand
    y: Operand
    y_type: DType
    k_cache: Operand
    v_cache: Operand


@dataclass(frozen=True)
class HeadAttrs:
    """Attributes of the ops that it stands for: rotations of q and k differ in their heads alone."""

    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    q: Rope
    k: Rope
    v: KvAppend


def heads_to_cache(of: HeadOperands, a: HeadAttrs, cache: DType, block: int, rows: int | None) -> GpuCode:
    """Norms (of heads or of whole rows) and rotations of q and k; k and v to their caches, whose blocks have
    ``block`` elements."""
    norms = {"Q_EPS": 0.0, "Q_WEIGHT_OFFSET": 0.0, "K_EPS": 0.0, "K_WEIGHT_OFFSET": 0.0}
    whole = False
    if a.q_norm and a.k_norm:
        whole = a.q_norm.width != a.q.head_dim
        norms = {
            "Q_EPS": a.q_norm.eps,
            "Q_WEIGHT_OFFSET": a.q_norm.weight_offset,
            "K_EPS": a.k_norm.eps,
            "K_WEIGHT_OFFSET": a.k_norm.weight_offset,
        }
    padded = power_of_two(max(a.q.head_dim, a.v.head_dim))
    # A few rows need every program they can get; of many rows, each has a block of heads.
    tile = 1 if rows is not None and rows <= GEMV_ROWS else min(max(1, _ELEMENTS // padded), power_of_two(a.q.heads))
    blocks = -(-a.q.heads // tile) + 2 * -(-a.k.heads // tile)
    made = launch(
        "heads",
        "heads_to_cache",
        f"heads_{a.q.style}_{a.q.heads}x{a.k.heads}x{a.q.head_dim}_{cache}_{of.y_type}",
        (ROWS, GridAxis(blocks), ONE),
        {
            "q": ("*fp32", of.q),
            "k": ("*fp32", of.k),
            "v": ("*fp32", of.v),
            "q_norm": ("*fp32", of.q_norm) if of.q_norm else None,
            "k_norm": ("*fp32", of.k_norm) if of.k_norm else None,
            "cos": ("*fp32", of.cos),
            "sin": ("*fp32", of.sin),
            "positions": ("*i32", Operand("step", name="positions")),
            "slots": ("*i32", Operand("step", name="slots")),
            "n_rows": ("*i32", Operand("step", name="rows")) if rows is None else None,
            "y": (NUMBER_TYPES[of.y_type], of.y),
            "k_cache": (CACHE_TYPES[cache], of.k_cache),
            "v_cache": (CACHE_TYPES[cache], of.v_cache),
            "slot_blocks": ("i32", Operand("slot_blocks")),
        },
        {
            "HEADS": a.q.heads,
            "KV_HEADS": a.k.heads,
            "DIM": a.q.head_dim,
            "V_DIM": a.v.head_dim,
            "HALF": a.q.rotary_dim // 2,
            "OFFSET": a.q.offset,
            "STYLE": a.q.style,
            "WHOLE": whole,
            **norms,
            "PADDED": padded,
            "HEAD_TILE": tile,
            "BLOCK": block,
        },
        warps=4 if whole or tile * padded >= _ELEMENTS else 1,
    )
    return GpuCode((made,))
