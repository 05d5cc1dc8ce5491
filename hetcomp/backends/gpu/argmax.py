"""Launches that find the most likely token of every row of logits."""

from __future__ import annotations

from hetcomp.backends.gpu.kernels import ONE, ROWS, Constant, GpuCode, GridAxis, Operand, launch
from hetcomp.backends.gpu.tiles import aligned, power_of_two

_COLUMNS = 1024


def argmax(vocab: int, rows: int, exact: bool) -> GpuCode:
    """Input 0: logits f32[rows, vocab]; output 0: i32[rows], -1 where a row is not finite. ``rows``: exactly, or at
    most (then the step's ``logit_row_count`` says how many)."""
    blocks = -(-vocab // _COLUMNS)
    largest = ("*fp32", Operand("workspace"))
    first = ("*i32", Operand("workspace", offset=aligned(4 * rows * blocks)))
    n_rows = None if exact else ("*i32", Operand("step", name="logit_row_count"))
    shape: dict[str, Constant] = {"WIDTH": vocab, "BLOCKS": blocks, "COLUMNS": _COLUMNS}
    of_blocks = launch(
        "argmax",
        "argmax_blocks",
        f"argmax_blocks_{vocab}",
        (ROWS, GridAxis(blocks), ONE),
        {"logits": ("*fp32", Operand("input", 0)), "n_rows": n_rows, "largest": largest, "first": first},
        shape,
    )
    of_rows = launch(
        "argmax",
        "argmax_rows",
        f"argmax_rows_{blocks}",
        (ROWS, ONE, ONE),
        {"largest": largest, "first": first, "n_rows": n_rows, "best": ("*i32", Operand("output", 0))},
        {"BLOCKS": blocks, "PADDED": power_of_two(blocks)},
        warps=1,
    )
    return GpuCode((of_blocks, of_rows), 2 * aligned(4 * rows * blocks))
