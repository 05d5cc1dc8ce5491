"""``hetcomp trace``: what happens in a real run of a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetcomp.cli.guard import guard
from hetcomp.cli.options import Debug, token_ids
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.executable import Executable
    from hetcomp.runtime import Runtime


def trace_command(
    artifact: Annotated[Path, typer.Argument(metavar="MODEL.hetc", help="A compiled model.")],
    routing: Annotated[
        Path | None, typer.Option("--routing", help="File to write: the experts that each token chose in each layer.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write: what each thread did when, for ui.perfetto.dev.")
    ] = None,
    expert_stats: Annotated[
        Path | None,
        typer.Option("--expert-stats", help="File to write: how often each expert was chosen, for plan --stats."),
    ] = None,
    half_life: Annotated[
        int, typer.Option("--half-life", min=0, help="Of these counts, in tokens; 0: all count alike.")
    ] = 0,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 file to read.")] = None,
    ids: Annotated[str | None, typer.Option("--ids", help="Token ids to read: 1,2,3.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Of the text or prompt, at most.")] = None,
    generate: Annotated[int, typer.Option("-n", min=0, help="Tokens to generate behind it.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=0, help="0: all that this process may use.")] = 0,
    debug: Debug = False,
) -> None:
    """Runs MODEL.hetc on a text and writes what happened: the routing of its tokens (--routing), how often experts were
    chosen (--expert-stats), its lanes (--out)."""

    def body() -> None:
        import hetcomp

        if routing is None and out is None and expert_stats is None:
            raise HetcompError("Say what to write: --routing FILE, --expert-stats FILE, or --out FILE.")
        if sum(given is not None for given in (prompt, text, ids)) != 1:
            raise HetcompError("Give the input with exactly one of --prompt TEXT, --text FILE and --ids 1,2,3.")
        exe = hetcomp.load(artifact, threads=threads)
        read = (token_ids(ids) if ids is not None else _tokens(exe.runtime, prompt, text))[:tokens]
        if routing is not None:
            source = text.name if text is not None else "a prompt" if ids is None else "token ids"
            typer.echo(_record_routing(exe, read, source, generate, routing))
        if expert_stats is not None:
            typer.echo(_count_experts(exe, read, generate, half_life, expert_stats))
        if out is not None:
            typer.echo(_trace_lanes(exe, read, generate, out))

    guard(body, debug)


def _record_routing(exe: Executable, ids: list[int], source: str, generate: int, target: Path) -> str:
    from hetcomp.record_routing import record_text

    found = record_text(exe, ids, source, generate)
    found.write(target)
    return f"{target}: {found.tokens} tokens, {found.layers} MoE layers, top-{found.top_k} of {found.n_experts}"


def _count_experts(exe: Executable, ids: list[int], generate: int, half_life: int, target: Path) -> str:
    from hetcomp.artifact.staged_file import write_whole
    from hetcomp.record_routing import run_text

    exe.count_experts(half_life)
    run_text(exe, ids, generate)
    write_whole(target, exe.expert_statistics().encode())
    exe.runtime.count_experts(None)
    return f"{target}: experts of {len(ids) + generate} tokens"


def _trace_lanes(exe: Executable, ids: list[int], generate: int, target: Path) -> str:
    from hetcomp.lane_trace import traced_steps, write_trace
    from hetcomp.record_routing import run_text

    with traced_steps(exe.runtime) as steps:
        run_text(exe, ids, generate)
    write_trace(target, steps, exe.plan, list(exe.stats["decode"]["timers_ms"]))
    return f"{target}: {len(steps)} steps; open it at ui.perfetto.dev"


def _tokens(runtime: Runtime, prompt: str | None, text: Path | None) -> list[int]:
    if text is None:
        return runtime.tokenize(prompt or "")
    try:
        return runtime.tokenize(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"--text {text} cannot be read: {error}; give a text file in UTF-8.") from None
