"""Launches that hand values to the CPU, and that add what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hetcomp.backends.gpu.groups import GpuGroup
from hetcomp.backends.gpu.kernels import ONE, ROWS, Constant, GpuCode, GpuRequest, GridAxis, Operand, launch
from hetcomp.backends.gpu.tiles import power_of_two
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.ir.homes import CPU
from hetcomp.ir.ops import Add
from hetcomp.ir.plan import Op, Value

_MAX_COLUMNS = 1024
_MAX_BLOCK = 4096


def _width(value: Value) -> int:
    """Numbers of a row."""
    return math.prod(d for d in value.type.shape[1:] if isinstance(d, int))


def hand_out(
    op: Op, inputs: tuple[Value, ...], outputs: tuple[str, ...], exact: bool, wanted: Value | None = None
) -> GpuGroup:
    """Copies x f32[rows, ..], or x, ids i32[rows, top_k] and weights f32[rows, top_k], to ``outputs``. ``wanted``:
    i32[1], zero where nobody reads x."""
    width = _width(inputs[0])
    choices = len(inputs) > 1
    top_k = inputs[1].type.shape[1] if choices else 1
    assert isinstance(top_k, int)
    columns = min(power_of_two(width), _MAX_COLUMNS)
    constants: dict[str, Constant] = {
        "WIDTH": width,
        "TOP_K": top_k,
        "TOP_K_PADDED": power_of_two(top_k),
        "COLUMNS": columns,
    }
    made = launch(
        "hand_out",
        "hand_out",
        f"hand_out_{width}{f'_top{top_k}' if choices else ''}{'_wanted' if wanted else ''}",
        (ROWS, GridAxis(-(-width // columns)), ONE),
        {
            "x": ("*fp32", Operand("input", 0)),
            "ids": ("*i32", Operand("input", 1)) if choices else None,
            "weights": ("*fp32", Operand("input", 2)) if choices else None,
            "n_rows": None if exact else ("*i32", Operand("step", name="rows")),
            "wanted": ("*i32", Operand("input", len(inputs))) if wanted else None,
            "x_out": ("*fp32", Operand("output", 0)),
            "ids_out": ("*i32", Operand("output", 1)) if choices else None,
            "weights_out": ("*fp32", Operand("output", 2)) if choices else None,
        },
        constants,
    )
    read = (*inputs, wanted) if wanted else inputs
    return GpuGroup((op,), tuple(v.id for v in read), outputs, GpuCode((made,)))


def ask(op: Op, inputs: tuple[Value, ...], outputs: tuple[str, ...], rows: int, flag: int) -> GpuGroup:
    """As :func:`hand_out` of a step of exactly so many ``rows``, with the choices; raises ``flag`` to the CPU."""
    width = _width(inputs[0])
    top_k = inputs[1].type.shape[1]
    assert isinstance(top_k, int)
    made = launch(
        "hand_out",
        "ask",
        f"ask_{rows}x{width}_top{top_k}",
        (ONE, ONE, ONE),
        {
            "x": ("*fp32", Operand("input", 0)),
            "ids": ("*i32", Operand("input", 1)),
            "weights": ("*fp32", Operand("input", 2)),
            "x_out": ("*fp32", Operand("output", 0)),
            "ids_out": ("*i32", Operand("output", 1)),
            "weights_out": ("*fp32", Operand("output", 2)),
            "asks": ("*i32", Operand("raises", flag, CPU)),
        },
        {
            "NUMBERS": rows * width,
            "CHOICES": rows * top_k,
            "CHOICES_PADDED": power_of_two(rows * top_k),
            "BLOCK": min(power_of_two(rows * width), _MAX_BLOCK),
        },
        warps=8,
    )
    return GpuGroup((op,), tuple(v.id for v in inputs), outputs, GpuCode((made,)))


def add_missing(
    op: Op,
    here: Value,
    there: Value,
    ids: Value,
    places: Value,
    onto: Value | None,
    total: Value,
    flag: int,
    before: int | None,
) -> GpuGroup:
    """total = onto (where given) + here, and of rows with a choice that has no place among ``places`` i32[experts]
    + there, which the CPU says is there by ``flag``; f32[rows, width] all, of exactly as many rows as the step has. The
    launch also awaits the flag ``before`` (where given)."""
    width = _width(total)
    top_k = ids.type.shape[1]
    assert isinstance(top_k, int)
    columns = min(power_of_two(width), _MAX_COLUMNS)
    read = (here, there, ids, places, *([onto] if onto else []))
    made = launch(
        "hand_out",
        "add_missing",
        f"add_missing_{width}_top{top_k}{'_onto' if onto else ''}{'' if before is None else '_behind'}",
        (ROWS, GridAxis(-(-width // columns) + (before is not None)), ONE),
        {
            "here": ("*fp32", Operand("input", 0)),
            "there": ("*fp32", Operand("input", 1)),
            "ids": ("*i32", Operand("input", 2)),
            "places": ("*i32", Operand("input", 3)),
            "onto": ("*fp32", Operand("input", 4)) if onto else None,
            "answers": ("*i32", Operand("awaits", flag, CPU)),
            "before": ("*i32", Operand("awaits", before, CPU)) if before is not None else None,
            "total": ("*fp32", Operand("output", 0)),
        },
        {"WIDTH": width, "TOP_K": top_k, "TOP_K_PADDED": power_of_two(top_k), "COLUMNS": columns},
    )
    return GpuGroup((op,), tuple(v.id for v in read), (total.id,), GpuCode((made,)))


def add_sums(op: Op, a: Value, b: Value, total: Value, rows: int | None) -> GpuGroup:
    """total = a + b, f32[rows, width] all."""
    request = GpuRequest(Op(op.id, Add(), (a.id, b.id), (total.id,)), (a, b), (total,), {}, rows)
    return GpuGroup((op,), (a.id, b.id), (total.id,), TritonBackend().emit(request))


def add_parts(op: Op, here: Sequence[Value], there: Value, part: Value, total: Value) -> GpuGroup:
    """total = the sums of the GPU's experts, one or two, and that of the CPU's where ``part`` i32[1] is not zero; f32
    [rows, width] all, of as many rows as the step has."""
    width = _width(total)
    columns = min(power_of_two(width), _MAX_COLUMNS)
    made = launch(
        "hand_out",
        "add_parts",
        f"add_parts_{width}",
        (ROWS, GridAxis(-(-width // columns)), ONE),
        {
            "a": ("*fp32", Operand("input", 0)),
            "b": ("*fp32", Operand("input", 1)) if len(here) > 1 else None,
            "there": ("*fp32", Operand("input", len(here))),
            "part": ("*i32", Operand("input", len(here) + 1)),
            "n_rows": ("*i32", Operand("step", name="rows")),
            "total": ("*fp32", Operand("output", 0)),
        },
        {"WIDTH": width, "COLUMNS": columns},
    )
    names = tuple(v.id for v in (*here, there, part))
    return GpuGroup((op,), names, (total.id,), GpuCode((made,)))
