"""``hetcomp importance``: which columns of the weights matter most on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hetcomp.cli.guard import guard
from hetcomp.cli.options import Debug, Model


def importance_command(
    model: Model,
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text of the kind that the model is to read.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, e.g. importance.safetensors.")],
    second_moments: Annotated[
        bool, typer.Option("--second-moments", help="For error feedback too: better q4, a far larger file.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Runs MODEL on a text and writes how much each column matters, for compile --importance."""

    def body() -> None:
        from hetcomp.cli.progress import RichProgress
        from hetcomp.importance_from_text import importance_from_text

        with RichProgress(Console(stderr=True)) as progress:
            importance_from_text(model, text, out, second_moments=second_moments, progress=progress)
        typer.echo(f"{out}")

    guard(body, debug)
