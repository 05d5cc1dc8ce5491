"""TIR of linear on f32 weights: the second opinion on the hand-written kernels."""

# TVMScript: the decorated bodies are parsed by TVM, whose decorators carry no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

# Rows of the weight that stand side by side in the packed layout [out / 16][in][16].
PACK = 16


def linear(in_features: int, out_features: int, bias: bool) -> Any:  # noqa: ANN401
    """x f32[rows, in], weight f32[n, in, 16](, bias f32[out]), y f32[rows, out], first block -> nothing.

    Computes the columns of ``n`` blocks of 16 outputs from block ``first`` on, for all rows.
    """

    @T.inline
    def block(x, w, y, r, j, first, acc, start):  # noqa: ANN001, ANN202
        for v in T.vectorized(PACK):
            acc[v] = start[v]
        for k in T.serial(in_features):
            for v in T.vectorized(PACK):
                acc[v] = acc[v] + x[r, k] * w[j, k, v]
        if (first + j) * PACK + PACK <= out_features:
            for v in T.vectorized(PACK):
                y[r, (first + j) * PACK + v] = acc[v]
        else:
            for v in T.serial(out_features % PACK):
                y[r, (first + j) * PACK + v] = acc[v]

    @T.prim_func
    def plain(x_: T.handle, w_: T.handle, y_: T.handle, first: T.int64) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        n = T.int64()
        x = T.match_buffer(x_, (rows, in_features), "float32", align=4)
        w = T.match_buffer(w_, (n, in_features, PACK), "float32", align=4)
        y = T.match_buffer(y_, (rows, out_features), "float32", align=4)
        acc = T.alloc_buffer((PACK,), "float32")
        start = T.alloc_buffer((PACK,), "float32")
        for v in T.vectorized(PACK):
            start[v] = T.float32(0)
        for r in T.serial(rows):
            for j in T.serial(n):
                block(x, w, y, r, j, first, acc, start)

    @T.prim_func
    def biased(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle, first: T.int64) -> None:
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        n = T.int64()
        x = T.match_buffer(x_, (rows, in_features), "float32", align=4)
        w = T.match_buffer(w_, (n, in_features, PACK), "float32", align=4)
        b = T.match_buffer(b_, (out_features,), "float32", align=4)
        y = T.match_buffer(y_, (rows, out_features), "float32", align=4)
        acc = T.alloc_buffer((PACK,), "float32")
        start = T.alloc_buffer((PACK,), "float32")
        for r in T.serial(rows):
            for j in T.serial(n):
                for v in T.serial(PACK):
                    start[v] = T.float32(0)
                for v in T.serial(T.min(PACK, out_features - (first + j) * PACK)):
                    start[v] = b[(first + j) * PACK + v]
                block(x, w, y, r, j, first, acc, start)

    return biased if bias else plain
