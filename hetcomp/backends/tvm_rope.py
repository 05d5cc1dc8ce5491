"""TIR of rope_table and rope."""

# TVMScript: the decorated bodies are parsed by TVM, whose decorators carry no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

PrimFunc = Any


def rope_table(half: int, scaling: float) -> PrimFunc:
    """positions i32[n], inv_freq f32[half] -> cos, sin f32[n, half].

    cos and sin are libm's: a position of 10^6 needs an argument reduction that a short polynomial has not.
    """

    @T.prim_func
    def kernel(p_: T.handle, f_: T.handle, c_: T.handle, s_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        positions = T.match_buffer(p_, (n,), "int32", align=4)
        inv_freq = T.match_buffer(f_, (half,), "float32", align=4)
        cos = T.match_buffer(c_, (n, half), "float32", align=4)
        sin = T.match_buffer(s_, (n, half), "float32", align=4)
        for r in T.serial(n):
            for i in T.serial(half):
                cos[r, i] = T.cos(T.cast(positions[r], "float32") * inv_freq[i]) * T.float32(scaling)
                sin[r, i] = T.sin(T.cast(positions[r], "float32") * inv_freq[i]) * T.float32(scaling)

    return kernel


def rope(heads: int, head_dim: int, half: int, offset: int, style: str, lanes: int) -> PrimFunc:
    """x f32[n, heads, head_dim], cos, sin f32[n, half] -> y of x's shape; see hetcomp.ir.ops.Rope.

    ``step`` is the distance of neighbouring pairs, ``mate`` that of a pair's two elements, for reading and
    for writing.
    """
    step, mate = (1, half) if style == "half" else (2, 1)
    to_step, to_mate = (2, 1) if style == "interleaved" else (1, half)
    whole = half // lanes
    rest = half - whole * lanes
    behind = offset + 2 * half

    @T.prim_func
    def kernel(x_: T.handle, c_: T.handle, s_: T.handle, y_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, heads, head_dim), "float32", align=4)
        c = T.match_buffer(c_, (n, half), "float32", align=4)
        s = T.match_buffer(s_, (n, half), "float32", align=4)
        y = T.match_buffer(y_, (n, heads, head_dim), "float32", align=4)
        for r in T.serial(n):
            for h in T.serial(heads):
                for i in T.serial(offset):
                    y[r, h, i] = x[r, h, i]
                for j in T.serial(whole):
                    for v in T.vectorized(lanes):
                        y[r, h, offset + (j * lanes + v) * to_step] = (
                            x[r, h, offset + (j * lanes + v) * step] * c[r, j * lanes + v]
                            - x[r, h, offset + (j * lanes + v) * step + mate] * s[r, j * lanes + v]
                        )
                        y[r, h, offset + (j * lanes + v) * to_step + to_mate] = (
                            x[r, h, offset + (j * lanes + v) * step + mate] * c[r, j * lanes + v]
                            + x[r, h, offset + (j * lanes + v) * step] * s[r, j * lanes + v]
                        )
                for i in T.serial(rest):
                    y[r, h, offset + (whole * lanes + i) * to_step] = (
                        x[r, h, offset + (whole * lanes + i) * step] * c[r, whole * lanes + i]
                        - x[r, h, offset + (whole * lanes + i) * step + mate] * s[r, whole * lanes + i]
                    )
                    y[r, h, offset + (whole * lanes + i) * to_step + to_mate] = (
                        x[r, h, offset + (whole * lanes + i) * step + mate] * c[r, whole * lanes + i]
                        + x[r, h, offset + (whole * lanes + i) * step] * s[r, whole * lanes + i]
                    )
                for i in T.serial(head_dim - behind):
                    y[r, h, behind + i] = x[r, h, behind + i]

    return kernel
