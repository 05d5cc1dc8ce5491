"""``hetcomp inspect``: what an artifact's weights are stored and computed in, and where they are."""

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
    """Says what an artifact's weights are stored and computed in, where they are, and which files it needs beside its
    own."""

    def body() -> None:
        import json
        from dataclasses import asdict

        from rich.console import Console

        from hetcomp.artifact.inspection import inspect_artifact
        from hetcomp.cli.plan_json import matrices
        from hetcomp.cli.plan_weights import weight_table
        from hetcomp.ir.serialise import read_plan

        found = inspect_artifact(artifact)
        plan = read_plan(artifact / "plan.json")
        if as_json:
            classes = [one.model_dump() for one in matrices(plan)]
            typer.echo(json.dumps(asdict(found) | {"matrices": classes}, indent=1))
            return
        if (table := weight_table(plan)) is not None:
            Console().print(table)
        typer.echo(found.in_words())

    guard(body, debug)
