"""``hetcomp plan`` and ``hetcomp-plan``: where each part of a model would live, and how fast it would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hetcomp.cli.guard import guard
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
    formats_of,
    isas_of,
    wishes_of,
)
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from hetcomp.cli.plan_figures import Figures
    from hetcomp.planned import Planned


def plan_command(
    model: Model,
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
    adapters: AdapterCount = 0,
    adapter_rank: AdapterRank = DEFAULT_ADAPTER_RANK,
    adapter_experts: AdapterExperts = True,
    adapter: Adapters = None,
    merge: Merge = False,
    allow_router: AllowRouter = False,
    what_if: Annotated[
        list[str] | None, typer.Option("--what-if", help="NAME=2x, +8G or VALUE, e.g. dram_bandwidth=2x.")
    ] = None,
    explore: Annotated[
        bool,
        typer.Option(
            "--explore",
            help="Also what hetcomp compile generates no code for: dense weights streamed in every step, experts on "
            "other GPUs.",
        ),
    ] = False,
    help_most: Annotated[
        bool, typer.Option("--improvements/--no-improvements", help="Plan anew to find what would help most.")
    ] = True,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="Write the plan as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page: roofline, memory, timeline.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--measured", help="With --html: draw this trace (hetcomp trace --out) beside it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the whole plan.")] = False,
    stop_after: StopAfter = None,
    dump_dir: DumpDir = None,
    debug: Debug = False,
) -> None:
    """Shows where each part of MODEL would live and run, and how fast, without reading a weight."""

    def body() -> None:
        from hetcomp.cli.measured_steps import measured_steps
        from hetcomp.cli.plan_html import plan_html
        from hetcomp.cli.plan_json import plan_report_json
        from hetcomp.cli.plan_report import plan_report
        from hetcomp.cli.profile_command import write_text
        from hetcomp.cli.progress import RichProgress
        from hetcomp.compiler import plan_model
        from hetcomp.ir.printer import print_plan
        from hetcomp.ir.serialise import read_plan, to_json

        planned, gains, compared = None, [], []
        if (Path(model) / "plan.json").is_file():
            plan = read_plan(Path(model) / "plan.json")
        else:
            with RichProgress(Console(stderr=True)) as progress:
                planned = plan_model(
                    model,
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
                    planning=explore,
                    stop_after=stop_after,
                    dump_dir=dump_dir,
                    progress=progress,
                )
                plan = planned.plan
                if plan.timelines:
                    compared = _compare(planned, what_if or [])
                    if help_most and not text:
                        progress.stage("what would help")
                        gains = _gains(planned)
        if plan_out is not None:
            write_text(plan_out, to_json(plan))
        free = planned.profile.available_bytes() if planned else None
        figures = _figures(planned) if planned is not None and plan.timelines else None
        if measured is not None and html is None:
            raise HetcompError("--measured is drawn into the report; give --html FILE with it.")
        if html is not None:
            steps = measured_steps(measured, plan) if measured is not None else ()
            write_text(html, plan_html(plan, _needed(figures), steps))
        if as_json:
            others = [(name, other.plan) for name, other in compared]
            typer.echo(plan_report_json(plan, free, figures, explored=explore, compared=others, gains=gains))
        elif text or stop_after:
            typer.echo(print_plan(plan))
        else:
            # The widest table takes less than this; rich would leave out the figures to the right.
            console = Console()
            console = Console(width=max(console.width, 100))
            console.print(plan_report(plan, free, figures, explored=explore))
            if compared and planned is not None:
                console.print(_comparison(planned, compared))
            for label, gain in gains:
                console.print(f"would help: {label}: {gain:+.0%}", highlight=False)

    guard(body, debug)


def _figures(planned: Planned) -> Figures:
    from hetcomp.cli.plan_figures import figures_of

    context = planned.context
    return figures_of(
        planned.plan,
        planned.profile,
        isa=context.isa,
        shares=context.statistics.shares if context.statistics is not None else None,
        vram=context.vram,
        place_seconds=planned.seconds.get("place"),
    )


def _needed(figures: Figures | None) -> Figures:
    if figures is None:
        raise HetcompError(
            "--html draws a simulated plan: give a model (not an artifact) and leave --stop-after out, so that the "
            "machine is known."
        )
    return figures


def _compare(planned: Planned, changes: list[str]) -> list[tuple[str, Planned]]:
    from hetcomp.compiler import replan
    from hetcomp.what_if import apply_change, parse_change

    return [(text, replan(planned, apply_change(planned.profile, parse_change(text)))) for text in changes]


def _gains(planned: Planned) -> list[tuple[str, float]]:
    from hetcomp.compiler import replan
    from hetcomp.hardware.profile import HardwareProfile
    from hetcomp.what_if import improvements, mix_seconds

    def seconds_on(profile: HardwareProfile) -> float:
        try:
            return mix_seconds(replan(planned, profile).plan)
        except HetcompError:  # the change alone does not fit: it helps nobody
            return float("inf")

    return improvements(planned.profile, mix_seconds(planned.plan), seconds_on)


def _comparison(planned: Planned, compared: list[tuple[str, Planned]]) -> Table:
    table = Table(title="What if", title_justify="left")
    table.add_column("machine", no_wrap=True)
    for timeline in planned.plan.timelines:
        table.add_column(f"{timeline.phase} tok/s", justify="right")
    for name, other in [("as it is", planned), *compared]:
        row = []
        for before, after in zip(planned.plan.timelines, other.plan.timelines, strict=True):
            gain = after.tokens_per_s / before.tokens_per_s - 1.0
            row.append(f"{after.tokens_per_s:,.1f}" + (f" ({gain:+.0%})" if other is not planned else ""))
        table.add_row(name, *row)
    return table
