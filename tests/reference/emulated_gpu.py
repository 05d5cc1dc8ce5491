"""A GPU without a GPU: the runtime's fake driver, whose kernels run on host memory (ttir_interpreter.py).

Within :func:`emulated_gpu`, ``hetcomp.compile`` writes stand-ins for cubins, and the runtime of this process finds one
GPU or several, each with memory and streams of its own. Everything else is real: the artifact, its CPU program on its
lanes, graphs and hand-overs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import hetcomp.backends.gpu.compile_kernels as real
from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.kernels import GpuKernel
from tests.reference.ttir_interpreter import run_kernel

ROOT = Path(__file__).resolve().parents[2]
_LOADER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)
)
_LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
_GRAPH_ENDS = -1  # kFakeGraphEnds (runtime_lib/tests/fake_cuda.h)
# ELF64, little-endian, of the machine EM_CUDA (190): what the runtime checks of a cubin.
_ELF_HEADER = b"\x7fELF\x02\x01".ljust(18, b"\0") + (190).to_bytes(2, "little") + bytes(44)
_BYTES = {"i32": 4, "fp32": 4, "i64": 8}


class _FakeCuda(ctypes.Structure):
    """The head of FakeCuda (runtime_lib/tests/fake_cuda.h)."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("devices", ctypes.c_int),
        ("compute_capability", ctypes.c_int),
        ("free_bytes", ctypes.c_size_t),
        ("taken_of_others", ctypes.c_size_t),
        ("out_of_memory", ctypes.c_bool),
        ("memory_operations", ctypes.c_bool),
        ("refuse_pinning", ctypes.c_bool),
        ("memory_mapping", ctypes.c_bool),
        ("most_pinned", ctypes.c_size_t),
    )


class GraphEnds(Exception):
    """Raised in place of running a kernel: the graph has no more nodes. The step is given up at the next hand-over, for
    nobody comes there, and the GPU is as good as before."""


@dataclass(frozen=True)
class Held:
    """What the fake driver has given out and not got back: objects of all kinds, bytes of GPUs' and pinned memory."""

    objects: int
    bytes: int


class EmulatedGpu:
    """What happened on the GPU: ``launches`` by kernel stem, and ``failures`` of kernels (the runtime reports a failed
    launch, the reason is here)."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self._kernels: list[GpuKernel] = []
        self._ids: dict[str, int] = {}  # by the image's SHA-256
        self._counting = threading.Lock()  # of launches, on the threads of several streams

    @property
    def held(self) -> Held:
        """At this moment."""
        objects, size = ctypes.c_uint64(), ctypes.c_uint64()
        _library().fake_cuda_held(ctypes.byref(objects), ctypes.byref(size))
        return Held(objects.value, size.value)

    def stand_in(self, kernel: GpuKernel) -> bytes:
        """An image that the fake driver takes for ``kernel`` from now on."""
        sizes = " ".join(str(_BYTES.get(kind, 8)) for _, kind in kernel.arguments)
        image = _ELF_HEADER + f"foreign {kernel.function} {sizes}\n{kernel.name}\0".encode()
        self._ids[hashlib.sha256(image).hexdigest()] = len(self._kernels)
        self._kernels.append(kernel)
        return image

    def load(self, image: int, size: int) -> int:
        """The fake driver's module loader: the number of the image's kernel, -1 for foreign images."""
        return self._ids.get(hashlib.sha256(ctypes.string_at(image, size)).hexdigest(), -1)

    def launch(self, number: int, grid: Any, n: int, words: Any) -> int:
        """The fake driver's launcher, on the thread of a stream: a CUresult."""
        kernel = self._kernels[number]
        try:
            assert n == len(kernel.arguments) + 2, "Triton's two pointers are missing"
            values = {name: _value(kind, words[i]) for i, (name, kind) in enumerate(kernel.arguments)}
            pointers = {words[i] for i, (_, kind) in enumerate(kernel.arguments) if kind.startswith("*")}
            memory = [area for pointer in pointers for area in _memory(pointer)]
            with self._counting:
                self.launches[kernel.stem] += 1
            run_kernel(kernel, (grid[0], grid[1], grid[2]), values, memory)
        except GraphEnds:
            return _GRAPH_ENDS
        except Exception as error:  # no exception passes the driver
            error.add_note(f"in {kernel.name}, grid {grid[0]} x {grid[1]} x {grid[2]}")
            self.failures.append(error)
            return _LAUNCH_FAILED
        return 0


def _value(kind: str, word: int) -> int | float:
    """An argument of the Triton type ``kind`` from the low bits of a word."""
    if kind.startswith("*"):
        return word
    bits = word.to_bytes(8, "little")
    if kind == "fp32":
        return ctypes.c_float.from_buffer_copy(bits).value
    return int.from_bytes(bits[: _BYTES[kind]], "little", signed=True)


def _memory(address: int) -> list[range]:
    """The addresses that belong to ``address``: of the allocation that it lies in, or those that have memory of the
    ones reserved around it; none if it was freed or never allocated."""
    most = 8
    while True:
        pairs = (ctypes.c_uint64 * (2 * most))()
        found = _library().fake_cuda_memory(ctypes.c_uint64(address), pairs, ctypes.c_size_t(most))
        if found <= most:
            return [range(pairs[2 * i], pairs[2 * i + 1]) for i in range(found)]
        most = found


_GPU = EmulatedGpu()
_CALLBACKS = (_LOADER(_GPU.load), _LAUNCHER(_GPU.launch))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="hetcomp-emulated-gpu-")


@functools.cache
def _library() -> ctypes.CDLL:
    """The fake driver. Loaded once for the process: whoever opens libcuda.so.1 from now on gets this one, by its
    SONAME, though the machine may have another; outside of :func:`emulated_gpu` it shows no device. The test is skipped
    where the machine's own was opened before."""
    library = Path(_folder().name) / "libcuda.so.1"
    sources = [str(ROOT / "runtime_lib" / "tests" / f"fake_{part}.cpp") for part in ("cuda", "mapped_memory")]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    command += ["-iquote", str(ROOT / "codegen_templates" / "probe"), *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))
    found = ctypes.CDLL("libcuda.so.1")
    if not hasattr(found, "fake_cuda"):
        pytest.skip("This process has loaded the machine's own libcuda.so.1 already; run the test in one of its own.")
    found.fake_cuda.restype = ctypes.POINTER(_FakeCuda)
    found.fake_cuda_memory.restype = ctypes.c_size_t
    found.fake_cuda_set_module_loader(_CALLBACKS[0])
    found.fake_cuda_set_launcher(_CALLBACKS[1])
    found.fake_cuda().contents.devices = 0
    return found


def _compile_stand_ins(
    kernels: Iterable[GpuKernel],
    ccs: Sequence[int],
    *,
    threads: int,
    progress: Callable[[str], None] | None = None,
) -> list[CompiledKernel]:
    """As hetcomp.backends.gpu.compile_kernels.compile_kernels."""
    made = []
    for kernel in {k.name: k for k in kernels}.values():
        image = Path(_folder().name) / f"{kernel.name}.cubin"
        image.write_bytes(_GPU.stand_in(kernel))
        made += [CompiledKernel(kernel, cc, kernel.function, image, kernel.warps, 0, 0) for cc in ccs]
    return made


@contextmanager
def emulated_gpu(
    compute_capability: int = 90,
    free_bytes: int = 1 << 30,
    devices: int = 1,
    taken_of_others: int = 0,
    refuse_pinning: bool = False,
    most_pinned: int = 1 << 62,
) -> Iterator[EmulatedGpu]:
    """This machine has ``devices`` GPUs meanwhile; of ``free_bytes``, other processes have ``taken_of_others`` on all
    but the first. refuse_pinning: of memory that others have allocated; most_pinned: bytes of one allocation of pinned
    memory. Raises what a kernel raised."""
    fake: _FakeCuda = _library().fake_cuda().contents
    fake.devices, fake.compute_capability, fake.free_bytes = devices, compute_capability, free_bytes
    fake.taken_of_others, fake.refuse_pinning, fake.most_pinned = taken_of_others, refuse_pinning, most_pinned
    _GPU.launches.clear()
    _GPU.failures.clear()
    importers = [m for m in list(sys.modules.values()) if getattr(m, "compile_kernels", None) is real.compile_kernels]
    patches = [mock.patch.object(module, "compile_kernels", _compile_stand_ins) for module in importers]
    for patch in patches:
        patch.start()
    try:
        yield _GPU
    finally:
        for patch in patches:
            patch.stop()
        fake.devices, fake.taken_of_others, fake.refuse_pinning, fake.most_pinned = 0, 0, False, 1 << 62
        if _GPU.failures:  # what the runtime reported has its reason here
            raise _GPU.failures[0]
