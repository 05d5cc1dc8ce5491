"""``hetcomp trace``: what happens in a real run of a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetcomp.cli.guard import guard
from hetcomp.cli.options import Debug
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.runtime import Runtime


def trace_command(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL.hetc", help="A compiled model.")],
    routing: Annotated[
        Path | None, typer.Option("--routing", help="File to write: the experts that each token chose in each layer.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 file to read.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Of the text or prompt, at most.")] = None,
    generate: Annotated[int, typer.Option("-n", min=0, help="Tokens to generate behind it.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="0: all that this process may use.")] = 0,
    debug: Debug = False,
) -> None:
    """Runs MODEL.hetc on a text and writes what happened: how it routes tokens (--routing)."""

    def body() -> None:
        import hetcomp
        from hetcomp.record_routing import record_text

        if routing is None:
            raise HetcompError("Say what to write: --routing FILE.")
        if (prompt is None) == (text is None):
            raise HetcompError("Give the input with exactly one of --prompt TEXT and --text FILE.")
        exe = hetcomp.load(artifact, threads=threads)
        ids = _ids(exe.runtime, prompt, text)[:tokens]
        source = "a prompt" if text is None else text.name
        found = record_text(exe, ids, source, generate)
        found.write(routing)
        typer.echo(
            f"{routing}: {found.tokens} tokens, {found.layers} MoE layers, top-{found.top_k} of {found.n_experts}"
        )

    guard(body, debug)


def _ids(runtime: Runtime, prompt: str | None, text: Path | None) -> list[int]:
    if text is None:
        return runtime.tokenize(prompt or "")
    try:
        return runtime.tokenize(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"--text {text} cannot be read: {error}; give a text file in UTF-8.") from None
