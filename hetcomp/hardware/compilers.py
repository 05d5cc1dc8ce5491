"""Finds the C++ compiler that builds generated kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hetcomp.errors import HetcompError

# First versions with C++20 as the templates use it and with -march=x86-64-v4.
MINIMUM = {"g++": 11, "clang++": 14}
CANDIDATES = (
    *("g++", *(f"g++-{major}" for major in range(16, 10, -1))),
    *("clang++", *(f"clang++-{major}" for major in range(21, 13, -1))),
)


@dataclass(frozen=True)
class CxxCompiler:
    """A compiler that runs. ``kind``: g++ or clang++. ``identity``: first line of --version, for cache keys."""

    path: Path
    kind: str
    major: int
    identity: str

    @property
    def usable(self) -> bool:
        """Whether the version is new enough for generated code."""
        return self.major >= MINIMUM[self.kind]


@cache
def find_cxx() -> CxxCompiler:
    """The compiler named by the environment variable CXX, else the first new enough g++ or clang++ in PATH.

    Raises HetcompError if there is none, naming the older ones that were seen.
    """
    named = os.environ.get("CXX")
    seen = []
    for name in (named,) if named else CANDIDATES:
        found = probe_cxx(name)
        if found is not None and found.usable:
            return found
        if found is not None:
            seen.append(f"{found.path} is version {found.major}")
    what = "g++ (11 or newer) or clang++ (14 or newer)"
    what = f"CXX={named} as {what}" if named else what
    detail = f" ({'; '.join(seen)})" if seen else ""
    advice = "Install one: apt-get install g++."
    raise HetcompError(f"No usable C++ compiler: {what} was not found{detail}. {advice}")


def installed_cxx() -> list[CxxCompiler]:
    """Every compiler of the candidates (and CXX) that is installed, each file once, new enough or not."""
    named = os.environ.get("CXX")
    found: dict[Path, CxxCompiler] = {}
    for name in (named, *CANDIDATES) if named else CANDIDATES:
        compiler = probe_cxx(name)
        if compiler is not None:
            found.setdefault(compiler.path.resolve(), compiler)
    return list(found.values())


def probe_cxx(name: str) -> CxxCompiler | None:
    """What the program ``name`` is; None if it is absent, cannot be run or is no compiler known here."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.partition("\n")[0]
    # "g++ (Debian 12.2.0-14) 12.2.0" ends with the version; "Debian clang version 14.0.6" has only one.
    versions = re.findall(r"(\d+)\.\d+(?:\.\d+)?", first)
    if done.returncode != 0 or not versions:
        return None
    kind = "clang++" if "clang" in first else "g++" if re.match(r"\S*(g|c)\+\+", first) else None
    if kind is None:
        return None
    return CxxCompiler(Path(path), kind, int(versions[0] if kind == "clang++" else versions[-1]), first)
