"""The profile of this machine: detected facts, and figures that a small C++ program measures once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import CxxCompiler, find_cxx
from hetcomp.hardware.detect import Machine, NodeFacts, detect_machine
from hetcomp.hardware.figures import BandwidthPoint, KernelRate, NumaNode, Source, WorkingSetPoint
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.hardware.profile import SCHEMA, HardwareProfile, parse_profile

# The psABI levels that programs are built for.
_MARCH = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}
# Figures taken while other processes kept the cores busy are used for this long, then measured again.
_BUSY_SECONDS = 600.0
_BUSY = "measured on a busy machine, likely too low"
# Without a compiler: two channels of DDR4-3200 (51.2 GB/s) at 80 %, and half of the peak of 2 GHz cores with
# two FMA units of the instruction set's width.
_ESTIMATED_GB_PER_S = 41.0
_ESTIMATED_GFLOPS = {"avx2": 32.0, "avx512": 64.0}
_ESTIMATED_BARRIER_US = 1.0


@dataclass(frozen=True)
class ProbeResult:
    """What a run of the probe printed: GB/s by threads and, with all of them, by working set (bytes); barrier; by
    format (GFLOP/s a core, GEMV GB/s)."""

    read: tuple[tuple[int, float], ...]
    cached: tuple[tuple[int, float], ...]
    barrier_us: float
    rates: dict[str, tuple[float, float]]


def measured_profile() -> HardwareProfile:
    """This machine as this process may use it.

    Figures come from the cache, or are measured in a few seconds; free memory and GPUs are always asked for
    anew. Without a C++ compiler the figures are estimates, marked so and not kept.
    """
    machine = detect_machine()
    cached = cache_file(machine)
    profile = _read(cached)
    if profile is None:
        profile = measure(machine)
        if profile.measured:
            keep(profile, cached)
    free = {node.id: node.available_bytes for node in machine.nodes}
    nodes = tuple(n.model_copy(update={"available_bytes": free.get(n.id, 0)}) for n in profile.nodes)
    return profile.model_copy(update={"nodes": nodes, "gpus": detect_gpus().gpus})


def cache_file(machine: Machine) -> Path:
    """Where the figures of ``machine`` are kept: in ``$HETCOMP_CACHE`` or the user's cache folder, under a hash
    of all that they depend on."""
    root = os.environ.get("HETCOMP_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    facts = asdict(machine)
    for node in facts["nodes"]:
        del node["available_bytes"]
        node["memory_bytes"] >>= 30  # the kernel's own part varies from boot to boot
    del facts["memory_limit"]
    text = json.dumps((facts, SCHEMA, _source()), sort_keys=True, default=lambda part: part.model_dump())
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (Path(root) if root else home / "hetcomp") / f"profile-{key}.json"


def measure(machine: Machine) -> HardwareProfile:
    """Measures ``machine``, which must be this one; if that fails, estimates with the reason in ``origin``."""
    load = os.getloadavg()[0]
    busy = f"{_BUSY} (load {load:.1f})" if load > 0.5 * machine.threads else ""
    try:
        return _profile(machine, _probe(machine), Source.MEASURED, busy)
    except HetcompError as error:
        return _profile(machine, _estimates(machine), Source.ESTIMATE, f"not measured: {error}")


def buffer_mebibytes(machine: Machine, node: NodeFacts) -> int:
    """Size of the buffer to read: four times the last-level caches, so that they hold little of it, and at
    least 512 MiB; at most an eighth of the node's free memory."""
    last = max((c.level for c in machine.caches), default=0)
    caches = sum(c.bytes * c.instances for c in machine.caches if c.level == last)
    return max(16, min(max(4 * caches, 512 << 20), node.available_bytes // 8) >> 20)


def _probe(machine: Machine) -> dict[int, dict[str, ProbeResult]]:
    """Results by node and instruction set. Raises HetcompError if the probe cannot be built or run."""
    isas = [isa for isa in machine.isas if isa in _MARCH]
    if not isas:
        raise HetcompError(f"{machine.cpu} has none of the instruction sets {', '.join(_MARCH)}.")
    compiler, include = find_cxx(), installed_runtime.include()
    results: dict[int, dict[str, ProbeResult]] = {}
    with tempfile.TemporaryDirectory(prefix="hetcomp-probe-") as folder:
        with ThreadPoolExecutor(max_workers=min(len(isas), machine.logical_cpus)) as pool:
            built = pool.map(lambda isa: _build(compiler, include, isa, Path(folder)), isas)
            probes = dict(zip(isas, built, strict=True))
        for node, cpus in lanes(machine):
            mebibytes = buffer_mebibytes(machine, node)
            results[node.id] = {isa: _run(probe, mebibytes, cpus) for isa, probe in probes.items()}
    return results


def lanes(machine: Machine) -> list[tuple[NodeFacts, tuple[int, ...]]]:
    """The CPUs of every node's lane: one of each core, as many as the thread count gives the node."""
    total = sum(len(node.cores) for node in machine.nodes)
    found = []
    for node in machine.nodes:
        if node.cores:
            found.append((node, node.cores[: max(1, machine.threads * len(node.cores) // total)]))
    return found


def _build(compiler: CxxCompiler, include: Path, isa: str, folder: Path) -> Path:
    source, probe = folder / f"probe_{isa}.cpp", folder / f"probe_{isa}"
    source.write_text(_source(), encoding="utf-8")
    flags = ["-std=c++20", "-O3", f"-march={_MARCH[isa]}", "-pthread", f"-I{include}"]
    command = [str(compiler.path), *flags, str(source), "-o", str(probe)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HetcompError(f"{compiler.path} cannot build the hardware probe for {isa}: {last}.")
    return probe


def _run(probe: Path, mebibytes: int, cpus: Sequence[int]) -> ProbeResult:
    command = [str(probe), str(mebibytes), ",".join(map(str, cpus))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HetcompError(f"The hardware probe cannot be run: {error}.") from None
    if done.returncode != 0:
        raise HetcompError(f"The hardware probe failed with status {done.returncode}: {done.stderr.strip()}.")
    document: dict[str, Any] = json.loads(done.stdout)
    return ProbeResult(
        tuple((threads, rate) for threads, rate in document["read"]),
        tuple((size, rate) for size, rate in document["cached"]),
        document["barrier_us"],
        {form: (r["gflops_per_core"], r["gemv_gb_per_s"]) for form, r in document["rates"].items()},
    )


def _estimates(machine: Machine) -> dict[int, dict[str, ProbeResult]]:
    isas = [isa for isa in machine.isas if isa in _MARCH] or ["avx2"]
    return {
        node.id: {
            isa: ProbeResult(
                ((len(cpus), _ESTIMATED_GB_PER_S),),
                (),
                _ESTIMATED_BARRIER_US,
                {form: (_ESTIMATED_GFLOPS[isa], 0.9 * _ESTIMATED_GB_PER_S) for form in ("f32", "bf16")},
            )
            for isa in isas
        }
        for node, cpus in lanes(machine)
    }


def _profile(
    machine: Machine, results: dict[int, dict[str, ProbeResult]], source: Source, origin: str
) -> HardwareProfile:
    curves = {id: _curve(by_isa) for id, by_isa in results.items()}
    return HardwareProfile(
        name="this machine",
        cpu=machine.cpu,
        isas=machine.isas,
        threads=machine.threads,
        logical_cpus=machine.logical_cpus,
        nodes=tuple(
            NumaNode(
                id=node.id,
                cores=len(node.cores),
                cpus=node.cpus,
                memory_bytes=node.memory_bytes,
                available_bytes=node.available_bytes,
                read_bandwidth=curves.get(node.id, ()),
                source=source,
            )
            for node in machine.nodes
        ),
        caches=machine.caches,
        cached_reads=_cached_reads(results),
        cpu_quota=machine.quota,
        memory_limit_bytes=machine.memory_limit,
        rates=_rates(results, curves, source),
        barrier_us=max(run.barrier_us for by_isa in results.values() for run in by_isa.values()),
        huge_pages=machine.huge_pages,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds") if source is Source.MEASURED else None,
        origin=origin,
    )


def _curve(by_isa: dict[str, ProbeResult]) -> tuple[BandwidthPoint, ...]:
    """The best that any of the probes read with each number of threads. With all threads a GEMV counts as well:
    it streams from memory too, and where it is faster the plain loop was held up by something else."""
    best: dict[int, float] = {}
    for run in by_isa.values():
        most = max(threads for threads, _ in run.read)
        for threads, rate in (*run.read, *((most, gemv) for _, gemv in run.rates.values())):
            best[threads] = max(best.get(threads, 0.0), rate)
    return tuple(BandwidthPoint(threads=n, gb_per_s=best[n]) for n in sorted(best))


def _cached_reads(results: dict[int, dict[str, ProbeResult]]) -> tuple[WorkingSetPoint, ...]:
    """Of the first node, by its best probe; a larger set is never read faster."""
    best: dict[int, float] = {}
    for run in next(iter(results.values()), {}).values():
        for size, rate in run.cached:
            best[size] = max(best.get(size, 0.0), rate)
    points, ceiling = [], float("inf")
    for size in sorted(best):
        ceiling = min(ceiling, best[size])
        points.append(WorkingSetPoint(bytes=size, gb_per_s=ceiling))
    return tuple(points)


def _rates(
    results: dict[int, dict[str, ProbeResult]], curves: dict[int, tuple[BandwidthPoint, ...]], source: Source
) -> tuple[KernelRate, ...]:
    """Rates of the slowest node: a step that is cut over nodes waits for it."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for id, by_isa in results.items():
        peak = max(point.gb_per_s for point in curves[id])
        for isa, run in by_isa.items():
            for form, (gflops, gemv) in run.rates.items():
                found.setdefault((isa, form), []).append((gflops, gemv / peak))
    return tuple(
        KernelRate(
            isa=isa,
            weight_format=form,
            gflops_per_core=min(gflops for gflops, _ in figures),
            bandwidth_fraction=min(fraction for _, fraction in figures),
            source=source,
        )
        for (isa, form), figures in found.items()
    )


def _source() -> str:
    return (resources.files("hetcomp.codegen_templates") / "probe" / "probe.cpp").read_text(encoding="utf-8")


def _read(cached: Path) -> HardwareProfile | None:
    """The profile kept in ``cached`` if it is still good."""
    try:
        age = time.time() - cached.stat().st_mtime
        profile = parse_profile(cached.read_text(encoding="utf-8"), str(cached))
    except (OSError, UnicodeDecodeError, HetcompError):
        return None  # absent or damaged: measured again
    return None if profile.origin.startswith(_BUSY) and age > _BUSY_SECONDS else profile


def keep(profile: HardwareProfile, target: Path) -> None:
    """Writes the figures to the cache, whole or not at all."""
    # A cache that cannot be written costs the next start a few seconds and nothing else.
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".profile-", delete=False) as file:
            file.write(profile.to_json())
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(target)
