"""The interpreter of Triton's IR that GPU kernels are tested with, against numpy: programs that part ways above all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import triton
import triton.language as tl

from tests.reference import ttir_interpreter
from tests.reference.ttir_interpreter import run_function

TYPES = {"float32": "*fp32", "int32": "*i32", "int8": "*i8", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64"}
PROGRAMS = 7


def _run(
    function: Any,
    arrays: Mapping[str, npt.NDArray[Any]],
    programs: int = PROGRAMS,
    scalars: Mapping[str, int] | None = None,
    **constants: int,
) -> None:
    arguments: dict[str, tuple[str, int | float]] = {}
    for name, array in arrays.items():
        arguments[name] = (TYPES[array.dtype.name], array.ctypes.data)
    arguments |= {name: ("i32", value) for name, value in (scalars or {}).items()}
    memory = [range(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays.values()]
    run_function(function, (programs, 1, 1), arguments, constants, memory)


@triton.jit
def loops_of_other_lengths(counts, out, N: tl.constexpr):
    """Within one, programs take branches; what only the loop makes goes on behind it."""
    program = tl.program_id(0)
    lanes = tl.arange(0, N)
    total = tl.zeros([N], tl.int32)
    last = -1
    for i in range(program % 2, tl.load(counts + program), 2):
        if i % 3 == 0:
            total += lanes * i
            last = i
        elif program > 3:
            total -= 1
    tl.store(out + program * (N + 1) + lanes, total)
    tl.store(out + program * (N + 1) + N, last)


def test_loops_and_branches_of_each_program():
    counts = np.array([0, 9, 3, 4, 7, 1, 12], np.int32)
    out = np.full((PROGRAMS, 5), 99, np.int32)
    _run(loops_of_other_lengths, {"counts": counts, "out": out}, N=4)
    for program, count in enumerate(counts):
        total, last = np.zeros(4, int), -1
        for i in range(program % 2, count, 2):
            if i % 3 == 0:
                total, last = total + np.arange(4) * i, i
            elif program > 3:
                total = total - 1
        assert out[program].tolist() == [*total, last], program


@triton.jit
def halve_until_small(x, out):
    program = tl.program_id(0)
    if program == 2:
        return
    value = tl.load(x + program)
    steps = 0
    while value > 10:
        value = value // 2
        steps += 1
    tl.store(out + program, steps * 100 + value)


def test_while_and_an_early_return():
    x = np.array([3, 1000, 50, 11, 10, 21, 123456], np.int32)
    out = np.full(PROGRAMS, -1, np.int32)
    _run(halve_until_small, {"x": x, "out": out})
    for program, value in enumerate(x.tolist()):
        steps = 0
        while value > 10:
            value, steps = value // 2, steps + 1
        assert out[program] == (-1 if program == 2 else steps * 100 + value)


@triton.jit
def last_step_at_the_end_of_i32(out):
    """Where programs' loops end differently, none goes on because its counter ran over."""
    program = tl.program_id(0)
    turns = 0
    for _ in range(0x7FFFFFFF - 64 * (program % 2), 0x7FFFFFFF, 64):
        turns += 1
    tl.store(out + program, turns)


def test_counters_end_with_their_type():
    out = np.full(PROGRAMS, -1, np.int32)
    _run(last_step_at_the_end_of_i32, {"out": out})
    assert out.tolist() == [0, 1, 0, 1, 0, 1, 0]


@triton.jit
def reduced(x, sums, places, running, back, ROWS: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, N)
    block = tl.load(x + (program * ROWS + rows[:, None]) * N + columns[None])
    tl.store(sums + program * N + columns, tl.sum(block, axis=0))
    tl.store(places + program * ROWS + rows, tl.argmax(block, axis=1))
    at = (program * ROWS + rows[:, None]) * N + columns[None]
    tl.store(running + at, tl.cumsum(block, axis=1))
    tl.store(back + at, tl.cumsum(block, axis=0, reverse=True))


def test_reductions_and_scans():
    rng = np.random.default_rng(3)
    x = rng.integers(-3, 4, (PROGRAMS, 8, 16)).astype(np.float32)  # with ties, of which the first is the place
    sums, places = np.empty((PROGRAMS, 16), np.float32), np.empty((PROGRAMS, 8), np.int32)
    running, back = np.empty_like(x), np.empty_like(x)
    arrays = {"x": x, "sums": sums, "places": places, "running": running, "back": back}
    _run(reduced, arrays, ROWS=8, N=16)
    np.testing.assert_array_equal(sums, x.sum(1))
    np.testing.assert_array_equal(places, x.argmax(2))
    np.testing.assert_array_equal(running, x.cumsum(2))
    np.testing.assert_array_equal(back, x[:, ::-1].cumsum(1)[:, ::-1])


@triton.jit
def multiplied(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    program = tl.program_id(0)
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + program * M * K + m[:, None] * K + k[None])
    right = tl.load(b + n[:, None] * K + k[None])
    tl.store(c + program * M * N + m[:, None] * N + n[None], tl.dot(left, tl.trans(right)))


def test_products_of_bf16():
    rng = np.random.default_rng(4)
    a = rng.normal(size=(PROGRAMS, 16, 32)).astype(ml_dtypes.bfloat16)
    b = rng.normal(size=(16, 32)).astype(ml_dtypes.bfloat16)
    c = np.empty((PROGRAMS, 16, 16), np.float32)
    _run(multiplied, {"a": a, "b": b, "c": c}, M=16, N=16, K=32)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(c, want, rtol=0, atol=32 * 2.0**-24 * np.abs(want).max())


@triton.jit
def converted(x, halves, brains, wholes, quotients, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(halves + i, value.to(tl.float16))
    tl.store(brains + i, value.to(tl.bfloat16))
    whole = value.to(tl.int32)
    tl.store(wholes + i, whole)
    tl.store(quotients + i, whole // 7 * 1000 + whole % 7)


def test_conversions_round_as_gpus_do():
    rng = np.random.default_rng(5)
    x = (rng.normal(size=64) * 10.0 ** rng.integers(-3, 4, 64)).astype(np.float32)
    x[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0  # ties of bf16: to the even one
    halves, brains = np.empty(64, np.float16), np.empty(64, ml_dtypes.bfloat16)
    wholes, quotients = np.empty(64, np.int32), np.empty(64, np.int32)
    _run(converted, {"x": x, "halves": halves, "brains": brains, "wholes": wholes, "quotients": quotients}, 1, N=64)
    np.testing.assert_array_equal(halves, x.astype(np.float16))
    np.testing.assert_array_equal(brains.view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert brains[0] == 1 and brains[1] == 1 + 2.0**-6
    np.testing.assert_array_equal(wholes, np.trunc(x).astype(np.int32))
    quotient = np.trunc(wholes / 7).astype(int)  # of whole numbers as C does: towards zero
    np.testing.assert_array_equal(quotients, quotient * 1000 + wholes - 7 * quotient)


@triton.jit
def scaled(x, out, factor):
    program = tl.program_id(0)
    tl.store(out + program, tl.load(x + program) * factor)


def test_what_does_not_fit_in_32_bits_is_an_error():
    x, out = np.arange(PROGRAMS, dtype=np.int32), np.empty(PROGRAMS, np.int32)
    _run(scaled, {"x": x, "out": out}, scalars={"factor": (2**31 - 1) // 6})
    np.testing.assert_array_equal(out, x * ((2**31 - 1) // 6))
    with pytest.raises(OverflowError, match="muli"):
        _run(scaled, {"x": x, "out": out}, scalars={"factor": (2**31 - 1) // 6 + 1})


def test_how_many_run_side_by_side_changes_no_bit(monkeypatch):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(PROGRAMS, 8, 16)).astype(np.float32)
    found = []
    for numbers in (1, 300, 1 << 20):  # one program, two, all
        monkeypatch.setattr(ttir_interpreter, "_NUMBERS_AT_ONCE", numbers)
        arrays = {"x": x, "sums": np.empty((PROGRAMS, 16), np.float32), "places": np.empty((PROGRAMS, 8), np.int32)}
        arrays |= {"running": np.empty_like(x), "back": np.empty_like(x)}
        _run(reduced, arrays, ROWS=8, N=16)
        found.append([a.tobytes() for a in arrays.values()])
    assert found[0] == found[1] == found[2]
