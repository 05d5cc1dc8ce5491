"""TIR of the elementwise and copying kinds. Loops are split by hand into whole vectors and a scalar tail."""

# TVMScript: the decorated bodies are parsed by TVM, whose decorators carry no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

Expr = Any
PrimFunc = Any


def unary(f: Callable[[Expr], Expr], lanes: int) -> PrimFunc:
    """x f32[n] -> y f32[n], y = f(x)."""

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n,), "float32", align=4)
        y = T.match_buffer(y_, (n,), "float32", align=4)
        for i in T.serial(n // lanes):
            for v in T.vectorized(lanes):
                y[i * lanes + v] = f(x[i * lanes + v])
        for i in T.serial(n % lanes):
            y[n // lanes * lanes + i] = f(x[n // lanes * lanes + i])

    return kernel


def binary(f: Callable[[Expr, Expr], Expr], lanes: int) -> PrimFunc:
    """a, b f32[n] -> y f32[n], y = f(a, b)."""

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        a = T.match_buffer(a_, (n,), "float32", align=4)
        b = T.match_buffer(b_, (n,), "float32", align=4)
        y = T.match_buffer(y_, (n,), "float32", align=4)
        for i in T.serial(n // lanes):
            for v in T.vectorized(lanes):
                y[i * lanes + v] = f(a[i * lanes + v], b[i * lanes + v])
        for i in T.serial(n % lanes):
            y[n // lanes * lanes + i] = f(a[n // lanes * lanes + i], b[n // lanes * lanes + i])

    return kernel


def multiply_rows(width: int, lanes: int) -> PrimFunc:
    """a f32[n, width], b f32[n] -> y f32[n, width], y = a * b."""
    whole = width // lanes

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        a = T.match_buffer(a_, (n, width), "float32", align=4)
        b = T.match_buffer(b_, (n,), "float32", align=4)
        y = T.match_buffer(y_, (n, width), "float32", align=4)
        for r in T.serial(n):
            for i in T.serial(whole):
                for v in T.vectorized(lanes):
                    y[r, i * lanes + v] = a[r, i * lanes + v] * b[r]
            for i in T.serial(width - whole * lanes):
                y[r, whole * lanes + i] = a[r, whole * lanes + i] * b[r]

    return kernel


def copy_columns(
    heads: int, width: int, *, source: tuple[int, int, int], target: tuple[int, int], lanes: int
) -> PrimFunc:
    """x f32[n, x_heads, x_width] -> columns of y f32[n, heads, y_width].

    ``source`` is (x_heads, x_width, first column read), ``target`` (y_width, first column written); ``width``
    columns are copied. x_heads is ``heads`` or 1, then x is repeated.
    """
    x_heads, x_width, x_first = source
    y_width, y_first = target
    step = 1 if x_heads == heads else 0
    whole = width // lanes

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, x_heads, x_width), "float32", align=4)
        y = T.match_buffer(y_, (n, heads, y_width), "float32", align=4)
        for r in T.serial(n):
            for h in T.serial(heads):
                for i in T.serial(whole):
                    for v in T.vectorized(lanes):
                        y[r, h, y_first + i * lanes + v] = x[r, h * step, x_first + i * lanes + v]
                for i in T.serial(width - whole * lanes):
                    y[r, h, y_first + whole * lanes + i] = x[r, h * step, x_first + whole * lanes + i]

    return kernel
