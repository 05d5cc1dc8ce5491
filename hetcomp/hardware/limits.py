"""What the process may use: CPUs by affinity and cgroup quota, memory by cgroup limits (v1 and v2).

The runtime decides by the same rules (runtime_lib/src/cgroup.cpp, cpu_budget.cpp).
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """CPUs' worth of time that the cgroups allow, the smallest of all enclosing groups; None if unlimited."""
    quotas = []
    for group in _groups(proc, "cgroup2", ""):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    for group in _groups(proc, "cgroup", "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_left(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that the cgroups still allow to allocate; None if unlimited. File cache counts as free: the kernel
    drops it first."""
    left = []
    for group in _groups(proc, "cgroup2", ""):
        stat = _stat(group / "memory.stat")
        cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        left.append(_left(_number(group / "memory.max"), _number(group / "memory.current"), cache))
    for group in _groups(proc, "cgroup", "memory"):
        stat = _stat(group / "memory.stat")
        cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
        limit = _number(group / "memory.limit_in_bytes")
        # v1 writes "no limit" as the largest multiple of the page size that fits into a long.
        limit = None if limit is not None and limit >= 1 << 62 else limit
        left.append(_left(limit, _number(group / "memory.usage_in_bytes"), cache))
    return min((bytes for bytes in left if bytes is not None), default=None)


def allowed_cpus() -> tuple[int, ...]:
    """Logical CPUs of the affinity mask, in which cpusets are already applied."""
    return tuple(sorted(os.sched_getaffinity(0)))


def _left(limit: int | None, used: int | None, cache: int) -> int | None:
    if limit is None or used is None:
        return None
    return max(0, limit - max(0, used - cache))


def _groups(proc: Path, kind: str, controller: str) -> list[Path]:
    """Folders of the process's group and of all enclosing ones that are mounted, innermost first."""
    mount = _mount(proc, kind, controller)
    path = _group_path(proc, controller)
    if mount is None or path is None:
        return []
    root, point = mount
    # In a container the mount shows the group itself as its root, while /proc may name it from the host's.
    inside = PurePosixPath(path)
    inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
    folder = point / inside
    return [folder, *(up for up in folder.parents if up.is_relative_to(point))]


def _mount(proc: Path, kind: str, controller: str) -> tuple[str, Path] | None:
    """Root and mount point of a hierarchy: fields 4 and 5 of mountinfo; type and options follow " - "."""
    for line in _text(proc / "mountinfo").splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if not dash or len(before) < 5 or len(after) < 3 or after[0] != kind:
            continue
        if not controller or controller in after[2].split(","):
            return before[3], Path(before[4])
    return None


def _group_path(proc: Path, controller: str) -> str | None:
    """Path in a line ``id:controllers:path``; v2 has the id 0 and no controllers."""
    for line in _text(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controller in controllers.split(",")) if controller else (number == "0" and not controllers):
            return path
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def _stat(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
