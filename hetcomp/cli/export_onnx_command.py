"""``hetcomp export-onnx``: a model as an ONNX graph with hetcomp's ops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hetcomp.cli.guard import guard
from hetcomp.cli.options import Debug, Model


def export_onnx_command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, e.g. model.onnx; weights beside it.")],
    debug: Debug = False,
) -> None:
    """Writes MODEL as an ONNX file that can be inspected, archived, and compiled without transformers."""

    def body() -> None:
        from hetcomp.cli.progress import RichProgress
        from hetcomp.export_onnx import export_onnx

        with RichProgress(Console(stderr=True)) as progress:
            export_onnx(model, out, progress=progress)
        typer.echo(f"{out}")

    guard(body, debug)
