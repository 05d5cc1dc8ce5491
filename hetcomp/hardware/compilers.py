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
_CANDIDATES = ("g++", "g++-14", "g++-13", "g++-12", "g++-11", "clang++", "clang++-19", "clang++-18", "clang++-16", "clang++-14")


@dataclass(frozen=True)
class CxxCompiler:
    """A usable compiler. ``identity`` (first line of --version) goes into the object cache's keys."""

    path: Path
    kind: str
    major: int
    identity: str


@cache
def find_cxx() -> CxxCompiler:
    """The compiler named by CXX, else the first new enough g++ or clang++ in PATH. Raises HetcompError."""
    named = os.environ.get("CXX")
    seen = []
    for name in (named,) if named else _CANDIDATES:
        found = probe_cxx(name)
        if found is None:
            continue
        if found.major >= MINIMUM[found.kind]:
            return found
        seen.append(f"{found.path} is version {found.major}")
    what = f"CXX={named}" if named else "g++ (11 or newer) or clang++ (14 or newer)"
    detail = f" ({'; '.join(seen)})" if seen else ""
    raise HetcompError(f"No usable C++ compiler: {what} was not found{detail}. Install one: apt-get install g++.")


def probe_cxx(name: str) -> CxxCompiler | None:
    """What ``name`` is, or None if it cannot be run."""
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout:
        return None
    first = done.stdout.splitlines()[0]
    version = re.search(r"(\d+)\.\d+", first)
    if version is None:
        return None
    kind = "clang++" if "clang" in first else "g++"
    return CxxCompiler(Path(path), kind, int(version.group(1)), first)
