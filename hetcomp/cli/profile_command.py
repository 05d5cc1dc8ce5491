"""``hetcomp profile``: measures this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetcomp.cli.guard import guard
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile


def profile_command(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the profile here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few points, under 15 s.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="BENCH.json", help="Refit the profile from a run of bench.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measures this machine: memory, caches, our kernels, disk, GPUs. Kept for --hw auto."""

    def body() -> None:
        from hetcomp.cli.progress import RichProgress
        from hetcomp.hardware.detect import detect_machine
        from hetcomp.hardware.measure import cache_file, keep

        errors = Console(stderr=True)
        if calibrate is not None:
            from hetcomp.calibrate import calibrated_from
            from hetcomp.hardware.profile import load_profile

            profile = calibrated_from(load_profile("auto"), calibrate)
        else:
            from hetcomp.profiler.measure_machine import measure_machine

            with RichProgress(errors) as progress:
                profile = measure_machine(quick=quick, progress=progress.stage)
        stored = cache_file(detect_machine())
        if profile.measured:
            keep(profile, stored)
        if out is not None:
            write_text(out, profile.to_json())
        if as_json:
            typer.echo(profile.to_json(), nl=False)
        else:
            Console().print(profile_report(profile, stored if profile.measured else None))

    guard(body, debug)


def write_text(target: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises HetcompError."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(target)
    except OSError as error:
        raise HetcompError(f"{target} cannot be written: {error.strerror or error}.") from None


def profile_report(profile: HardwareProfile, stored: Path | None) -> RenderableType:
    """What was measured, for people."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(profile):
        facts.add_row(name, value)
    parts: list[RenderableType] = [facts]
    if profile.curves:
        parts.append(_curves(profile))
    if profile.caveat:
        parts.append(Text(f"note: {profile.caveat}"))
    if stored is not None:
        parts.append(Text(f"kept for --hw auto in {stored}"))
    return Group(*parts)


def _facts(profile: HardwareProfile) -> list[tuple[str, str]]:
    quota = f", cgroup quota {profile.cpu_quota:g} CPUs" if profile.cpu_quota else ""
    rows = [
        ("CPU", f"{profile.cpu}, {', '.join(profile.isas)}"),
        ("threads", f"{profile.threads} lanes on {profile.logical_cpus} logical CPUs{quota}"),
        ("caches", ", ".join(f"L{c.level} {c.instances} x {c.bytes >> 10} KiB" for c in profile.caches)),
        ("barrier", f"{profile.barrier_us:.2f} us; huge pages {profile.huge_pages}"),
    ]
    for node in profile.nodes:
        reads = ", ".join(f"{p.threads} thr {p.gb_per_s:.1f}" for p in node.read_bandwidth)
        far = "".join(f"; node {r.memory} {r.gb_per_s:.1f}" for r in node.remote_reads)
        free = f"{node.available_bytes / 2**30:.1f} of {node.memory_bytes / 2**30:.1f} GiB free"
        rows.append((f"node {node.id}", f"{free}; reads GB/s: {reads}{far}"))
    if profile.cached_reads:
        sets = ", ".join(f"{p.bytes / 2**20:g} MiB {p.gb_per_s:.0f}" for p in profile.cached_reads)
        rows.append(("working sets", f"GB/s: {sets}"))
    if profile.disk is not None:
        rows.append(("disk", f"{profile.disk.gb_per_s:.2f} GB/s, {profile.disk.path}"))
    rows += [("GPU", f"{g.name}, {g.memory_bytes / 2**30:.1f} GiB") for g in profile.gpus] or [("GPU", "none")]
    return rows


def _curves(profile: HardwareProfile) -> Table:
    table = Table(title="Our kernels: 10^9 a second at each size", title_justify="left", box=None, pad_edge=False)
    for name in ("kernel", "operands", "format", "isa"):
        table.add_column(name, no_wrap=True)
    table.add_column("size: rate")
    for c in profile.curves:
        points = "  ".join(f"{p.size}: {p.rate:.3g}" for p in c.points)
        table.add_row(c.kernel, c.variant, c.weight_format, c.isa, points)
    table.caption = (
        "linear, moe_experts: weights passed over by tokens a weight; attention: multiply-adds; elementwise: elements"
    )
    table.caption_justify = "left"
    return table
