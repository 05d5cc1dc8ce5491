"""Kernels that hand over by themselves: what they copy and add, and for which flags they wait."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.gpu.hand_out import add_missing, ask
from hetcomp.backends.gpu.kernels import Launch
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference.ttir_interpreter import run_kernel

EXPERTS, HIDDEN = 8, 96
OP = Op("experts", MoeExperts(EXPERTS, 2, HIDDEN, 32, "silu"), ("x", "ids", "weights"), ("sum",))


def value(name: str, dtype: DType, *shape: int | str) -> Value:
    return Value(name, TensorType(dtype, shape), ValueKind.ACT)


@dataclass
class Memory:
    """Arrays that kernels get by the names of their arguments."""

    arrays: dict[str, np.ndarray[Any, Any]]

    def run(self, launch: Launch, rows: int) -> None:
        names = [name for name, _ in launch.kernel.arguments]
        areas = [range(a.ctypes.data, a.ctypes.data + a.nbytes) for a in self.arrays.values()]
        values = {name: self.arrays[name].ctypes.data for name in names}
        x, y, z = (axis.programs(rows) for axis in launch.grid)
        run_kernel(launch.kernel, (x, y, z), values, areas)

    def start(self, launch: Launch, rows: int) -> threading.Thread:
        thread = threading.Thread(target=self.run, args=(launch, rows), daemon=True)
        thread.start()
        return thread


def flag(raised: int = 0) -> np.ndarray[Any, Any]:
    return np.full(1, raised, np.int32)


def asking(rows: int, hidden: int, top_k: int) -> tuple[Launch, Memory]:
    values = value("x", DType.F32, "T", hidden), value("ids", DType.I32, "T", top_k), value("w", DType.F32, "T", top_k)
    (launch,) = ask(OP, values, ("x_out", "ids_out", "w_out"), rows, 1).code.launches
    rng = np.random.default_rng(rows * hidden)
    arrays = {
        "x": rng.standard_normal((rows, hidden)).astype(np.float32),
        "ids": rng.integers(0, EXPERTS, (rows, top_k)).astype(np.int32),
        "weights": rng.random((rows, top_k)).astype(np.float32),
        "asks": flag(),
    }
    empty = {f"{name}_out": np.zeros_like(arrays[name]) for name in ("x", "ids", "weights")}
    return launch, Memory(arrays | empty)


@given(rows=st.integers(1, 3), hidden=st.sampled_from([32, 96, 5000]), top_k=st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_ask_hands_out_everything_and_raises_its_flag(rows, hidden, top_k):
    launch, memory = asking(rows, hidden, top_k)
    memory.run(launch, rows)
    for name in ("x", "ids", "weights"):
        np.testing.assert_array_equal(memory.arrays[f"{name}_out"], memory.arrays[name])
    assert memory.arrays["asks"][0] == 1


def adding(
    ids: list[list[int]], places: list[int], onto: bool = False, before: int | None = None
) -> tuple[Launch, Memory]:
    rows, top_k = len(ids), len(ids[0])
    here, there, more, total = (value(name, DType.F32, "T", HIDDEN) for name in ("here", "there", "onto", "total"))
    table, chosen = value("places", DType.I32, EXPERTS), value("ids", DType.I32, "T", top_k)
    group = add_missing(OP, here, there, chosen, table, more if onto else None, total, 0, before)
    (launch,) = group.code.launches
    rng = np.random.default_rng(rows)
    shape = (rows, HIDDEN)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name in ("here", "there", "onto", "total")}
    arrays |= {"ids": np.array(ids, np.int32), "places": np.array(places, np.int32)}
    arrays |= {"answers": flag(), "before": flag()}
    return launch, Memory(arrays)


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    top_k = draw(st.integers(1, 5))
    row = st.lists(st.integers(0, EXPERTS - 1), min_size=top_k, max_size=top_k, unique=True)
    places = draw(st.lists(st.integers(-1, 3), min_size=EXPERTS, max_size=EXPERTS))
    return draw(st.lists(row, min_size=1, max_size=4)), places


@given(routings(), st.booleans(), st.sampled_from([None, 7]))
@settings(max_examples=30, deadline=None)
def test_only_rows_with_a_choice_of_the_cpu_get_its_sum(case, onto, before):
    ids, places = case
    launch, memory = adding(ids, places, onto, before)
    memory.arrays["answers"][0] = memory.arrays["before"][0] = 1
    memory.run(launch, len(ids))
    missing = np.array([any(places[i] < 0 for i in row) for row in ids])[:, None]
    want = np.where(missing, memory.arrays["here"] + memory.arrays["there"], memory.arrays["here"])
    want = memory.arrays["onto"] + want if onto else want
    np.testing.assert_array_equal(memory.arrays["total"], want)


def test_nobody_waits_where_all_choices_are_here():
    launch, memory = adding([[0, 3], [3, 5]], [0, -1, -1, 1, -1, 2, -1, -1])
    memory.run(launch, 2)  # without an answer
    np.testing.assert_array_equal(memory.arrays["total"], memory.arrays["here"])


def test_the_cpu_has_read_what_it_got_before_when_the_launch_is_over():
    launch, memory = adding([[0, 3], [3, 5]], [0, -1, -1, 1, -1, 2, -1, -1], before=7)
    running = memory.start(launch, 2)
    time.sleep(0.2)
    assert running.is_alive()
    memory.arrays["before"][0] = 1
    running.join(30)
    assert not running.is_alive()
    np.testing.assert_array_equal(memory.arrays["total"], memory.arrays["here"])


@pytest.mark.parametrize("ids", [[[0, 1]], [[0, 3], [3, 4]]])
def test_who_needs_the_cpus_sum_waits_for_it(ids):
    launch, memory = adding(ids, [0, -1, -1, 1, -1, 2, -1, -1])
    before = memory.arrays["total"].copy()
    running = memory.start(launch, len(ids))
    time.sleep(0.2)
    assert running.is_alive()
    np.testing.assert_array_equal(memory.arrays["total"][-1], before[-1])
    memory.arrays["there"][:] = 3.0
    memory.arrays["answers"][0] = 1
    running.join(30)
    np.testing.assert_array_equal(memory.arrays["total"][-1], memory.arrays["here"][-1] + np.float32(3.0))
