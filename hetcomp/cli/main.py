"""The command line: ``hetcomp compile | run | plan | trace | bench | ..`` and ``hetcomp-plan``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hetcomp.cli.adapter_command import adapter_app
from hetcomp.cli.bench_command import bench_command
from hetcomp.cli.explain_command import explain_command
from hetcomp.cli.export_onnx_command import export_onnx_command
from hetcomp.cli.guard import guard
from hetcomp.cli.importance_command import importance_command
from hetcomp.cli.inspect_command import inspect_command
from hetcomp.cli.options import (
    DEFAULT_ADAPTER_RANK,
    DEFAULT_MAX_KL,
    AdapterCount,
    AdapterExperts,
    AdapterRank,
    Adapters,
    AllowRouter,
    Answer,
    Batch,
    Context,
    Debug,
    Defer,
    DeferText,
    DumpDir,
    ExpertCache,
    Formats,
    FromDisk,
    Hw,
    IsaList,
    KvTokens,
    MaxKl,
    Merge,
    Model,
    PinList,
    Pinned,
    Prompt,
    RoutingTraceFile,
    Stats,
    StopAfter,
    Vram,
    ccs_of,
    formats_of,
    isas_of,
    token_ids,
    wishes_of,
)
from hetcomp.cli.plan_command import plan_command
from hetcomp.cli.profile_command import profile_command
from hetcomp.cli.trace_command import trace_command
from hetcomp.errors import HetcompError

app = typer.Typer(
    name="hetcomp",
    help="Compiles Mixture-of-Experts language models for one workstation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_err = Console(stderr=True)


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Artifact to write, e.g. model.hetc.")],
    hw: Hw = "auto",
    formats: Formats = "auto",
    context: Context = None,
    batch: Batch = 1,
    kv_tokens: KvTokens = None,
    isa: IsaList = "auto",
    prompt: Prompt = None,
    answer: Answer = None,
    vram: Vram = None,
    pinned: Pinned = None,
    pin: PinList = None,
    stats: Stats = None,
    defer: Defer = "0",
    max_kl: MaxKl = DEFAULT_MAX_KL,
    defer_text: DeferText = None,
    expert_cache: ExpertCache = "static",
    routing_trace: RoutingTraceFile = None,
    from_disk: FromDisk = False,
    cc: Annotated[
        str, typer.Option("--cc", help="GPU code for: auto (the profile's GPU), or a list: 80,86,89,90,120.")
    ] = "auto",
    tune: Annotated[
        bool | None,
        typer.Option("--tune/--no-tune", help="Time GPU kernels' tiles here (a minute, once); default: with a GPU."),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Take the decisions of this plan.json.")] = None,
    importance: Annotated[
        Path | None, typer.Option("--importance", help="safetensors with each weight's column importances (q4, mxfp4).")
    ] = None,
    adapters: AdapterCount = 0,
    adapter_rank: AdapterRank = DEFAULT_ADAPTER_RANK,
    adapter_experts: AdapterExperts = True,
    adapter: Adapters = None,
    merge: Merge = False,
    allow_router: AllowRouter = False,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer and chat template to take.")
    ] = None,
    weights: Annotated[
        str,
        typer.Option("--weights", help="packed (a copy in the artifact), or external (MODEL's files, needed to run)."),
    ] = "packed",
    stop_after: StopAfter = None,
    dump_dir: DumpDir = None,
    debug: Debug = False,
) -> None:
    """Compiles MODEL to an artifact that runs without Python."""

    def body() -> None:
        from hetcomp.cli.progress import RichProgress
        from hetcomp.compiler import compile, plan_model
        from hetcomp.ir.printer import print_plan

        options: dict[str, Any] = dict(
            hw_profile=hw,
            context_length=context,
            max_batch=batch,
            kv_tokens=kv_tokens,
            formats=formats_of(formats),
            isa=isas_of(isa),
            wishes=wishes_of(
                prompt,
                answer,
                batch,
                vram,
                pinned,
                pin,
                stats,
                defer,
                max_kl,
                defer_text,
                expert_cache,
                routing_trace,
                from_disk=from_disk,
                adapters=adapters,
                adapter_rank=adapter_rank,
                adapter_experts=adapter_experts,
            ),
            adapters=adapter or (),
            merge=merge,
            allow_router=allow_router,
        )
        with RichProgress(_err) as progress:
            if stop_after is not None:
                planned = plan_model(model, stop_after=stop_after, dump_dir=dump_dir, progress=progress, **options)
                text = print_plan(planned.plan)
            else:
                exe = compile(
                    model,
                    out=out,
                    ccs=ccs_of(cc),
                    tune=tune,
                    plan=plan,
                    importance=importance,
                    tokenizer=tokenizer,
                    weights=weights,
                    dump_dir=dump_dir,
                    progress=progress,
                    **options,
                )
                text = f"{exe.path}"
                if adapter:
                    from hetcomp.adapters.merge import report_line

                    _err.print(report_line(exe.path), highlight=False, markup=False, soft_wrap=True)
                if weights != "packed":
                    from hetcomp.artifact.inspection import inspect_artifact

                    _err.print(inspect_artifact(exe.path).in_words(), highlight=False, markup=False, soft_wrap=True)
        typer.echo(text)

    guard(body, debug)


@app.command("run")
def run_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A compiled model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    ids: Annotated[str | None, typer.Option("--ids", help="Token ids to continue: 1,2,3.")] = None,
    max_new_tokens: Annotated[int, typer.Option("-n", min=0, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0)] = 0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", min=0.0, max=1.0)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="0: all that this process may use.")] = 0,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="NAME=PATH: a PEFT folder or a packed file; repeatable, the last one answers."),
    ] = None,
    allow_router: AllowRouter = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    print_ids: Annotated[bool, typer.Option("--print-ids", help="Print token ids instead of text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speeds to stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Generates text with a compiled model."""

    def body() -> None:
        import json

        import hetcomp

        if (prompt is None) == (ids is None):
            raise HetcompError("Give the input with exactly one of --prompt TEXT and --ids 1,2,3.")
        exe = hetcomp.load(artifact, threads=threads)
        chosen = None
        for spec in adapter or ():
            name, equals, path = spec.rpartition("=")
            if equals and not name:
                raise HetcompError(f"'{spec}' is no NAME=PATH of an adapter.")
            chosen = exe.load_adapter(path, name or None, allow_router=allow_router)
        tokens = exe.generate(
            prompt if prompt is not None else token_ids(ids or ""),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            ignore_eos=ignore_eos,
            adapter=chosen,
        )
        if print_ids:
            typer.echo(",".join(str(token.id) for token in tokens))
        else:
            for token in tokens:
                sys.stdout.write(token.text)
                sys.stdout.flush()
            typer.echo()
        if stats:
            typer.echo(json.dumps(exe.stats, indent=2), err=True)

    guard(body, debug)


app.add_typer(adapter_app)
app.command("plan")(plan_command)
app.command("inspect")(inspect_command)
app.command("profile")(profile_command)
app.command("importance")(importance_command)
app.command("export-onnx")(export_onnx_command)
app.command("bench")(bench_command)
app.command("explain")(explain_command)
app.command("trace")(trace_command)


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    debug: Debug = False,
) -> None:
    """Says what this machine has and what is missing for what."""

    def body() -> None:
        from hetcomp.cli.doctor import doctor

        raise typer.Exit(doctor(as_json=as_json))

    guard(body, debug)


def main() -> None:
    """``hetcomp``."""
    _collect_rarely()
    app()


def plan_main() -> None:
    """``hetcomp-plan``."""
    _collect_rarely()
    alone = typer.Typer(name="hetcomp-plan", add_completion=False, pretty_exceptions_enable=False)
    alone.command()(plan_command)
    alone()


def _collect_rarely() -> None:
    """Python's collector walks all that torch and transformers are made of, several times while they are imported: 0.5
    to 2 s of a compile. A command ends soon; mypy's thresholds."""
    gc.set_threshold(200_000, 30, 30)
