"""TVM as a compiler of object files: version check, targets, PrimFunc -> relocatable object."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hetcomp.backends.protocol import Isa
from hetcomp.errors import HetcompError

TVM_VERSION = "0.27.0.post1"
# apache-tvm-ffi 0.1.15 changed the ABI under apache-tvm 0.27: Schedule.tensorize crashes the process.
FFI_RELEASE = (0, 1, 14)

# The micro-architecture levels of the x86-64 psABI, as in hetcomp.backends.native_compiler.
_MCPU = {Isa.AVX2: "x86-64-v3", Isa.AVX512: "x86-64-v4"}
_LANES = {Isa.AVX2: 8, Isa.AVX512: 16}


def lanes(isa: Isa) -> int:
    """f32 lanes of a vector register."""
    return _LANES[isa.level]


def whole_vectors(n: int, isa: Isa) -> int:
    """``n`` rounded up to whole vectors."""
    return -(-n // lanes(isa)) * lanes(isa)


@cache
def load_tvm() -> Any:  # noqa: ANN401 - tvm carries no types
    """The tvm module, imported on first use (it takes about a second).

    Raises HetcompError if apache-tvm or apache-tvm-ffi is absent or of another version than tested.
    """
    check_versions(_version("apache-tvm"), _version("apache-tvm-ffi"))
    # The objects are serial; TVM's own pool is never used, but would start its threads at import.
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    try:
        import tvm
    except (ImportError, OSError) as error:
        raise HetcompError(
            f"apache-tvm {TVM_VERSION} is installed but does not load ({error}); reinstall it with "
            f"'pip install --force-reinstall apache-tvm=={TVM_VERSION}'."
        ) from error
    return tvm


def check_versions(tvm_version: str | None, ffi_version: str | None) -> None:
    """Raises HetcompError unless the two packages are a pair that is known to work; None means absent."""
    wanted = ".".join(map(str, FFI_RELEASE))
    advice = f"install the pair with 'pip install apache-tvm=={TVM_VERSION} apache-tvm-ffi=={wanted}.post1'."
    if tvm_version is None:
        raise HetcompError(f"The package apache-tvm is not installed, but compiling needs it; {advice}")
    if tvm_version != TVM_VERSION:
        raise HetcompError(f"apache-tvm is version {tvm_version}, but only {TVM_VERSION} works here; {advice}")
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", ffi_version or "")
    if ffi_version is None or release is None or tuple(map(int, release.groups())) != FFI_RELEASE:
        raise HetcompError(
            f"apache-tvm-ffi is version {ffi_version or 'absent'}, but apache-tvm {TVM_VERSION} crashes with "
            f"others than {wanted}; {advice}"
        )


def compile_object(functions: dict[str, Any], isa: Isa) -> bytes:
    """Compiles PrimFuncs, keyed by global symbol, to a position-independent object without TVM's runtime."""
    tvm = load_tvm()
    target = tvm.target.Target({"kind": "llvm", "mcpu": _MCPU[isa.level], "num-cores": 1})
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    executable = tvm.compile(module, target=target)
    with tempfile.TemporaryDirectory(prefix="hetcomp-tvm-") as folder:
        path = Path(folder) / "kernel.o"
        executable.mod.write_to_file(str(path), "o")
        _check_symbols(path)
        return path.read_bytes()


# What an object may leave to the program it is linked into: libm, the memory functions of libc that compilers
# assume, and the error hook of support.cpp.
_ALLOWED = frozenset(
    "TVMFFIErrorSetRaisedFromCStrParts memcpy memset memmove "
    "acos acosh asin asinh atan atan2 atanh cos cosh erf exp exp2 exp10 expm1 floor fmod hypot ldexp "
    "log log10 "
    "log1p log2 pow round sin sincos sinh sqrt tan tanh trunc".split()
)


def _check_symbols(path: Path) -> None:
    """Refuses an object that would need TVM's runtime: its allocator, its thread pool, a packed function."""
    done = subprocess.run(["nm", "-P", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise HetcompError(f"nm cannot read an object that TVM wrote ({done.stderr.strip()}); install binutils.")
    for line in done.stdout.splitlines():
        symbol, kind = line.split()[:2]
        runtime = symbol.startswith("__TVMBackend") or symbol.startswith("__TVMFFI")
        if runtime or (kind == "U" and symbol not in _ALLOWED and symbol.removesuffix("f") not in _ALLOWED):
            raise HetcompError(f"TVM's code for it needs {symbol} from TVM's runtime library")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
