"""Compiles a TVM kernel (wrapper, object, support) to a shared library and runs it on numpy arrays."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from hetcomp.backends.native_compiler import cache_folder, contract_digest
from hetcomp.backends.precompiled_header import precompiled_header
from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.backends.tvm import TvmBackend, support_source
from hetcomp.hardware.compilers import CxxCompiler, probe_cxx
from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, Shape, TensorType

CONTRACT = Path(__file__).parents[2] / "runtime_lib" / "include"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CONTRACT}")
ISA_FLAGS = {Isa.AVX2: "-march=x86-64-v3", Isa.AVX512: "-march=x86-64-v4"}
GUARD = 64  # elements of a known pattern on either side of an output

BACKEND = TvmBackend()
_FOLDER = tempfile.TemporaryDirectory(prefix="hetcomp-tvm-tests-")


def machine_isas() -> list[Isa]:
    """The instruction sets that this CPU can run."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    isas = [Isa.AVX2] if "avx2" in flags and "fma" in flags else []
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags):
        isas.append(Isa.AVX512)
    return isas


def value(id: str, shape: Shape, dtype: DType = DType.F32, format: str | None = None) -> Value:
    """A value of a plan: a weight if it has no symbolic dimension, an activation otherwise."""
    kind = ValueKind.ACT if shape and isinstance(shape[0], str) else ValueKind.WEIGHT
    return Value(id=id, type=TensorType(dtype, shape), kind=kind, format=format)


def request(
    attrs: Attrs,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    isa: Isa,
    dims: Mapping[str, int] | None = None,
    origin: str = "model.layers.0.test",
) -> KernelRequest:
    """A kernel request around ``attrs``."""
    op = Op("op", attrs, tuple(v.id for v in inputs), tuple(v.id for v in outputs), origin=origin)
    return KernelRequest(op, tuple(inputs), tuple(outputs), isa, dict(dims or {"T": 4096}))


@cache
def _compiled(text: str, flag: str) -> Path:
    path = Path(_FOLDER.name) / f"{len(list(Path(_FOLDER.name).iterdir()))}.cpp"
    path.write_text(text)
    target = path.with_suffix(".o")
    flags, headers = (*FLAGS, flag), cache_folder().parent / "headers"
    early = precompiled_header(_gcc(), flags, text, contract_digest(CONTRACT), headers)
    subprocess.run(["g++", *flags, "-Winvalid-pch", *early, "-c", str(path), "-o", str(target)], check=True)
    return target


@cache
def _gcc() -> CxxCompiler:
    found = probe_cxx("g++")
    assert found is not None
    return found


_LIBRARIES: dict[str, ctypes.CDLL] = {}


def library(kernel: Kernel, isa: Isa) -> ctypes.CDLL:
    """The kernel as a loaded shared library; everything it needs but libc and libm is in it."""
    if kernel.name not in _LIBRARIES:
        harness = (Path(__file__).parent / "tvm_harness.cpp").read_text()
        objects = [
            _compiled(harness, ISA_FLAGS[isa]),
            _compiled(support_source(), ISA_FLAGS[isa]),
            _compiled(kernel.source, ISA_FLAGS[isa]),
        ]
        for name, data in kernel.objects:
            path = Path(_FOLDER.name) / name
            path.write_bytes(data)
            objects.append(path)
        target = Path(_FOLDER.name) / f"{kernel.name}.so"
        command = [
            "g++",
            "-shared",
            "-Wl,--no-undefined",
            "-o",
            str(target),
            *map(str, objects),
            "-lm",
            "-lpthread",
        ]
        subprocess.run(command, check=True)
        _LIBRARIES[kernel.name] = ctypes.CDLL(str(target))
    return _LIBRARIES[kernel.name]


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a 64-byte boundary, as all memory of a plan is."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(
    kernel: Kernel,
    isa: Isa,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], type]],
    rows: int,
    threads: int = 1,
    repeat: int = 1,
) -> list[np.ndarray]:
    """Runs the kernel and returns its outputs, whose surroundings are checked to be untouched."""
    lib = library(kernel, isa)
    symbol = f"_ZN7hetcomp{len(kernel.name)}{kernel.name}ERNS_4LaneERKNS_10KernelArgsE"
    function = ctypes.cast(getattr(lib, symbol), ctypes.c_void_p)
    arrays = [_aligned(np.asarray(a)) for a in inputs]
    padded = [_aligned(np.full(int(np.prod(shape)) + 2 * GUARD, 77, dtype)) for shape, dtype in outputs]
    item = [p.dtype.itemsize for p in padded]
    ins = (ctypes.c_void_p * max(1, len(arrays)))(*(a.ctypes.data for a in arrays))
    outs = (ctypes.c_void_p * len(padded))(
        *(p.ctypes.data + GUARD * size for p, size in zip(padded, item, strict=True))
    )
    workspace = _aligned(np.full(kernel.workspace_bytes + GUARD, 0xA5, np.uint8))
    error = lib.run_kernel(
        function,
        threads,
        ctypes.c_int64(rows),
        ins,
        outs,
        ctypes.c_void_p(workspace.ctypes.data),
        ctypes.c_int64(repeat),
    )
    lib.first_error.restype = ctypes.c_char_p
    assert error == 0, lib.first_error()
    assert (workspace[kernel.workspace_bytes :] == 0xA5).all(), "wrote behind the workspace"
    for p in padded:
        assert (p[:GUARD] == 77).all() and (p[-GUARD:] == 77).all(), "wrote outside of the output"
    return [p[GUARD:-GUARD].reshape(shape) for p, (shape, _) in zip(padded, outputs, strict=True)]
