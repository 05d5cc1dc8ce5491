"""Runs an iterator in a thread of its own, ahead of whoever consumes it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class _End:
    """The iterator is at its end, or raised ``error``."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Producer(threading.Thread, Generic[_T]):
    """Makes one item while the consumer holds another."""

    def __init__(self, items: Generator[_T], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._items = items
        self.made: queue.SimpleQueue[_T | _End] = queue.SimpleQueue()
        # Given before an item is begun, so that no more than one lies ready or is being made.
        self.wanted = threading.Semaphore(1)
        self.stopped = False

    def run(self) -> None:
        try:
            while True:
                self.wanted.acquire()
                if self.stopped:
                    return
                try:
                    # Without a name: a name would keep the item alive while the next one is made.
                    self.made.put(next(self._items))
                except StopIteration:
                    self.made.put(_End())
                    return
        except BaseException as error:
            self.made.put(_End(error))
        finally:
            self._items.close()


def prefetch(items: Generator[_T], name: str) -> Generator[_T]:
    """The items in order; the next one is made while the consumer works on the last, and no further one begun.

    At most two items exist at a time if the consumer drops each before it asks for the next. What ``items`` raises
    is raised here. When the consumer stops early (``close`` of this generator, or an exception), the item
    in the making is waited for and ``items`` is closed, in its own thread. ``name``: of the thread.
    """
    producer = _Producer(items, name)
    producer.start()
    try:
        while True:
            made = producer.made.get()
            producer.wanted.release()
            if isinstance(made, _End):
                if made.error is not None:
                    raise made.error
                return
            yield made
            del made
    finally:
        producer.stopped = True
        producer.wanted.release()
        producer.join()
