"""Launches of linear and head_linear: GEMV for a few exact rows, GEMM otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.gpu.gemv import GEMV_ROWS, Matrix, linear_gemv
from hetcomp.backends.gpu.kernels import Constant, GpuCode, GpuRequest, GridAxis, Operand, launch
from hetcomp.backends.gpu.words import PER_WORD, matrix_words, word_type
from hetcomp.ir.ops import HeadLinear, Linear


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
    return GemmTile(height, width, 64 // PER_WORD[weight_format], 8 if height == 128 else 4, (3, 2))


def linear(request: GpuRequest) -> GpuCode:
    """``linear`` and ``head_linear``."""
    attrs = request.op.attrs
    assert isinstance(attrs, (Linear, HeadLinear))
    heads = attrs.heads if isinstance(attrs, HeadLinear) else 1
    n, k, weight_format = attrs.out_features, attrs.in_features, str(request.inputs[1].format)
    bias = isinstance(attrs, Linear) and attrs.bias
    stem = f"{request.op.kind}_{weight_format}_n{n}_k{k}"
    x, w, y = Operand("input", 0), Operand("input", 1), Operand("output", 0)
    its_bias = Operand("input", 2) if bias else None
    if request.rows is not None and request.rows <= GEMV_ROWS:
        matrix = Matrix(w, its_bias, y, n)
        return GpuCode((linear_gemv(stem, x, (matrix,), k, weight_format, request.rows, heads=heads),))
    arguments: dict[str, tuple[str, Operand] | None] = {
        "x": ("*fp32", x),
        "w": (word_type(weight_format), w),
        "bias": ("*fp32", its_bias) if its_bias else None,
        "y": ("*fp32", y),
    }
    constants: dict[str, Constant] = {
        "K": k,
        "N": n,
        "HEADS": heads,
        "MATRIX": matrix_words(n, k, weight_format, packing.PANELS),
        "FORMAT": weight_format,
    }
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
