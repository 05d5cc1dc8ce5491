"""Runs the command line in this process and judges how it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from hetcomp.cli.main import app


@dataclass(frozen=True)
class Outcome:
    """Exit code and what went to the two streams."""

    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Outcome:
    """One ``hetcomp`` command, exceptions that escape it included (they would be tracebacks)."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def refusal(*arguments: str | Path) -> str:
    """The sentence with which the command refuses: exit code 1, no traceback, nothing on stdout."""
    outcome = run(*arguments)
    assert outcome.code == 1, f"exit code {outcome.code}\n{outcome.out}\n{outcome.err}"
    assert "Traceback" not in outcome.err
    sentences = [line for line in outcome.err.splitlines() if line.startswith("hetcomp: ")]
    assert len(sentences) == 1, outcome.err
    return sentences[0]


def listing(folder: Path) -> list[str]:
    """Names of everything in ``folder``, hidden files included."""
    return sorted(path.name for path in folder.iterdir())
