"""Launches of the ops that are memory alone: norms, rotary embedding, routing, elementwise ops, reading of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

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
from hetcomp.backends.gpu.tiles import power_of_two
from hetcomp.backends.gpu.words import word_type
from hetcomp.ir import ops
from hetcomp.ir.types import TensorType

_Argument = tuple[str, Operand] | None
_MAX_COLUMNS = 1024  # elements that a program of an elementwise op takes
_RUN_ELEMENTS = 1024  # elements of heads that a program of a norm or a rotation takes
_EMBED_STEPS = 128  # words of a table's row that a program takes

_X: _Argument = ("*fp32", Operand("input", 0))
_Y: _Argument = ("*fp32", Operand("output", 0))


def _second() -> _Argument:
    return ("*fp32", Operand("input", 1))


def _n_rows(request: GpuRequest) -> _Argument:
    """The step's number of rows where the grid may have more."""
    if request.rows is not None:
        return None
    name = "logit_row_count" if request.outputs[0].type.shape[0] == "R" else "rows"
    return ("*i32", Operand("step", name=name))


def _width(type_: TensorType) -> int:
    return math.prod(d for d in type_.shape[1:] if isinstance(d, int))


def _number(request: GpuRequest) -> _Argument:
    """The result, f32 or bf16."""
    return (NUMBER_TYPES[request.outputs[0].type.dtype], Operand("output", 0))


def rms_norm(request: GpuRequest, rounded: Operand | None = None) -> GpuCode:
    """``rms_norm``, of f32 or bf16; ``rounded``: the same in bf16 beside it."""
    return GpuCode((_rms_norm(request, rounded, None, ""),))


def gated_rms_norm(norm: GpuRequest, glu: GpuRequest, gate: Operand) -> GpuCode:
    """``rms_norm`` and the ``glu`` that reads its result as ``up``."""
    a = glu.op.attrs
    assert isinstance(a, ops.Glu)
    return GpuCode((_rms_norm(replace(norm, outputs=glu.outputs), None, gate, a.function),))


def _rms_norm(request: GpuRequest, rounded: Operand | None, gate: Operand | None, function: str) -> Launch:
    a = request.op.attrs
    assert isinstance(a, ops.RmsNorm)
    padded = power_of_two(a.width)
    runs = min(power_of_two(a.groups), max(1, _RUN_ELEMENTS // padded))
    return launch(
        "rowwise",
        "rms_norm",
        f"{'gated_' if gate else ''}rms_norm_{a.groups}x{a.width}",
        (ROWS, GridAxis(-(-a.groups // runs)), ONE),
        {
            "x": _X,
            "weight": _second(),
            "gate": ("*fp32", gate) if gate else None,
            "n_rows": _n_rows(request),
            "y": _number(request),
            "rounded": ("*bf16", rounded) if rounded else None,
        },
        {
            "WIDTH": a.width,
            "GROUPS": a.groups,
            "EPS": a.eps,
            "WEIGHT_OFFSET": a.weight_offset,
            "FUNCTION": function,
            "RUNS": runs,
            "PADDED": padded,
        },
        warps=8 if padded > 2048 else 4,
    )


def add_rms_norm(
    norm: GpuRequest,
    a: Operand,
    b: Operand,
    weight: Operand,
    total: Operand,
    y: Operand | None,
    rounded: Operand | None,
) -> GpuCode:
    """``rms_norm`` of whole rows, f32 and rounded to bf16 (one may be None), of the sum of a and b, which is written
    too."""
    attrs = norm.op.attrs
    assert isinstance(attrs, ops.RmsNorm)
    padded = power_of_two(attrs.width)
    made = launch(
        "rowwise",
        "add_rms_norm",
        f"add_rms_norm_{attrs.width}",
        (ROWS, ONE, ONE),
        {
            "a": ("*fp32", a),
            "b": ("*fp32", b),
            "weight": ("*fp32", weight),
            "n_rows": _n_rows(norm),
            "total": ("*fp32", total),
            "y": ("*fp32", y) if y else None,
            "rounded": ("*bf16", rounded) if rounded else None,
        },
        {"WIDTH": attrs.width, "EPS": attrs.eps, "WEIGHT_OFFSET": attrs.weight_offset, "PADDED": padded},
        warps=8 if padded > 2048 else 4,
    )
    return GpuCode((made,))


def layer_norm(request: GpuRequest) -> GpuCode:
    """``layer_norm``."""
    a = request.op.attrs
    assert isinstance(a, ops.LayerNorm)
    padded = power_of_two(a.width)
    made = launch(
        "rowwise",
        "layer_norm",
        f"layer_norm_{a.width}",
        (ROWS, ONE, ONE),
        {
            "x": _X,
            "weight": _second(),
            "bias": ("*fp32", Operand("input", 2)),
            "n_rows": _n_rows(request),
            "y": _Y,
        },
        {"WIDTH": a.width, "EPS": a.eps, "PADDED": padded},
        warps=8 if padded > 2048 else 4,
    )
    return GpuCode((made,))


def rope_table(request: GpuRequest) -> GpuCode:
    """``rope_table``."""
    a = request.op.attrs
    assert isinstance(a, ops.RopeTable)
    half = a.rotary_dim // 2
    made = launch(
        "rowwise",
        "rope_table",
        f"rope_table_{half}",
        (ROWS, ONE, ONE),
        {
            "positions": ("*i32", Operand("input", 0)),
            "inv_freq": _second(),
            "n_rows": _n_rows(request),
            "cos": _Y,
            "sin": ("*fp32", Operand("output", 1)),
        },
        {"HALF": half, "SCALING": a.scaling, "PADDED": power_of_two(half)},
        warps=1,
    )
    return GpuCode((made,))


def rope(request: GpuRequest) -> GpuCode:
    """``rope``."""
    a = request.op.attrs
    assert isinstance(a, ops.Rope)
    padded = power_of_two(a.head_dim)
    heads = min(power_of_two(a.heads), max(1, _RUN_ELEMENTS // padded))
    made = launch(
        "rowwise",
        "rope",
        f"rope_{a.style}_{a.heads}x{a.head_dim}",
        (ROWS, GridAxis(-(-a.heads // heads)), ONE),
        {
            "x": _X,
            "cos": _second(),
            "sin": ("*fp32", Operand("input", 2)),
            "n_rows": _n_rows(request),
            "y": _number(request),
        },
        {
            "HEADS": a.heads,
            "DIM": a.head_dim,
            "HALF": a.rotary_dim // 2,
            "OFFSET": a.offset,
            "STYLE": a.style,
            "HEAD_TILE": heads,
            "PADDED": padded,
        },
    )
    return GpuCode((made,))


def route(request: GpuRequest) -> GpuCode:
    """``route``."""
    return GpuCode((route_parts(request, Operand("input", 0), Operand("input", 1), 1),))


def route_parts(request: GpuRequest, logits: Operand, bias: Operand | None, parts: int) -> Launch:
    """``route`` of logits that are the sum of ``parts`` arrays. bias: where it lies if the op has one."""
    a = request.op.attrs
    assert isinstance(a, ops.Route)
    return launch(
        "route",
        "route",
        f"route_{a.scoring}_{a.top_k}of{a.experts}",
        (ROWS, ONE, ONE),
        {
            "logits": ("*fp32", logits),
            "bias": ("*fp32", bias) if a.bias and bias else None,
            "n_rows": _n_rows(request),
            "ids": ("*i32", Operand("output", 0)),
            "weights": ("*fp32", Operand("output", 1)),
        },
        {
            "EXPERTS": a.experts,
            "TOP_K": a.top_k,
            "SCORING": a.scoring,
            "NORMALISE": a.normalise,
            "NORM_EPS": a.norm_eps,
            "GROUPS": a.groups,
            "TOP_GROUPS": a.top_groups,
            "GROUP_SCORE": a.group_score,
            "OUTSIDE": a.outside_groups,
            "SCALING": a.scaling,
            "JITTER": a.jitter,
            "GROUPS_PADDED": power_of_two(a.groups),
            "SIZE_PADDED": power_of_two(a.experts // a.groups),
            "TOP_K_PADDED": power_of_two(a.top_k),
            "PARTS": parts,
            "ROWS": 1 if parts == 1 else request.max_rows(),
        },
        warps=1,
    )


def embed(request: GpuRequest) -> GpuCode:
    """``embed``."""
    a = request.op.attrs
    assert isinstance(a, ops.Embed)
    weight_format = str(request.inputs[1].format)
    blocks = -(-a.width // _EMBED_STEPS)  # of one element a word at most; more elements a word need fewer
    made = launch(
        "rowwise",
        "embed",
        f"embed_{weight_format}_{a.width}",
        (ROWS, GridAxis(blocks), ONE),
        {
            "ids": ("*i32", Operand("input", 0)),
            "table": (word_type(weight_format), Operand("input", 1)),
            "n_rows": _n_rows(request),
            "y": _Y,
        },
        {"WIDTH": a.width, "SCALE": a.scale, "FORMAT": weight_format, "STEPS": _EMBED_STEPS},
    )
    return GpuCode((made,))


def select_rows(request: GpuRequest) -> GpuCode:
    """``select_rows``."""
    arguments = {
        "x": _X,
        "rows": ("*i32", Operand("step", name="logit_rows")),
        "n_rows": _n_rows(request),
        "y": _Y,
    }
    return GpuCode((_columns(request, "rowwise", "select_rows", arguments, {}),))


def glu(request: GpuRequest) -> GpuCode:
    """``glu``."""
    a = request.op.attrs
    assert isinstance(a, ops.Glu)
    arguments = {"gate": _X, "up": _second(), "n_rows": _n_rows(request), "y": _number(request)}
    constants: dict[str, Constant] = {"FUNCTION": a.function, "ALPHA": a.alpha, "LIMIT": a.limit}
    return GpuCode((_columns(request, "elementwise", "glu", arguments, constants),))


def activation(request: GpuRequest) -> GpuCode:
    """``activation``."""
    a = request.op.attrs
    assert isinstance(a, ops.Activation)
    arguments = {"x": _X, "n_rows": _n_rows(request), "y": _Y}
    return GpuCode((_columns(request, "elementwise", "activation", arguments, {"FUNCTION": a.function}),))


def add(request: GpuRequest) -> GpuCode:
    """``add``."""
    arguments = {"a": _X, "b": _second(), "n_rows": _n_rows(request), "y": _Y}
    return GpuCode((_columns(request, "elementwise", "add", arguments, {}),))


def mul(request: GpuRequest) -> GpuCode:
    """``mul``."""
    arguments = {"a": _X, "b": _second(), "n_rows": _n_rows(request), "y": _Y}
    constants: dict[str, Constant] = {"B_WIDTH": _width(request.inputs[1].type)}
    return GpuCode((_columns(request, "elementwise", "mul", arguments, constants),))


def scale(request: GpuRequest) -> GpuCode:
    """``scale``."""
    a = request.op.attrs
    assert isinstance(a, ops.Scale)
    arguments = {"x": _X, "n_rows": _n_rows(request), "y": _Y}
    return GpuCode((_columns(request, "elementwise", "scale", arguments, {"FACTOR": a.factor}),))


def slice_(request: GpuRequest) -> GpuCode:
    """``slice``."""
    a = request.op.attrs
    assert isinstance(a, ops.Slice)
    return GpuCode((_copy(request, 0, a.start, 0, a.stop - a.start),))


def concat(request: GpuRequest) -> GpuCode:
    """``concat``: a copy for each input."""
    launches, first = [], 0
    for i, value in enumerate(request.inputs):
        width = _last(value.type)
        launches.append(_copy(request, i, 0, first, width))
        first += width
    return GpuCode(tuple(launches))


def _columns(
    request: GpuRequest, module: str, function: str, arguments: Mapping[str, _Argument], constants: dict[str, Constant]
) -> Launch:
    """An op whose programs take columns of one row of the output."""
    width = _width(request.outputs[0].type)
    columns = min(power_of_two(width), _MAX_COLUMNS)
    grid = ROWS, GridAxis(-(-width // columns)), ONE
    stem = f"{function}_{width}"
    return launch(module, function, stem, grid, arguments, {"WIDTH": width, **constants, "COLUMNS": columns})


def _copy(request: GpuRequest, index: int, x_first: int, y_first: int, width: int) -> Launch:
    """Columns [x_first, x_first + width) of an input's last axis to y_first of the output's."""
    x, y = request.inputs[index].type, request.outputs[0].type
    runs, x_runs = _width(y) // _last(y), _width(x) // _last(x)
    columns = min(power_of_two(runs * width), _MAX_COLUMNS)
    return launch(
        "elementwise",
        "copy_columns",
        f"copy_columns_{runs}x{width}",
        (ROWS, GridAxis(-(-runs * width // columns)), ONE),
        {"x": ("*fp32", Operand("input", index)), "n_rows": _n_rows(request), "y": _Y},
        {
            "RUNS": runs,
            "X_RUNS": x_runs,
            "X_WIDTH": _last(x),
            "Y_WIDTH": _last(y),
            "X_FIRST": x_first,
            "Y_FIRST": y_first,
            "WIDTH": width,
            "COLUMNS": columns,
        },
    )


def _last(type_: TensorType) -> int:
    last = type_.shape[-1]
    assert isinstance(last, int)
    return last
