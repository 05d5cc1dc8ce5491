"""An iterator that runs ahead: order, how far, errors and early ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import closing

import pytest

from hetcomp.prefetch import prefetch


def test_items_come_in_order_from_another_thread():
    def items() -> Generator[tuple[int, str]]:
        for i in range(50):
            yield i, threading.current_thread().name

    assert list(prefetch(items(), "ahead")) == [(i, "ahead") for i in range(50)]


def test_one_item_is_made_ahead_and_no_more():
    begun: list[int] = []

    def items() -> Generator[int]:
        for i in range(10):
            begun.append(i)
            yield i

    with closing(prefetch(items(), "ahead")) as stream:
        for i in range(5):
            assert next(stream) == i
            until = time.monotonic() + 5
            while len(begun) < i + 2 and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.01)
            assert begun == list(range(i + 2))


def test_errors_reach_the_consumer_after_the_items_before_them():
    def items() -> Generator[int]:
        yield 1
        raise ValueError("disk on fire")

    stream = prefetch(items(), "ahead")
    assert next(stream) == 1
    with pytest.raises(ValueError, match="disk on fire"):
        next(stream)


def test_stopping_early_closes_the_items_and_ends_the_thread():
    closed: list[str] = []

    def items() -> Generator[int]:
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    # As packing does it: one runs ahead of another.
    with pytest.raises(KeyboardInterrupt), closing(prefetch(prefetch(items(), "inner"), "outer")) as stream:
        for i in stream:
            if i == 3:
                raise KeyboardInterrupt
    assert closed == ["inner"]
    assert not {t.name for t in threading.enumerate()} & {"inner", "outer"}
