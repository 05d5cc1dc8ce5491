"""``hetcomp inspect``: where an artifact's weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hetcomp.cli.guard import guard
from hetcomp.cli.options import Debug


def inspect_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A compiled model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    debug: Debug = False,
) -> None:
    """Says where an artifact's weights are, and which files it needs beside its own."""

    def body() -> None:
        from hetcomp.artifact.inspection import inspect_artifact

        found = inspect_artifact(artifact)
        typer.echo(found.to_json() if as_json else found.in_words())

    guard(body, debug)
