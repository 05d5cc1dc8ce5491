"""``hetcomp explain``: why a model is as fast as it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hetcomp.cli.guard import guard

# Op classes below this part of a case's time are left out of the table.
SMALLEST_SHARE = 0.01


def explain_command(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL.hetc", help="A compiled model.")],
    record: Annotated[Path | None, typer.Option("--record", help="Default: what hetcomp bench stored last.")] = None,
    hw: Annotated[str, typer.Option("--hw", help="Profile whose ceilings count: auto, or a file.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Shows for each op class what share of this machine's ceilings it reached, and what holds it."""

    def body() -> None:
        import hetcomp
        from hetcomp.bench import read_record, record_path
        from hetcomp.explain import explain
        from hetcomp.hardware.profile import load_profile

        exe = hetcomp.load(artifact)
        found = explain(exe.plan, load_profile(hw), read_record(record or record_path(artifact)))
        if as_json:
            typer.echo(json.dumps([asdict(e) for e in found], indent=1))
            return
        console = Console()
        console = Console(width=max(console.width, 120))
        for case in dict.fromkeys(e.case for e in found):
            table = Table(title=case, title_justify="left")
            table.add_column("op class", no_wrap=True)
            for name in ("ms", "of the time", "of DRAM", "of FLOP/s"):
                table.add_column(name, justify="right", no_wrap=True)
            table.add_column("held by")
            for e in found:
                if e.case == case and e.share >= SMALLEST_SHARE:
                    figures = (f"{e.measured_ms:.3f}", f"{e.share:.0%}", f"{e.memory:.0%}", f"{e.compute:.0%}")
                    table.add_row(e.role, *figures, e.held_by)
            console.print(table)

    guard(body, debug)
