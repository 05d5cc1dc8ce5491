"""What the runtime tells of each step through callbacks of the C ABI, collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Told = TypeVar("Told")


@contextmanager
def collected(
    listen: Callable[[Any], None],
    kind: Any,  # noqa: ANN401 - a function type of ctypes
    copy: Callable[[Any], Told],
) -> Iterator[list[Told]]:
    """Within, ``copy`` of what each step tells is added to the list, from whichever thread the step is run.

    listen: registers a callback of type ``kind``, and none where it is null. What ``copy`` raises is raised at the end.
    """
    steps: list[Told] = []
    failed: list[Exception] = []

    def add(told: Any, _user: object) -> None:  # noqa: ANN401 - a pointer of ctypes
        try:
            steps.append(copy(told.contents))
        except Exception as error:  # ctypes would only print it
            failed.append(error)

    callback = kind(add)
    listen(callback)
    try:
        yield steps
    finally:
        listen(kind())
    if failed:
        raise failed[0]
