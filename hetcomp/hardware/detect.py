"""What the kernel says of this machine: CPU, instruction sets, cores, caches, NUMA nodes, memory, limits."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetcomp.hardware.figures import Cache
from hetcomp.hardware.limits import cpu_quota, memory_left

# /proc/cpuinfo flags that an instruction set needs, weakest first. avx2 and avx512 are the psABI levels v3 and
# v4 that programs are built for; the others are reported for planning.
ISA_FLAGS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"}),
    "avx_vnni": frozenset({"avx_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "avx512_vnni": frozenset({"avx512_vnni"}),
    "avx512_bf16": frozenset({"avx512_bf16"}),
    "amx_int8": frozenset({"amx_tile", "amx_int8"}),
    "amx_bf16": frozenset({"amx_tile", "amx_bf16"}),
}


@dataclass(frozen=True)
class NodeFacts:
    """A NUMA node: its logical CPUs that this process may use, and of each physical core the first (``cores``).

    ``distances`` are the kernel's (SLIT) to every node of the machine in their order; empty if it says none."""

    id: int
    cpus: tuple[int, ...]
    cores: tuple[int, ...]
    memory_bytes: int
    available_bytes: int
    distances: tuple[int, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Facts that need no measuring."""

    cpu: str
    isas: tuple[str, ...]
    nodes: tuple[NodeFacts, ...]
    caches: tuple[Cache, ...]
    threads: int
    logical_cpus: int
    quota: float | None
    memory_limit: int | None
    huge_pages: str


def detect_machine(root: Path = Path("/"), allowed: frozenset[int] | None = None) -> Machine:
    """Reads /proc and /sys below ``root``. ``allowed``: logical CPUs of this process (None: asks the kernel)."""
    cpus = allowed if allowed is not None else frozenset(os.sched_getaffinity(0))
    info = _text(root / "proc/cpuinfo")
    flags = _flags(info)
    limit = memory_left(root / "proc/self")
    nodes = _nodes(root, cpus, limit)
    cores = sum(len(node.cores) for node in nodes)
    quota = cpu_quota(root / "proc/self")
    # Rounded down, as the runtime does: a thread above the quota gets all of them throttled at every barrier.
    threads = max(1, min(cores, int(quota))) if quota else max(1, cores)
    return Machine(
        cpu=_field(info, "model name") or "unknown CPU",
        isas=tuple(name for name, needed in ISA_FLAGS.items() if needed <= flags),
        nodes=nodes,
        caches=_caches(root, cpus),
        threads=threads,
        logical_cpus=max(1, min(len(cpus), int(quota))) if quota else len(cpus),
        quota=quota,
        memory_limit=limit,
        huge_pages=_chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    )


def cpu_list(text: str) -> tuple[int, ...]:
    """CPUs of a kernel list such as ``0-3,8``."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def _nodes(root: Path, allowed: frozenset[int], limit: int | None) -> tuple[NodeFacts, ...]:
    memory = _meminfo(root / "proc/meminfo")
    free = memory.get("MemAvailable", memory.get("MemFree", 0))
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:]))
    found = []
    for folder in folders:
        info = _meminfo(folder / "meminfo")
        cpus = tuple(c for c in cpu_list(_text(folder / "cpulist")) if c in allowed)
        # As the kernel estimates MemAvailable: free pages, page cache and reclaimable slabs.
        cached = info.get("FilePages", 0) - info.get("Shmem", 0) + info.get("SReclaimable", 0)
        usable = info.get("MemFree", 0) + cached
        if cpus or info.get("MemTotal", 0):
            found.append((int(folder.name[4:]), cpus, info.get("MemTotal", 0), max(0, usable)))
    if not found:  # a kernel without NUMA, or /sys is not mounted
        found = [(0, tuple(sorted(allowed)), memory.get("MemTotal", 0), free)]
    budget = free if limit is None else min(free, limit)
    # What the nodes say is taken as shares of the machine's figures: MemAvailable knows the watermarks, and
    # node files may leave out memory that was plugged in later.
    usable_sum = sum(usable for *_, usable in found) or 1
    total_sum = sum(total for _, _, total, _ in found) or 1
    online = [int(folder.name[4:]) for folder in folders]
    kept = [online.index(id) for id, *_ in found if id in online]
    return tuple(
        NodeFacts(
            id,
            cpus,
            _one_of_each_core(root, cpus),
            memory.get("MemTotal", 0) * total // total_sum,
            budget * usable // usable_sum,
            _distances(root, id, kept),
        )
        for id, cpus, total, usable in found
    )


def _distances(root: Path, id: int, kept: Sequence[int]) -> tuple[int, ...]:
    """The file has a distance to each online node; ``kept`` are the places of those that the machine has."""
    words = _text(root / f"sys/devices/system/node/node{id}/distance").split()
    return tuple(int(words[i]) for i in kept) if len(words) > max(kept, default=0) else ()


def _one_of_each_core(root: Path, cpus: tuple[int, ...]) -> tuple[int, ...]:
    seen: set[str] = set()
    cores = []
    for cpu in cpus:
        siblings = _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings = siblings or f"cpu{cpu}"
        if siblings not in seen:
            seen.add(siblings)
            cores.append(cpu)
    return tuple(cores)


def _caches(root: Path, allowed: frozenset[int]) -> tuple[Cache, ...]:
    instances: dict[tuple[int, str, int], set[str]] = {}
    for cpu in sorted(allowed):
        for folder in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
            size = re.fullmatch(r"(\d+)K", _text(folder / "size").strip())
            level, kind = _text(folder / "level").strip(), _text(folder / "type").strip().lower()
            if size and level and kind != "instruction":
                key = (int(level), kind, int(size.group(1)) * 1024)
                instances.setdefault(key, set()).add(_text(folder / "shared_cpu_list").strip())
    return tuple(
        Cache(level=level, type=kind, bytes=size, instances=len(shared))
        for (level, kind, size), shared in sorted(instances.items())
    )


def _flags(cpuinfo: str) -> frozenset[str]:
    return frozenset((_field(cpuinfo, "flags") or "").split())


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _meminfo(path: Path) -> Mapping[str, int]:
    """Bytes by name; node files write ``Node 0 MemTotal: 1 kB``."""
    pairs = re.findall(r"(\w+(?:\(\w+\))?):\s+(\d+) kB", _text(path))
    return {name: int(kilobytes) * 1024 for name, kilobytes in pairs}


def _chosen(text: str) -> str:
    found = re.search(r"\[(\w+)\]", text)
    return found.group(1) if found else "unknown"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
