"""Compiles rendered C++ to objects and links them to a program, with a cache keyed by content.

An object depends on its source, the contract headers, the flags and the compiler; their SHA-256 names it in
``~/.cache/hetcomp/objects`` (``HETCOMP_CACHE`` moves it), so a second compile of the same shapes only links.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hetcomp.backends.precompiled_header import precompiled_header
from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError
from hetcomp.hardware.compilers import CxxCompiler, find_cxx

# The micro-architecture levels of the x86-64 psABI and what an ISA adds; all known to g++ >= 11 and clang >= 12.
_ISA_FLAGS = {
    Isa.AVX2: ("-march=x86-64-v3",),
    Isa.AVX_VNNI: ("-march=x86-64-v3", "-mavxvnni"),
    Isa.AVX512: ("-march=x86-64-v4",),
    Isa.AVX512_VNNI: ("-march=x86-64-v4", "-mavx512vnni"),
    Isa.AVX512_BF16: ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    Isa.AMX_BF16: ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
    "-Werror",
)
# GCC 12 sees uninitialised reads inside its own AVX-512 intrinsics (GCC bug 105593); clang knows no such flag.
_COMPILER_FLAGS = {
    "g++": ("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    "clang++": ("-Wno-unused-const-variable",),
}


@dataclass(frozen=True)
class Source:
    """One translation unit: file stem and text."""

    stem: str
    text: str


def isa_flags(isa: Isa) -> tuple[str, ...]:
    """Compiler flags that select the instruction set."""
    return _ISA_FLAGS[isa]


def cache_folder() -> Path:
    """Folder of compiled objects."""
    root = os.environ.get("HETCOMP_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hetcomp"
    return base / "objects"


def compile_objects(
    sources: Sequence[Source],
    isa: Isa,
    include: Path,
    *,
    threads: int,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Compiles every source for ``isa``, in parallel, and returns the cached objects in the same order.

    Raises HetcompError if no usable compiler is found or a source does not compile (a bug in a template: the
    message names the kept source file).
    """
    compiler = find_cxx()
    flags = (*_FLAGS, *_COMPILER_FLAGS[compiler.kind], *_ISA_FLAGS[isa], f"-I{include}")
    contract = contract_digest(include)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)

    def object_of(source: Source) -> Path:
        key = hashlib.sha256(
            "\0".join((compiler.identity, " ".join(flags[:-1]), contract, source.text)).encode()
        ).hexdigest()
        return folder / f"{key}.o"

    # One after the other, as most sources share one.
    headers = {
        source: precompiled_header(compiler, flags, source.text, contract, folder.parent / "headers")
        for source in sources
        if not object_of(source).exists()
    }

    def one(source: Source) -> Path:
        target = object_of(source)
        if source in headers:
            _compile(compiler, (*headers[source], *flags), source, target)
        if progress:
            progress(source.stem)
        return target

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        return list(pool.map(one, sources))


# TVM's objects export their functions; a program exports its entry and nothing else.
_EXPORTS = "{ global: hetcomp_program_entry; local: *; };\n"


def link_program(objects: Sequence[Path], target: Path) -> None:
    """Links objects to the shared library ``target``, whose only export is ``hetcomp_program_entry``. Nothing may
    stay undefined. Raises HetcompError."""
    compiler = find_cxx()
    with tempfile.NamedTemporaryFile("w", suffix=".map") as exports:
        exports.write(_EXPORTS)
        exports.flush()
        command = [
            str(compiler.path),
            "-shared",
            "-static-libgcc",
            "-Wl,--no-undefined",
            "-Wl,--gc-sections",
            f"-Wl,--version-script={exports.name}",
            "-Wl,-z,relro,-z,now,-z,noexecstack",
            "-o",
            str(target),
            *map(str, objects),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise HetcompError(f"Linking {target.name} with {compiler.path} failed: {_tail(done.stderr)}")


def _compile(compiler: CxxCompiler, flags: Sequence[str], source: Source, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as folder:
        cpp = Path(folder) / f"{source.stem}.cpp"
        cpp.write_text(source.text)
        obj = Path(folder) / "out.o"
        command = [str(compiler.path), *flags, "-c", str(cpp), "-o", str(obj)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            kept = Path(tempfile.gettempdir()) / f"hetcomp-failed-{source.stem}.cpp"
            shutil.copyfile(cpp, kept)
            raise HetcompError(
                f"{compiler.path} could not compile the generated kernel {source.stem} (source kept in {kept}): "
                f"{_tail(done.stderr)}"
            )
        staged = target.with_suffix(f".{os.getpid()}.{id(source)}.tmp")
        shutil.copyfile(obj, staged)
        staged.replace(target)


def contract_digest(include: Path) -> str:
    """Of the contract headers' names and text."""
    digest = hashlib.sha256()
    for header in sorted((include / "hetcomp").glob("*.h")):
        digest.update(header.name.encode())
        digest.update(header.read_bytes())
    return digest.hexdigest()


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
