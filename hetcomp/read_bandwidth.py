"""The DRAM read bandwidth of this machine at this moment: the ceiling beside which runs are measured."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from hetcomp.backends.native_compiler import cache_folder
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import find_cxx
from hetcomp.hardware.detect import Machine, detect_machine
from hetcomp.hardware.profile import HardwareProfile

_FLAGS = ("-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-pthread")
_TIMEOUT_SECONDS = 120
# Readings of one call; the best counts, since everything else that runs only takes away from it.
_REPEATS = 5  # as the profiler's probe


def current_gb_per_s(profile: HardwareProfile) -> float:
    """What the node that ``profile.bandwidth()`` speaks of reads now, 10^9 bytes a second, with its lane's threads.

    Takes about half a second. Raises HetcompError if there is no compiler or too little memory.
    """
    machine, fastest = detect_machine(), _fastest(profile)
    cores = next((node.cores for node in machine.nodes if node.id == fastest and node.cores), ())
    threads = min(profile.node_threads(fastest), len(cores)) or machine.threads
    cpus = cores[:threads]
    return max(measure(threads, mebibytes=_mebibytes(machine), repeats=_REPEATS, first=threads, cpus=cpus)[0])


def profiled_gb_per_s(profile: HardwareProfile) -> float | None:
    """The best such reading when the profile was measured; None if it does not have its readings.

    It may be less than ``profile.bandwidth()``, which counts what our kernels streamed as well: only readings of the
    same kind can be held against each other.
    """
    node = profile.node(_fastest(profile))
    usable = [i for i, p in enumerate(node.read_bandwidth) if p.threads <= profile.node_threads(node.id)]
    paths = [f"nodes.{profile.nodes.index(node)}.read_bandwidth.{i}.gb_per_s" for i in usable[-1:]]
    return max((max(profile.samples[p]) for p in paths if profile.samples.get(p)), default=None)


def _fastest(profile: HardwareProfile) -> int:
    return max(profile.compute_nodes, key=lambda node: profile.bandwidth(node.id)).id


def measure(
    threads: int, *, mebibytes: int, repeats: int, first: int = 1, cpus: Sequence[int] = ()
) -> list[list[float]]:
    """10^9 bytes a second of ``repeats`` passes over a buffer, for each count of threads from ``first`` to ``threads``.

    cpus: where the threads run and on whose NUMA node the buffer lies (empty: left to the kernel). Raises
    HetcompError if the program cannot be built or run.
    """
    command = [str(_program()), *map(str, (threads, mebibytes, repeats, first))]
    try:
        done = subprocess.run(
            [*command, ",".join(map(str, cpus))], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HetcompError(f"The read bandwidth of this machine cannot be measured: {error}.") from None
    if done.returncode != 0:
        raise HetcompError(f"The read bandwidth of this machine cannot be measured: {done.stderr.strip()}.")
    samples: list[list[float]] = json.loads(done.stdout)
    return samples


def _mebibytes(machine: Machine) -> int:
    """Four times the last-level caches, so that they hold little of it, within an eighth of the free memory."""
    last = max((c.level for c in machine.caches), default=0)
    caches = sum(c.bytes * c.instances for c in machine.caches if c.level == last)
    free = sum(node.available_bytes for node in machine.nodes)
    return max(16, min(max(4 * caches, 512 << 20), free // 8) >> 20)


def _program() -> Path:
    """The compiled program, from the cache where it was built before for this source, compiler and CPU."""
    source = (resources.files("hetcomp.codegen_templates") / "probe" / "read_bandwidth.cpp").read_text("utf-8")
    compiler = find_cxx()
    facts = (source, compiler.identity, " ".join(_FLAGS), detect_machine().cpu, " ".join(detect_machine().isas))
    target = cache_folder() / f"read_bandwidth-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as folder:
        cpp, built = Path(folder) / "read_bandwidth.cpp", Path(folder) / "read_bandwidth"
        cpp.write_text(source, encoding="utf-8")
        done = subprocess.run([compiler.path, *_FLAGS, cpp, "-o", built], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise HetcompError(f"{compiler.path} cannot build the read-bandwidth program: {last}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copy(built, staged)
        staged.replace(target)
    return target
