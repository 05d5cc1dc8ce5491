"""Launches of linear and head_linear: GEMV for a few exact rows, GEMM otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.gpu.kernels import ONE, Constant, GpuCode, GpuRequest, GridAxis, Operand, launch
from hetcomp.ir.ops import HeadLinear, Linear

GEMV_ROWS = 8
# Elements of k in a word of weights (codegen_templates/gpu/weights.py).
_PER_WORD = {"f32": 1, "bf16": 2, "q8": 4, "q4": 8, "mxfp4": 8, "fp8": 2}
_GEMV_STEPS = (256, 128, 64, 32, 16)
_FEW_PANELS = 512  # programs that fill no GPU: each then has more threads


def word_type(weight_format: str) -> str:
    """Triton type of a packed weight's pointer."""
    return "*i16" if weight_format == "fp8" else "*i32"


def matrix_words(rows: int, columns: int, weight_format: str, layout: str) -> int:
    """Words of one packed matrix."""
    return packing.matrix_bytes(rows, columns, weight_format, layout) // (2 if weight_format == "fp8" else 4)


@dataclass(frozen=True)
class GemvTurn:
    """Words of a column that a turn of a GEMV takes, and the warps that share them: a thread has two vectors of 16
    bytes of a panel, and fewer steps than threads (codegen_templates/gpu/gemv.py says why)."""

    steps: int
    warps: int


def gemv_turn(columns: int, weight_format: str, programs: int) -> GemvTurn:
    """The turn for a GEMV of ``programs`` programs: the largest size that wastes the fewest steps."""
    needed = packing.padded_columns(columns, weight_format) // _PER_WORD[weight_format]
    sizes = _GEMV_STEPS if programs <= _FEW_PANELS else _GEMV_STEPS[2:]
    steps = min(sizes, key=lambda size: (-(-needed // size) * size, -size))
    return GemvTurn(steps, max(1, steps // 16))


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


def gemm_tile(weight_format: str, rows: int, matrices: int = 1) -> GemmTile:
    """The tile where ``rows`` rows share a weight and a program multiplies with so many matrices at a time. f32 numbers
    take twice the memory and three products each."""
    height = next((tile for tile in (16, 32, 64) if rows <= tile), 128)
    if weight_format == "f32":
        return GemmTile(min(height, 64), 64, 32, 4, (3, 2))
    # Two sums, or numbers of e2m1 being taken apart, leave no registers for a wide tile.
    width = 128 if height == 128 and matrices == 1 and weight_format != "mxfp4" else 64
    return GemmTile(height, width, 64 // _PER_WORD[weight_format], 8 if height == 128 else 4, (3, 2))


def linear(request: GpuRequest) -> GpuCode:
    """``linear`` and ``head_linear``."""
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    heads = attrs.heads if isinstance(attrs, HeadLinear) else 1
    n, k, weight_format = attrs.out_features, attrs.in_features, str(request.inputs[1].format)
    bias = isinstance(attrs, Linear) and attrs.bias
    stem = f"{request.op.kind}_{weight_format}_n{n}_k{k}"
    arguments: dict[str, tuple[str, Operand] | None] = {
        "x": ("*fp32", Operand("input", 0)),
        "w": (word_type(weight_format), Operand("input", 1)),
        "bias": ("*fp32", Operand("input", 2)) if bias else None,
        "y": ("*fp32", Operand("output", 0)),
    }
    constants: dict[str, Constant] = {
        "K": k,
        "N": n,
        "HEADS": heads,
        "MATRIX": matrix_words(n, k, weight_format, packing.PANELS),
        "FORMAT": weight_format,
    }
    if request.rows is not None and request.rows <= GEMV_ROWS:
        panels = -(-n // packing.PANEL)
        turn = gemv_turn(k, weight_format, panels * heads)
        constants |= {"ROWS": request.rows, "STEPS": turn.steps}
        grid, stem = (GridAxis(panels), GridAxis(heads), ONE), f"{stem}_rows{request.rows}"
        return GpuCode((launch("gemv", "linear_gemv", stem, grid, arguments, constants, warps=turn.warps),))
    tile = gemm_tile(weight_format, request.max_rows())
    rows = "logit_row_count" if request.outputs[0].type.shape[0] == "R" else "rows"
    made = launch(
        "gemm",
        "linear_gemm",
        f"{stem}_tile{tile.rows}",
        (GridAxis(tile=tile.rows), GridAxis(-(-n // tile.columns)), GridAxis(heads)),
        {**arguments, "n_rows": ("*i32", Operand("step", name=rows))},
        {**constants, **tile.constants()},
        warps=tile.warps,
        stages=tile.stages,
    )
    return GpuCode((made,))
