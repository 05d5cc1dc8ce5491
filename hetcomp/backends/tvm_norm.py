"""TIR of rms_norm and layer_norm."""

# TVMScript: the decorated bodies are parsed by TVM, whose decorators carry no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import operator
from typing import Any

from tvm.script import tirx as T

from hetcomp.backends.tvm_math import tree


def rms_norm(groups: int, width: int, eps: float, weight_offset: float, lanes: int) -> Any:  # noqa: ANN401
    """x f32[n, groups, width], weight f32[width] -> y of x's shape.

    The sum of squares is kept in ``span`` partial sums that are added at the end: f32 addition may not be
    reordered by the compiler, so one running sum would not vectorise.
    """
    span = 4 * lanes if width >= 16 * lanes else lanes
    blocks = width // span
    tail = width - blocks * span

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, groups, width), "float32", align=4)
        w = T.match_buffer(w_, (width,), "float32", align=4)
        y = T.match_buffer(y_, (n, groups, width), "float32", align=4)
        partial = T.alloc_buffer((span,), "float32")
        total = T.alloc_buffer((1,), "float32")
        for r in T.serial(n):
            for g in T.serial(groups):
                for v in T.vectorized(span):
                    partial[v] = T.float32(0)
                for i in T.serial(blocks):
                    for v in T.vectorized(span):
                        partial[v] = partial[v] + x[r, g, i * span + v] * x[r, g, i * span + v]
                total[0] = tree(operator.add, partial, span)
                for i in T.serial(tail):
                    total[0] = total[0] + x[r, g, blocks * span + i] * x[r, g, blocks * span + i]
                total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(width) + T.float32(eps))
                for i in T.serial(blocks):
                    for v in T.vectorized(span):
                        y[r, g, i * span + v] = (x[r, g, i * span + v] * total[0]) * (
                            w[i * span + v] + T.float32(weight_offset)
                        )
                for i in T.serial(tail):
                    y[r, g, blocks * span + i] = (x[r, g, blocks * span + i] * total[0]) * (
                        w[blocks * span + i] + T.float32(weight_offset)
                    )

    return kernel


def layer_norm(width: int, eps: float, lanes: int) -> Any:  # noqa: ANN401
    """x f32[n, width], weight and bias f32[width] -> y f32[n, width].

    The variance is that of x - mean, in a second pass: the mean of squares less the square of the mean would cancel.
    """
    span = 4 * lanes if width >= 16 * lanes else lanes
    blocks = width // span
    tail = width - blocks * span

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, width), "float32", align=4)
        w = T.match_buffer(w_, (width,), "float32", align=4)
        b = T.match_buffer(b_, (width,), "float32", align=4)
        y = T.match_buffer(y_, (n, width), "float32", align=4)
        partial = T.alloc_buffer((span,), "float32")
        mean = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        for r in T.serial(n):
            for v in T.vectorized(span):
                partial[v] = T.float32(0)
            for i in T.serial(blocks):
                for v in T.vectorized(span):
                    partial[v] = partial[v] + x[r, i * span + v]
            mean[0] = tree(operator.add, partial, span)
            for i in T.serial(tail):
                mean[0] = mean[0] + x[r, blocks * span + i]
            mean[0] = mean[0] / T.float32(width)
            for v in T.vectorized(span):
                partial[v] = T.float32(0)
            for i in T.serial(blocks):
                for v in T.vectorized(span):
                    y[r, i * span + v] = x[r, i * span + v] - mean[0]
                    partial[v] = partial[v] + y[r, i * span + v] * y[r, i * span + v]
            total[0] = tree(operator.add, partial, span)
            for i in T.serial(tail):
                y[r, blocks * span + i] = x[r, blocks * span + i] - mean[0]
                total[0] = total[0] + y[r, blocks * span + i] * y[r, blocks * span + i]
            total[0] = T.float32(1) / T.sqrt(total[0] / T.float32(width) + T.float32(eps))
            for i in T.serial(blocks):
                for v in T.vectorized(span):
                    y[r, i * span + v] = (y[r, i * span + v] * total[0]) * w[i * span + v] + b[i * span + v]
            for i in T.serial(tail):
                y[r, blocks * span + i] = (y[r, blocks * span + i] * total[0]) * w[blocks * span + i] + b[
                    blocks * span + i
                ]

    return kernel
