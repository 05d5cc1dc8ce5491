"""Where the files of the C++ runtime were installed: headers, libraries, executable."""

from __future__ import annotations

import sysconfig
from functools import cache
from importlib import resources
from pathlib import Path

from hetcomp.errors import HetcompError


@cache
def _root() -> Path:
    candidates = [
        Path(str(resources.files("hetcomp"))) / "runtime_files",
        # An editable install keeps the Python files in the checkout and the built ones in site-packages.
        Path(sysconfig.get_path("platlib")) / "hetcomp" / "runtime_files",
    ]
    for root in candidates:
        if (root / "include" / "hetcomp" / "kernel.h").is_file():
            return root
    raise HetcompError(
        f"The C++ runtime is not installed (looked in {', '.join(map(str, candidates))}); run pip install again."
    )


def include() -> Path:
    """Folder to give to the compiler with -I."""
    return _root() / "include"


def library() -> Path:
    """The shared library with the C ABI."""
    return _existing(_root() / "lib" / "libhetcomp_runtime.so")


def quantiser() -> Path:
    """The shared library that packs weights when compiling."""
    return _existing(_root() / "lib" / "libhetcomp_quantise.so")


def executable() -> Path:
    """The Python-free program."""
    return _existing(_root() / "bin" / "hetcomp-run")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise HetcompError(f"{path} is missing; the C++ runtime was not built. Run pip install again.")
    return path
