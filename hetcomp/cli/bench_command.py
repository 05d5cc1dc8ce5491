"""``hetcomp bench``: predicted beside measured."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hetcomp.cli.guard import guard
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hetcomp.bench import BenchRecord, CaseResult
    from hetcomp.executable import Executable
    from hetcomp.runtime import Runtime


def bench_command(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL.hetc", help="A compiled model.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt lengths.")] = "64,512,2048",
    context: Annotated[str, typer.Option("--context", help="Positions behind which decode is timed.")] = "128,2048",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Decode steps a round.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random tokens of the prompts.")] = 0,
    text: Annotated[
        Path | None, typer.Option("--text", help="Take prompts from this text: routing differs from random tokens'.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay", help="Route as a trace does: a file of hetcomp trace --routing, or zipf:1.1,markov:0.9."
        ),
    ] = None,
    hw: Annotated[str, typer.Option("--hw", help="Profile to predict with: auto, or a file.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Record; default MODEL.bench.json beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Times prefill and decode of MODEL.hetc and holds the plan's predictions against them."""

    def body() -> None:
        import hetcomp
        from hetcomp.bench import bench, record_path
        from hetcomp.cli.profile_command import write_text
        from hetcomp.cli.progress import RichProgress
        from hetcomp.hardware.profile import load_profile

        target = out or record_path(artifact)
        lengths, positions = _lengths("--prompt", prompt), _lengths("--context", context)
        profile = load_profile(hw)
        if text is not None and replay is not None:
            raise HetcompError("--text and --replay both say how tokens are routed; give one of them.")
        exe = hetcomp.load(artifact)
        _refuse_unwritable(target)
        with RichProgress(Console(stderr=True)) as progress, _prompts(exe, text, replay) as (ids, name):
            record = bench(
                exe,
                profile,
                prompts=lengths,
                contexts=positions,
                tokens=tokens,
                rounds=rounds,
                seed=seed,
                text=ids,
                text_name=name,
                progress=progress,
            )
        write_text(target, record.to_json())
        if as_json:
            typer.echo(record.to_json(), nl=False)
            return
        console = Console()
        console = Console(width=max(console.width, 100))  # rich would cut the figures off
        console.print(_table(record))
        for line in verdict(record, target):
            console.print(line, soft_wrap=True, highlight=False)

    guard(body, debug)


def _refuse_unwritable(target: Path) -> None:
    """Raises HetcompError now rather than after minutes of measuring."""
    if target.is_dir() or not os.access(target.absolute().parent, os.W_OK):
        raise HetcompError(f"The record cannot be written to {target}; choose a file in another folder with --out.")


@contextmanager
def _prompts(exe: Executable, text: Path | None, replay: str | None) -> Iterator[tuple[Sequence[int] | None, str]]:
    """The tokens to run, None for random ones, and what the record calls them."""
    if replay is None:
        yield (None, "random tokens") if text is None else (_text_ids(exe.runtime, text), "text")
        return
    from hetcomp.replay_routing import replayed_routing, routing_of

    with replayed_routing(exe, routing_of(replay, exe.plan)) as replayed:
        yield replayed.ids, replayed.note


def _text_ids(runtime: Runtime, path: Path) -> list[int]:
    try:
        return runtime.tokenize(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"--text {path} cannot be read: {error}; give a text file in UTF-8.") from None


def _lengths(option: str, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        lengths = (0,)
    if any(n < 1 for n in lengths):
        raise HetcompError(f"{option} {text} is not a list of lengths such as 64,512.")
    return lengths


def _table(record: BenchRecord) -> Table:
    table = Table(title=f"{record.model} on {record.cpu}, {record.threads} threads", title_justify="left")
    table.add_column("case", no_wrap=True)
    for name in ("predicted ms", "measured ms", "predicted tok/s", "measured tok/s", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in record.cases:
        table.add_row(
            case.name,
            f"{case.predicted_ms:.3f}",
            f"{case.measured_ms:.3f}",
            f"{case.tokens / case.predicted_ms * 1e3:,.1f}",
            f"{case.tokens / case.measured_ms * 1e3:,.1f}",
            f"{case.deviation:+.1%}",
        )
    return table


def verdict(record: BenchRecord, stored: Path) -> list[str]:
    """What is wrong with the predictions, why, and where the record lies."""
    from hetcomp.bench import TOLERANCE

    lines = [f"note: {note}" for note in record.notes]
    for case in record.cases:
        if case.disturbed:
            lines.append(
                f"note: {case.name} took from {min(case.samples_ms):.3f} to {max(case.samples_ms):.3f} ms: something "
                "else took the cores meanwhile, so that its figures say little"
            )
    wrong = [case for case in record.cases if abs(case.deviation) > TOLERANCE]
    for case in wrong:
        role = case.worst
        lines.append(
            f"{case.name} is off by {case.deviation:+.0%}, mostly {role.role} ({role.term}): "
            f"{role.predicted_ms:.3f} ms predicted, {role.typical_ms:.3f} ms measured"
        )
    lines += _bandwidth(record, wrong)
    if wrong:
        lines.append(f"hetcomp profile --calibrate {stored} refits these terms; measure on a quiet machine first")
    lines.append(f"stored in {stored}")
    return lines


def _bandwidth(record: BenchRecord, wrong: Sequence[CaseResult]) -> list[str]:
    """Whether the memory was as fast as in the profile, and whether that explains what is wrong."""
    if record.gb_per_s is None:
        return []
    if record.profile_gb_per_s is None:
        return [
            f"memory read {record.gb_per_s:.1f} GB/s during the run; the profile has no readings to hold it against"
        ]
    from hetcomp.bench import TOLERANCE

    line = f"memory read {record.gb_per_s:.1f} GB/s during the run, {record.profile_gb_per_s:.1f} in the profile"
    change = record.bandwidth_change
    if not change:
        return [line]
    # Memory alone stretches a step by this at most; less bandwidth makes deviations negative.
    stretch = 1 / record.bandwidth_ratio
    same_way = [case for case in wrong if case.deviation * change > 0]
    whole = [c.name for c in same_way if abs(c.predicted_ms * stretch / c.measured_ms - 1) < TOLERANCE]
    part = [c.name for c in same_way if c.name not in whole]
    causes = [f"enough to be the cause of {', '.join(whole)}"] * bool(whole) + [
        f"at most a part of {', '.join(part)}"
    ] * bool(part)
    return [f"{line} ({change:+.0%})" + (f": {'; '.join(causes)}" if causes else "")]
