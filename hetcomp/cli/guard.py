"""How commands end: refusals and Ctrl-C as one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Callable

import typer

from hetcomp.errors import HetcompError


def guard(body: Callable[[], None], debug: bool) -> None:
    """Runs a command; a refusal becomes one sentence on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        body()
    except HetcompError as error:
        if debug:
            raise
        typer.echo(f"hetcomp: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("hetcomp: interrupted; nothing half-written was left behind.", err=True)
        raise typer.Exit(130) from None
