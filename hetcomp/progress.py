"""How long work reports its progress without knowing who shows it."""

from __future__ import annotations

import warnings
from typing import Protocol


class ProgressSink(Protocol):
    """Receives stages, steps and remarks of a compile."""

    def stage(self, name: str, total: float | None = None) -> None:
        """A new stage begins; the one before is done."""
        ...

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """The stage went on by ``amount`` of its total."""
        ...

    def warn(self, message: str) -> None:
        """A remark for the user that is not an error."""
        ...


class QuietProgress:
    """Shows nothing; remarks become Python warnings (the API's default)."""

    def stage(self, name: str, total: float | None = None) -> None:
        """Ignored."""

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """Ignored."""

    def warn(self, message: str) -> None:
        """Passes the remark to :mod:`warnings`."""
        warnings.warn(message, stacklevel=3)
