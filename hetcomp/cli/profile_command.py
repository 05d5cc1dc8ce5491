"""``hetcomp profile``: measures this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetcomp.cli.guard import guard
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import KernelCurve, KernelPoint
from hetcomp.hardware.measure import cache_file, is_full, keep, read_cached
from hetcomp.hardware.measure import write_text as write_text  # for the other commands
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.hardware.tuning import KernelTuning


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

        errors = Console(stderr=True)
        if out is not None:
            _refuse_unwritable(out)
        machine = detect_machine()
        if calibrate is not None:
            from hetcomp.calibrate import calibrated_from
            from hetcomp.hardware.profile import load_profile

            profile = calibrated_from(load_profile("auto"), calibrate)
        else:
            from hetcomp.profiler.measure_machine import measure_machine

            with RichProgress(errors) as progress:
                profile = measure_machine(machine, quick=quick, progress=progress)
        remark = _keep(profile, cache_file(machine), errors)
        if out is not None:
            write_text(out, profile.to_json())
            remark += f"; also written to {out}"
        if as_json:
            typer.echo(profile.to_json(), nl=False)
        else:
            console = Console()
            Console(width=max(console.width, 100)).print(profile_report(profile, remark))

    guard(body, debug)


def _refuse_unwritable(target: Path) -> None:
    """Raises HetcompError now rather than after a minute of measuring."""
    if target.is_dir():
        raise HetcompError(f"{target} cannot be written: it is a folder.")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise HetcompError(f"{target} cannot be written: {error.strerror or error}.") from None


def _keep(profile: HardwareProfile, stored: Path, errors: Console) -> str:
    """Keeps the profile for --hw auto, and says where. A quick one does not take the place of a full one."""
    if not profile.measured:
        return "not kept: not every figure is measured"
    known = read_cached(stored)
    if known is not None and is_full(known) and not is_full(profile):
        return f"not kept: --hw auto goes on with the full profile of {known.measured_at} in {stored}"
    try:
        keep(profile, stored)
    except HetcompError as error:
        errors.print(f"warning: the profile is not kept for --hw auto: {error}", style="yellow", soft_wrap=True)
        return "not kept"
    return f"kept for --hw auto in {stored}"


def profile_report(profile: HardwareProfile, remark: str) -> RenderableType:
    """What was measured, for people. ``remark``: where it is kept."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(profile):
        facts.add_row(name, value)
    parts: list[RenderableType] = [facts]
    if profile.curves:
        parts.append(_curves(profile))
    if profile.caveat:
        parts.append(Text(f"note: {profile.caveat}"))
    parts.append(Text(remark))
    return Group(*parts)


def _facts(profile: HardwareProfile) -> list[tuple[str, str]]:
    quota = f", cgroup quota {profile.cpu_quota:g} CPUs" if profile.cpu_quota else ""
    rows = [
        ("CPU", f"{profile.cpu}, {', '.join(profile.isas)}"),
        ("threads", f"{profile.threads} used of {profile.logical_cpus} logical CPUs{quota}"),
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
    rows += [(f"tuned {t.weight_format}", _tuned(t)) for t in profile.tunings]
    if profile.disk is not None:
        rows.append(("disk", f"{profile.disk.gb_per_s:.2f} GB/s, {profile.disk.path}"))
    rows += [("GPU", f"{g.name}, {g.memory_bytes / 2**30:.1f} GiB") for g in profile.gpus] or [("GPU", "none")]
    return rows


def _tuned(tuning: KernelTuning) -> str:
    """The constants of the kernels, and what was gained by those that trials changed."""
    words = []
    for name, value in tuning.constants.model_dump().items():
        trial = next((t for t in tuning.trials if (t.constant, t.value) == (name, value)), None)
        words.append(f"{name} {value}" + (f" ({trial.speedup:.2f} x)" if trial else ""))
    return ", ".join(words)


def _curves(profile: HardwareProfile) -> Table:
    """One token's stream and the largest size's rate where a kernel has both; else the rates at both ends."""
    table = Table(title="Our kernels", title_justify="left", box=None, pad_edge=False)
    for name in ("kernel", "operands", "format", "isa"):
        table.add_column(name, no_wrap=True)
    for name in ("smallest", "largest"):
        table.add_column(name, justify="right")
    for c in profile.curves:
        first, last = c.points[0], c.points[-1]
        table.add_row(c.kernel, c.variant, c.weight_format, c.isa, _speed(c, first), _speed(c, last))
    return table


def _speed(curve: KernelCurve, point: KernelPoint) -> str:
    """The rate in a unit that can be held against the machine: bytes of weights for one token, FLOP for many."""
    from hetcomp.profiler.kernel_cases import bytes_a_weight

    if curve.kernel in ("linear", "moe_experts"):
        if point.size == 1:
            return f"1 token: {point.rate * bytes_a_weight(curve.weight_format):.1f} GB/s"
        return f"{point.size} tokens: {2 * point.size * point.rate:.0f} GFLOP/s"
    if curve.kernel == "elementwise":
        return f"{point.size} tokens: {point.rate:.2f} G elements/s"
    if curve.kernel == "gated_delta":
        return f"{point.size} tokens: {7 * point.rate:.0f} GFLOP/s"
    unit = "positions" if curve.kernel == "attention_decode" else "tokens"
    return f"{point.size} {unit}: {2 * point.rate:.0f} GFLOP/s"
