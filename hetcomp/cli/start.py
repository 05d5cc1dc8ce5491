"""Entry points of the commands. What they import takes a second, on a busy machine several, in which Ctrl-C is answered
as it is later. This module imports next to nothing."""

from __future__ import annotations

import sys
from importlib import import_module

INTERRUPTED = "hetcomp: interrupted; nothing half-written was left behind."


def main() -> None:
    """Entry point of ``hetcomp``."""
    _run("main")


def plan_main() -> None:
    """Entry point of ``hetcomp-plan``."""
    _run("plan_main")


def _run(command: str) -> None:
    try:
        getattr(import_module("hetcomp.cli.main"), command)()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
