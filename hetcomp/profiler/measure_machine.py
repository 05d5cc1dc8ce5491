"""The whole profile of this machine: memory, our kernels' curves, disk, GPUs; or estimates where none of it can be
measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.hardware.detect import Machine
from hetcomp.hardware.figures import BandwidthPoint, Disk, KernelCurve, KernelRate, NumaNode, RemoteRead, Source
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.hardware.measure import BUSY, cache_file
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.hardware.tuning import KernelTuning
from hetcomp.profiler.disk import measure_disk
from hetcomp.profiler.gpu_measure import GpuFigures, measure_gpu_figures
from hetcomp.profiler.kernel_cases import Detail
from hetcomp.profiler.kernel_curves import kernel_curves, kernel_rates
from hetcomp.profiler.memory import SCATTER, MemoryFigures, MemoryRounds, Mode, buffer_mebibytes, lanes, probe_runner
from hetcomp.profiler.tune_kernels import tune_kernels
from hetcomp.progress import ProgressSink, QuietProgress

# Without a compiler: two channels of DDR4-3200 (51.2 GB/s) at 80 %, and half of the peak of 2 GHz cores with
# two FMA units of the instruction set's width.
_ESTIMATED_GB_PER_S = 41.0
_ESTIMATED_GFLOPS = {Isa.AVX2: 32.0, Isa.AVX512: 64.0}
_ESTIMATED_FRACTION = 0.9
_ESTIMATED_BARRIER_US = 1.0


def measure_machine(machine: Machine, *, quick: bool = False, progress: ProgressSink | None = None) -> HardwareProfile:
    """Measures ``machine``, which must be this one: about a minute on two cores; with ``quick`` (memory, and few
    points of the usual formats) a few seconds.

    Kernels are those of the strongest instruction set, which programs are built for unless the user asks for another.
    Where they cannot be built or run, the next weaker one is measured with a warning, and the profile's ``isas`` lack
    the stronger. Raises HetcompError if there is no compiler, if the memory probe fails, or if kernels run on no
    instruction set.
    """
    progress = progress or QuietProgress()
    isas = [isa for isa in Isa if isa.value in machine.isas]
    if not isas:
        raise HetcompError(f"{machine.cpu} has none of the instruction sets {', '.join(isa.value for isa in Isa)}.")
    load = os.getloadavg()[0]
    notes = [f"{BUSY} (load {load:.1f})"] if load > 0.5 * machine.threads else []
    curves: list[KernelCurve] = []
    with tempfile.TemporaryDirectory(prefix="hetcomp-probe-") as folder:
        progress.stage("memory: bandwidth, working sets, barrier")
        # Plain reads gain nothing from what extends a level, and any supported compiler knows the levels.
        rounds = MemoryRounds(machine, probe_runner(isas[-1].level, Path(folder)))
        rounds.measure(remote=not quick)
        tunings: tuple[KernelTuning, ...] = ()
        while isas and not curves:
            best = isas.pop()
            tunings = () if quick else _tunings(machine, best, progress)
            curves = _curves(machine, best, quick, rounds, tunings, progress)
            if not curves:
                machine = replace(machine, isas=tuple(name for name in machine.isas if name != best.value))
    if not curves:
        raise HetcompError("Our kernels could be measured on no instruction set; the warnings above say why.")
    figures = rounds.figures()
    notes += [figures.scatter] if figures.scatter else []
    disk, disk_samples = (None, {}) if quick else _disk(machine, progress)
    gpus = _gpus(progress, quick)
    return _profile(machine, figures, curves, notes).model_copy(
        update={
            "tunings": tunings,
            "disk": disk,
            "gpus": gpus.gpus,
            "samples": _samples(machine, figures) | disk_samples | gpus.samples,
            "references": gpus.references,
        }
    )


def estimated_profile(machine: Machine, reason: str) -> HardwareProfile:
    """Figures of a usual machine of the same instruction sets, marked as estimates; ``reason`` becomes its origin."""
    isas = [isa for isa in Isa if isa.value in machine.isas] or [Isa.AVX2]
    reads = {
        node.id: (BandwidthPoint(threads=len(cpus), gb_per_s=_ESTIMATED_GB_PER_S),) for node, cpus in lanes(machine)
    }
    rates = tuple(
        KernelRate(
            isa=isa.value,
            weight_format=form,
            gflops_per_core=_ESTIMATED_GFLOPS[isa.level],
            bandwidth_fraction=_ESTIMATED_FRACTION,
            source=Source.ESTIMATE,
        )
        for isa in isas
        for form in ("f32", "bf16")
    )
    return _base(machine, _nodes(machine, reads, {}, Source.ESTIMATE), rates, _ESTIMATED_BARRIER_US).model_copy(
        update={"origin": reason, "gpus": detect_gpus().gpus}
    )


def _tunings(machine: Machine, isa: Isa, progress: ProgressSink) -> tuple[KernelTuning, ...]:
    """Constants found on the node that has most threads; none (the defaults), with a warning, if the kernels fail."""
    node, cpus = max(lanes(machine), key=lambda lane: len(lane[1]))
    try:
        return tune_kernels(isa, cpus, buffer_mebibytes(machine, node) << 20, progress)
    except HetcompError as error:
        progress.warn(str(error))
        return ()


def _curves(
    machine: Machine,
    isa: Isa,
    quick: bool,
    rounds: MemoryRounds,
    tunings: tuple[KernelTuning, ...],
    progress: ProgressSink,
) -> list[KernelCurve]:
    """Curves on the node that has most threads, with a round of memory behind each part of them; none, with a warning,
    if the kernels fail."""
    node, cpus = max(lanes(machine), key=lambda lane: len(lane[1]))
    curves: list[KernelCurve] = []
    for detail in (Detail.QUICK,) if quick else (Detail.FULL, Detail.COARSE):
        size = buffer_mebibytes(machine, node) << 20
        try:
            curves += kernel_curves(isa, cpus, rounds.barrier_us(), detail, size, tunings, progress)
        except HetcompError as error:
            progress.warn(f"{error} Programs for this machine are built without {isa.value}.")
            return []
        progress.stage("memory, another round")
        rounds.measure()
    return curves


def _profile(
    machine: Machine, figures: MemoryFigures, curves: Sequence[KernelCurve], notes: Sequence[str]
) -> HardwareProfile:
    node, cpus = max(lanes(machine), key=lambda lane: len(lane[1]))
    *fewer, last = figures.reads[node.id]
    rates, peak = kernel_rates(curves, len(cpus), last.gb_per_s)
    if peak > (1 + SCATTER) * last.gb_per_s:
        faster = (
            f"kernels streamed {peak:.1f} GB/s on node {node.id}, plain reads {last.gb_per_s:.1f}; the former is taken"
        )
        notes = [*notes, faster]
    reads = {**figures.reads, node.id: (*fewer, last.model_copy(update={"gb_per_s": peak}))}
    nodes = _nodes(machine, reads, figures.remote, Source.MEASURED)
    return _base(machine, nodes, rates, figures.barrier_us).model_copy(
        update={
            "curves": tuple(curves),
            "cached_reads": figures.cached,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "origin": "; ".join(notes),
        }
    )


def _base(
    machine: Machine, nodes: tuple[NumaNode, ...], rates: tuple[KernelRate, ...], barrier_us: float
) -> HardwareProfile:
    return HardwareProfile(
        name="this machine",
        cpu=machine.cpu,
        isas=machine.isas,
        threads=machine.threads,
        logical_cpus=machine.logical_cpus,
        nodes=nodes,
        caches=machine.caches,
        rates=rates,
        barrier_us=barrier_us,
        huge_pages=machine.huge_pages,
        cpu_quota=machine.quota,
        memory_limit_bytes=machine.memory_limit,
    )


def _nodes(
    machine: Machine,
    reads: Mapping[int, tuple[BandwidthPoint, ...]],
    remote: Mapping[int, tuple[RemoteRead, ...]],
    source: Source,
) -> tuple[NumaNode, ...]:
    return tuple(
        NumaNode(
            id=node.id,
            cores=len(node.cores),
            cpus=node.cpus,
            memory_bytes=node.memory_bytes,
            available_bytes=node.available_bytes,
            read_bandwidth=reads.get(node.id, ()),
            remote_reads=remote.get(node.id, ()),
            distances=node.distances,
            source=source,
        )
        for node in machine.nodes
    )


def _samples(machine: Machine, figures: MemoryFigures) -> dict[str, tuple[float, ...]]:
    """All readings of memory by the path of the figure that they gave."""
    places = {node.id: place for place, node in enumerate(machine.nodes)}
    sets = [point.bytes for point in figures.cached]
    samples: dict[str, tuple[float, ...]] = {}
    for (mode, node, memory, key), readings in figures.samples.items():
        if mode is Mode.READ:
            point = [p.threads for p in figures.reads[node]].index(key)
            path = f"nodes.{places[node]}.read_bandwidth.{point}.gb_per_s"
        elif mode is Mode.ALL:
            point = [r.memory for r in figures.remote[node]].index(memory)
            path = f"nodes.{places[node]}.remote_reads.{point}.gb_per_s"
        elif mode is Mode.SETS:
            path = f"cached_reads.{sets.index(key)}.gb_per_s"
        else:
            path = "barrier_us"
        samples[path] = (*samples.get(path, ()), *readings)
    return samples


def _disk(machine: Machine, progress: ProgressSink) -> tuple[Disk | None, dict[str, tuple[float, ...]]]:
    progress.stage("disk")
    try:
        disk, readings = measure_disk(cache_file(machine).parent)
    except HetcompError as error:
        progress.warn(str(error))
        return None, {}
    return disk, {"disk.gb_per_s": readings}


def _gpus(progress: ProgressSink, quick: bool) -> GpuFigures:
    """Measured figures of the GPUs; where the probe cannot be built, what the driver says of them, with a warning."""
    found = detect_gpus().gpus
    if found and not quick:
        progress.stage("GPUs", total=len(found))
        try:
            return measure_gpu_figures(progress)
        except HetcompError as error:
            progress.warn(str(error))
    return GpuFigures(found, {}, {}, (), ())
