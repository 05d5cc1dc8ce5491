"""The one exception type that users see."""

from __future__ import annotations


class HetcompError(Exception):
    """A refusal with one clear sentence: what, what was expected, what to do.

    Raised for bad input (files, configs, shapes, requests) and for what this machine lacks. The CLI prints the
    message and exits with 1; a traceback is shown only with ``--debug``. Anything else that escapes is a bug.
    """


class DoesNotFit(HetcompError):
    """Refused because memory is short: ``needed`` bytes where ``free`` are there. ``needed`` may be the smaller where
    the sum would do, but no placement keeps every device within its own memory."""

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free
