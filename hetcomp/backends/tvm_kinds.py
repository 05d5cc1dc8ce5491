"""The row-wise kinds: which TVM functions an op needs, over which operands, in which units of work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hetcomp.backends.protocol import Isa, KernelRequest
from hetcomp.backends.tvm_rowwise import (
    ALL,
    BLOCK,
    COPY_GRAIN,
    MATH_GRAIN,
    Operand,
    RowKernel,
    Stage,
)
from hetcomp.backends.tvm_toolchain import lanes, whole_vectors
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Value
from hetcomp.ir.types import DType


def place_of(request: KernelRequest) -> str:
    """The op's module path for messages."""
    return request.op.origin or request.op.id


def check_types(request: KernelRequest) -> None:
    """Raises HetcompError unless operands are f32 or i32 and results have a row for each token."""
    for value in (*request.inputs, *request.outputs):
        if value.type.dtype not in (DType.F32, DType.I32):
            raise HetcompError(
                f"The {request.op.kind} at {place_of(request)} has an operand {value.id} of type "
                f"{value.type}, but "
                "its kernel takes f32 and i32 only."
            )
    for value in request.outputs:
        if not value.type.shape or not isinstance(value.type.shape[0], str):
            raise HetcompError(
                f"The {request.op.kind} at {place_of(request)} has the result {value.type}, which has "
                f"no row for "
                "each token."
            )


def _trailing(value: Value) -> tuple[int, ...]:
    """The sizes behind the row dimension."""
    return tuple(d for d in value.type.shape[1:] if isinstance(d, int))


def _width(value: Value) -> int:
    return math.prod(_trailing(value))


def _rows_grain(width: int, elements: int) -> int:
    return max(1, elements // max(1, width))


def _elementwise(title: str, width: int, stage: Stage, elements: int) -> RowKernel:
    return RowKernel(title, "an element", f"args.rows * {width}", elements, (stage,))


def _flat(*bases: str) -> tuple[Operand, ...]:
    return tuple(Operand(base, (BLOCK,)) for base in bases)


def _activation(request: KernelRequest) -> RowKernel:
    from hetcomp.backends import tvm_elementwise, tvm_math

    attrs = request.op.attrs
    assert isinstance(attrs, ops.Activation)
    function = tvm_math.UNARY[attrs.function]
    width = lanes(request.isa)
    stage = Stage(lambda: tvm_elementwise.unary(function, width), _flat("args.in[0]", "args.out[0]"))
    return _elementwise(attrs.function, _width(request.outputs[0]), stage, MATH_GRAIN)


def _scale(request: KernelRequest) -> RowKernel:
    from hetcomp.backends import tvm_elementwise, tvm_math

    attrs = request.op.attrs
    assert isinstance(attrs, ops.Scale)
    factor, width = attrs.factor, lanes(request.isa)
    stage = Stage(
        lambda: tvm_elementwise.unary(lambda x: x * tvm_math.constant(factor), width),
        _flat("args.in[0]", "args.out[0]"),
    )
    return _elementwise(f"x * {factor}", _width(request.outputs[0]), stage, COPY_GRAIN)


def _glu(request: KernelRequest) -> RowKernel:
    from hetcomp.backends import tvm_elementwise, tvm_math

    attrs = request.op.attrs
    assert isinstance(attrs, ops.Glu)
    function = tvm_math.glu(attrs.function, attrs.alpha, attrs.limit)
    width = lanes(request.isa)
    stage = Stage(lambda: tvm_elementwise.binary(function, width), _flat("args.in[0]", "args.in[1]", "args.out[0]"))
    return _elementwise(f"{attrs.function}(gate) * up", attrs.width, stage, MATH_GRAIN)


def _add(request: KernelRequest) -> RowKernel:
    from hetcomp.backends import tvm_elementwise

    if _width(request.inputs[0]) != _width(request.inputs[1]):
        raise HetcompError(f"The add at {place_of(request)} has operands of different shapes.")
    width = lanes(request.isa)
    stage = Stage(
        lambda: tvm_elementwise.binary(lambda a, b: a + b, width),
        _flat("args.in[0]", "args.in[1]", "args.out[0]"),
    )
    return _elementwise("a + b", _width(request.outputs[0]), stage, COPY_GRAIN)


def _mul(request: KernelRequest) -> RowKernel:
    from hetcomp.backends import tvm_elementwise

    a, b = request.inputs
    vector, columns = lanes(request.isa), _width(a)
    if _width(b) == columns:
        stage = Stage(
            lambda: tvm_elementwise.binary(lambda a, b: a * b, vector),
            _flat("args.in[0]", "args.in[1]", "args.out[0]"),
        )
        return _elementwise("a * b", columns, stage, COPY_GRAIN)
    if _width(b) != 1:
        raise HetcompError(
            f"The mul at {place_of(request)} multiplies {a.type} by {b.type}; the second operand must "
            f"have the same "
            "shape or one number a row."
        )
    stage = Stage(
        lambda: tvm_elementwise.multiply_rows(columns, vector),
        (
            Operand("args.in[0]", (BLOCK, columns)),
            Operand("args.in[1]", (BLOCK,)),
            Operand("args.out[0]", (BLOCK, columns)),
        ),
    )
    return RowKernel("a * b (one number a row)", "a row", "args.rows", _rows_grain(columns, COPY_GRAIN), (stage,))


def _copy_stage(
    isa: Isa, heads: int, width: int, source: int, read: tuple[int, int, int], write: tuple[int, int]
) -> Stage:
    from hetcomp.backends import tvm_elementwise

    return Stage(
        lambda: tvm_elementwise.copy_columns(heads, width, source=read, target=write, lanes=lanes(isa)),
        (
            Operand(f"args.in[{source}]", (BLOCK, read[0], read[1])),
            Operand("args.out[0]", (BLOCK, heads, write[0])),
        ),
    )


def _slice(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.Slice)
    *outer, columns = _trailing(request.inputs[0])
    heads, width = math.prod(outer), attrs.stop - attrs.start
    if not 0 <= attrs.start < attrs.stop <= columns:
        raise HetcompError(
            f"The slice {attrs.start}:{attrs.stop} at {place_of(request)} is outside of {request.inputs[0].type}."
        )
    stage = _copy_stage(request.isa, heads, width, 0, (heads, columns, attrs.start), (width, 0))
    title = f"x[..., {attrs.start}:{attrs.stop}]"
    return RowKernel(title, "a row", "args.rows", _rows_grain(heads * width, COPY_GRAIN), (stage,))


def _concat(request: KernelRequest) -> RowKernel:
    *outer, columns = _trailing(request.outputs[0])
    heads = math.prod(outer)
    stages = []
    first = 0
    for index, value in enumerate(request.inputs):
        *value_outer, width = _trailing(value)
        own = math.prod(value_outer)
        if own not in (1, heads):
            raise HetcompError(f"The concat at {place_of(request)} joins {value.type} to {request.outputs[0].type}.")
        stages.append(_copy_stage(request.isa, heads, width, index, (own, width, 0), (columns, first)))
        first += width
    if first != columns:
        raise HetcompError(f"The concat at {place_of(request)} gives {first} columns, not {columns}.")
    title = f"concat of {len(stages)}"
    return RowKernel(title, "a row", "args.rows", _rows_grain(heads * columns, COPY_GRAIN), tuple(stages))


def _rms_norm(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.RmsNorm)
    groups, width = attrs.groups, attrs.width

    def build() -> object:
        from hetcomp.backends import tvm_norm

        return tvm_norm.rms_norm(groups, width, attrs.eps, attrs.weight_offset, lanes(request.isa))

    rows = (BLOCK, groups, width)
    stage = Stage(build, (Operand("args.in[0]", rows), Operand("args.in[1]", (width,)), Operand("args.out[0]", rows)))
    title = f"rms_norm of {groups} x {width}"
    return RowKernel(title, "a row", "args.rows", _rows_grain(groups * width, COPY_GRAIN // 2), (stage,))


def _layer_norm(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.LayerNorm)
    width = attrs.width

    def build() -> object:
        from hetcomp.backends import tvm_norm

        return tvm_norm.layer_norm(width, attrs.eps, lanes(request.isa))

    rows, weights = (BLOCK, width), [Operand(f"args.in[{i}]", (width,)) for i in (1, 2)]
    stage = Stage(build, (Operand("args.in[0]", rows), *weights, Operand("args.out[0]", rows)))
    return RowKernel(f"layer_norm of {width}", "a row", "args.rows", _rows_grain(width, COPY_GRAIN // 2), (stage,))


def _rope_table(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.RopeTable)
    half = attrs.rotary_dim // 2

    def build() -> object:
        from hetcomp.backends import tvm_rope

        return tvm_rope.rope_table(half, attrs.scaling)

    stage = Stage(
        build,
        (
            Operand("args.in[0]", (BLOCK,), "i32"),
            Operand("args.in[1]", (half,)),
            Operand("args.out[0]", (BLOCK, half)),
            Operand("args.out[1]", (BLOCK, half)),
        ),
    )
    return RowKernel("rope table", "a row", "args.rows", _rows_grain(half, MATH_GRAIN // 8), (stage,))


def _rope(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.Rope)
    half = attrs.rotary_dim // 2
    if attrs.offset + attrs.rotary_dim > attrs.head_dim or attrs.rotary_dim % 2:
        raise HetcompError(
            f"The rope at {place_of(request)} rotates {attrs.rotary_dim} elements from {attrs.offset} "
            f"on of heads "
            f"of {attrs.head_dim}."
        )

    def build() -> object:
        from hetcomp.backends import tvm_rope

        return tvm_rope.rope(attrs.heads, attrs.head_dim, half, attrs.offset, attrs.style, lanes(request.isa))

    rows = (BLOCK, attrs.heads, attrs.head_dim)
    stage = Stage(
        build,
        (
            Operand("args.in[0]", rows),
            Operand("args.in[1]", (BLOCK, half)),
            Operand("args.in[2]", (BLOCK, half)),
            Operand("args.out[0]", rows),
        ),
    )
    grain = _rows_grain(attrs.heads * attrs.head_dim, COPY_GRAIN)
    return RowKernel(f"rope, {attrs.style}", "a row", "args.rows", grain, (stage,))


def _route(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.Route)
    _check_route(attrs, request)
    padded = whole_vectors(attrs.experts, request.isa)

    def build() -> object:
        from hetcomp.backends import tvm_route

        return tvm_route.route(attrs, padded, lanes(request.isa))

    operands = [Operand("args.in[0]", (BLOCK, attrs.experts))]
    if attrs.bias:
        operands.append(Operand("args.in[1]", (attrs.experts,)))
    operands.append(Operand("args.out[0]", (BLOCK, attrs.top_k), "i32"))
    operands.append(Operand("args.out[1]", (BLOCK, attrs.top_k)))
    operands += [Operand("scores", (padded,)), Operand("choice", (padded,))]
    title = f"route, {attrs.scoring}, {attrs.top_k} of {attrs.experts}"
    scratch = (("scores", padded), ("choice", padded))
    return RowKernel(title, "a row", "args.rows", 1, (Stage(build, tuple(operands)),), scratch)


def _check_route(attrs: ops.Route, request: KernelRequest) -> None:
    where = f"The router at {place_of(request)}"
    if not 0 < attrs.top_k <= attrs.experts:
        raise HetcompError(f"{where} chooses {attrs.top_k} of {attrs.experts} experts.")
    if attrs.experts % attrs.groups or not 0 < attrs.top_groups <= attrs.groups:
        raise HetcompError(f"{where} chooses {attrs.top_groups} of {attrs.groups} groups of {attrs.experts} experts.")
    if attrs.group_score == "top2" and attrs.groups > 1 and attrs.experts // attrs.groups < 2:
        raise HetcompError(f"{where} scores groups by their two best experts, but a group has only one.")


def _linear(request: KernelRequest) -> RowKernel:
    attrs = request.op.attrs
    assert isinstance(attrs, ops.Linear)
    if request.inputs[1].format != "f32":
        raise HetcompError(
            f"The linear at {place_of(request)} has {request.inputs[1].format} weights; TVM's kernel takes f32."
        )
    k, out = attrs.in_features, attrs.out_features

    def build() -> object:
        from hetcomp.backends import tvm_linear

        return tvm_linear.linear(k, out, attrs.bias)

    operands = [Operand("args.in[0]", (ALL, k)), Operand("args.in[1]", (BLOCK, k, 16))]
    if attrs.bias:
        operands.append(Operand("args.in[2]", (out,)))
    operands.append(Operand("args.out[0]", (ALL, out)))
    stage = Stage(build, tuple(operands), pass_begin=True)
    return RowKernel(f"linear {k} -> {out}", "a block of 16 outputs", str(-(-out // 16)), 1, (stage,))


BUILDERS: Mapping[type, Callable[[KernelRequest], RowKernel]] = {
    ops.RmsNorm: _rms_norm,
    ops.LayerNorm: _layer_norm,
    ops.RopeTable: _rope_table,
    ops.Rope: _rope,
    ops.Route: _route,
    ops.Glu: _glu,
    ops.Activation: _activation,
    ops.Add: _add,
    ops.Mul: _mul,
    ops.Scale: _scale,
    ops.Slice: _slice,
    ops.Concat: _concat,
    ops.Linear: _linear,
}
