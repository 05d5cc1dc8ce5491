"""How commands end: refusals and Ctrl-C as one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Callable

import typer

from hetcomp.cli.start import INTERRUPTED
from hetcomp.errors import HetcompError


def guard(body: Callable[[], None], debug: bool) -> None:
    """Runs a command; a refusal becomes one sentence on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        body()
    except (Exception, KeyboardInterrupt) as error:
        if _is_interruption(error):
            typer.echo(INTERRUPTED, err=True)
            raise typer.Exit(130) from None
        if debug or not isinstance(error, HetcompError):
            raise
        typer.echo(f"hetcomp: {error}", err=True)
        raise typer.Exit(1) from None


def _is_interruption(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the bottom of it: transformers answers one within its lazy imports with an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
