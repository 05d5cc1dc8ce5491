"""The profile of this machine, kept between runs: what ``--hw auto`` reads. hetcomp.profiler measures it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from hetcomp.artifact.staged_file import write_whole
from hetcomp.errors import HetcompError
from hetcomp.hardware.detect import Machine, detect_machine
from hetcomp.hardware.figures import Gpu
from hetcomp.hardware.gpus import detect_gpus
from hetcomp.hardware.profile import SCHEMA, HardwareProfile, parse_profile

# How the origin of figures begins that were taken while other processes kept the cores busy.
BUSY = "measured on a busy machine, likely too low"
# So long quick ones of them are used, then measured again.
_BUSY_SECONDS = 600.0
_PROBES = ("memory_probe.cpp", "kernel_probe.cpp.j2")


def measured_profile() -> HardwareProfile:
    """This machine as this process may use it.

    Figures come from the cache, or are measured in some seconds (as ``hetcomp profile --quick`` does); free memory
    and GPUs are always asked for anew. Without a C++ compiler the figures are estimates, marked so and not kept.
    """
    machine = detect_machine()
    cached = cache_file(machine)
    profile = read_cached(cached)
    if profile is None:
        profile = _measure(machine)
        if profile.measured:
            # A cache that cannot be written costs the next start some seconds and nothing else.
            with contextlib.suppress(HetcompError):
                keep(profile, cached)
    free = {node.id: node.available_bytes for node in machine.nodes}
    nodes = tuple(n.model_copy(update={"available_bytes": free.get(n.id, 0)}) for n in profile.nodes)
    return profile.model_copy(update={"nodes": nodes, "gpus": present_gpus(profile.gpus)})


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
    folder = resources.files("hetcomp.codegen_templates") / "probe"
    probes = [(folder / name).read_text(encoding="utf-8") for name in _PROBES]
    text = json.dumps((facts, SCHEMA, probes), sort_keys=True, default=lambda part: part.model_dump())
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (Path(root) if root else home / "hetcomp") / f"profile-{key}.json"


def keep(profile: HardwareProfile, target: Path) -> None:
    """Writes the profile, whole or not at all. Raises HetcompError naming the file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HetcompError(f"{target.parent} cannot be made: {error.strerror or error}.") from None
    write_text(target, profile.to_json())


def write_text(target: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises HetcompError naming it."""
    write_whole(target, text.encode())


def read_cached(cached: Path) -> HardwareProfile | None:
    """The profile kept in ``cached`` if it is still good; None if it is absent, damaged, or a quick one of a busy
    machine that was kept long enough."""
    try:
        age = time.time() - cached.stat().st_mtime
        profile = parse_profile(cached.read_text(encoding="utf-8"), str(cached))
    except (OSError, UnicodeDecodeError, HetcompError):
        return None
    passing = profile.origin.startswith(BUSY) and not is_full(profile)
    return None if passing and age > _BUSY_SECONDS else profile


def is_full(profile: HardwareProfile) -> bool:
    """Whether the profile holds all curves, not those of a quick measurement only."""
    return any(curve.kernel == "elementwise" for curve in profile.curves)


def present_gpus(known: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that the driver shows now, with what was measured of the same ones."""
    left = list(known)
    found = []
    for gpu in detect_gpus().gpus:
        same = next((k for k in left if (k.name, k.memory_bytes) == (gpu.name, gpu.memory_bytes)), None)
        if same is not None:
            left.remove(same)
            gpu = same.model_copy(update={"free_bytes": gpu.free_bytes})
        found.append(gpu)
    return tuple(found)


def _measure(machine: Machine) -> HardwareProfile:
    from hetcomp.profiler.measure_machine import estimated_profile, measure_machine

    try:
        return measure_machine(machine, quick=True)
    except HetcompError as error:
        return estimated_profile(machine, f"not measured: {error}")
