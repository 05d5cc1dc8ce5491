"""``hetcomp explain``: why a model is as fast as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hetcomp.cli.guard import guard
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.bench import BenchRecord
    from hetcomp.executable import Executable
    from hetcomp.explain import Explanation
    from hetcomp.hardware.profile import HardwareProfile

# Op classes below this part of a case's time are left out of the table.
SMALLEST_SHARE = 0.01
# Of the short measurement where there is no record: a prompt, a context, decode steps, rounds.
_PROMPT, _CONTEXT, _TOKENS, _ROUNDS = 256, 128, 16, 3


def explain_command(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL.hetc", help="A compiled model.")],
    record: Annotated[
        Path | None, typer.Option("--record", help="Default: what hetcomp bench stored last, or a short run now.")
    ] = None,
    hw: Annotated[str, typer.Option("--hw", help="Profile whose ceilings count: auto, or a file.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Shows for each op class what share of this machine's ceilings it reached, and what holds it."""

    def body() -> None:
        from hetcomp.bench import read_record, record_path
        from hetcomp.executable import Executable
        from hetcomp.explain import dram_gb_per_s, explain
        from hetcomp.hardware.profile import load_profile

        if not (artifact / "manifest.json").is_file():
            raise HetcompError(f"{artifact} is not a hetcomp artifact: it has no manifest.json. Compile a model first.")
        exe, profile = Executable(artifact), load_profile(hw)  # weights are read only for a run
        stored = record or record_path(artifact)
        taken = read_record(stored) if record or stored.is_file() else _short_run(exe, profile)
        found = explain(exe.plan, profile, taken)
        ceiling = dram_gb_per_s(profile, taken)
        if as_json:
            typer.echo(json.dumps([asdict(e) for e in found], indent=1))
        else:
            _print(found, ceiling, taken)

    guard(body, debug)


def _short_run(exe: Executable, profile: HardwareProfile) -> BenchRecord:
    """A measurement that is not stored, for an artifact that was never benched."""
    from hetcomp.bench import bench
    from hetcomp.cli.progress import RichProgress
    from hetcomp.ir.kv_pool import KvPool

    room = KvPool.of(exe.plan.max_dims()).longest
    steps = min(_TOKENS, max(1, room // 4))
    with RichProgress(Console(stderr=True)) as progress:
        return bench(
            exe,
            profile,
            prompts=(min(_PROMPT, room),),
            contexts=(max(1, min(_CONTEXT, room - steps)),),
            tokens=steps,
            rounds=_ROUNDS,
            progress=progress,
        )


def _print(found: Sequence[Explanation], ceiling: float, record: BenchRecord) -> None:
    console = Console()
    console = Console(width=max(console.width, 120))
    reads = f"; plain reads gave {record.gb_per_s:.1f} during the run" if record.gb_per_s else ""
    console.print(
        f"DRAM: {ceiling:.1f} GB/s{reads}; run of {record.measured_at}: {record.prompt}, "
        f"{record.threads} threads, {record.isa}",
        highlight=False,
        soft_wrap=True,
    )
    for case in dict.fromkeys(e.case for e in found):
        console.print(_table(case, [e for e in found if e.case == case]))


def _table(case: str, found: Sequence[Explanation]) -> Table:
    links = any(e.link is not None for e in found)
    table = Table(title=case, title_justify="left")
    table.add_column("op class", no_wrap=True)
    for name in ("ms", "of the time", "of DRAM", "of FLOP/s", *(["of PCIe"] if links else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("held by")
    for e in found:
        if e.share >= SMALLEST_SHARE:
            figures = [f"{e.measured_ms:.3f}", f"{e.share:.0%}", f"{e.memory:.0%}", f"{e.compute:.0%}"]
            figures += [f"{e.link:.0%}" if e.link is not None else ""] if links else []
            table.add_row(e.role, *figures, e.held_by)
    return table
