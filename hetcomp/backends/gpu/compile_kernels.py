"""Compiles GPU kernels ahead of time, in parallel, with a cache keyed by content.

A cubin depends on the kernel's description, the Triton sources, Triton's version and the architecture; their SHA-256
names it beside the CPU's objects (``native_compiler.cache_folder``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, TypeVar

from hetcomp.backends.gpu.architectures import has_deep_memory, has_tensor_copies, shared_limit
from hetcomp.backends.gpu.kernels import GpuKernel
from hetcomp.backends.native_compiler import cache_folder
from hetcomp.errors import HetcompError


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one architecture: symbol of its entry, file of its cubin (in the cache) and launch facts. A block
    has 32 * num_warps threads and shared_bytes of dynamic shared memory; the entry takes the kernel's arguments in
    order, then two pointers more: global_scratch_bytes of memory and one that is null."""

    kernel: GpuKernel
    cc: int
    entry: str
    cubin: Path
    num_warps: int
    shared_bytes: int
    global_scratch_bytes: int


def compile_kernels(
    kernels: Iterable[GpuKernel],
    ccs: Sequence[int],
    *,
    threads: int,
    progress: Callable[[str], None] | None = None,
) -> list[CompiledKernel]:
    """Compiles each different kernel for each compute capability (80, 90, ..), ``threads`` at a time, and calls
    ``progress`` with the name of each that is done.

    Raises HetcompError if Triton is not installed, an architecture is unknown or a kernel does not compile or needs
    more shared memory than the architecture has (bugs of a kernel or its tile).
    """
    for cc in ccs:
        shared_limit(cc)
    jobs = [(kernel, cc) for cc in ccs for kernel in {k.name: k for k in kernels}.values()]

    def one(job: tuple[GpuKernel, int], compile_one: _CompileOne) -> CompiledKernel:
        made = compile_one(*job)
        if progress:
            progress(f"{made.kernel.name} sm_{made.cc}")
        return made

    return _in_parallel(one, jobs, threads)


def compile_candidates(kernels: Iterable[GpuKernel], cc: int, *, threads: int) -> dict[str, CompiledKernel]:
    """As compile_kernels for one compute capability, by name, but for those that do not compile or need more shared
    memory than it has."""

    def one(kernel: GpuKernel, compile_one: _CompileOne) -> CompiledKernel | None:
        try:
            return compile_one(kernel, cc)
        except HetcompError:
            return None

    made = _in_parallel(one, {k.name: k for k in kernels}.values(), threads)
    return {each.kernel.name: each for each in made if each is not None}


_CompileOne = Callable[[GpuKernel, int], CompiledKernel]
_Job = TypeVar("_Job")
_Made = TypeVar("_Made")


def _in_parallel(one: Callable[[_Job, _CompileOne], _Made], jobs: Iterable[_Job], threads: int) -> list[_Made]:
    version, folder = triton_version(), cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _Workers() as workers, ThreadPoolExecutor(max_workers=max(1, threads)) as pool:

        def compile_one(kernel: GpuKernel, cc: int) -> CompiledKernel:
            return _cached(folder, kernel, cc, version, workers)

        return list(pool.map(lambda job: one(job, compile_one), jobs))


def triton_version() -> str:
    """Raises HetcompError if Triton is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise HetcompError(
            "GPU kernels are compiled by Triton, which is not installed; run pip install 'hetcomp[gpu]', or compile "
            "for the CPU alone with --vram 0."
        ) from None


@cache
def sources_hash() -> str:
    """SHA-256 of all kernels' sources."""
    digest = hashlib.sha256()
    folder = resources.files("hetcomp.codegen_templates.gpu")
    for source in sorted((f for f in folder.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _job(kernel: GpuKernel, cc: int) -> dict[str, Any]:
    constants = dict(kernel.constants)
    if not has_deep_memory(cc):
        constants.update(kernel.shallow)
    if constants.get("DESCRIPTORS"):
        constants["DESCRIPTORS"] = has_tensor_copies(cc)
    return {
        "module": kernel.module,
        "function": kernel.function,
        "arguments": kernel.arguments,
        "constants": constants,
        "cc": cc,
        "warps": kernel.warps,
    }


def _cached(folder: Path, kernel: GpuKernel, cc: int, version: str, workers: _Workers) -> CompiledKernel:
    job = json.dumps(_job(kernel, cc))
    key = hashlib.sha256("\0".join((version, sources_hash(), job)).encode()).hexdigest()
    cubin, facts = folder / f"{key}.cubin", folder / f"{key}.json"
    if not facts.exists():  # written last
        answer = workers.ask(job)
        if "error" in answer:
            raise HetcompError(f"Triton could not compile the kernel {kernel.name} for sm_{cc}: {answer['error']}")
        _replace(cubin, base64.b64decode(answer.pop("cubin")))
        _replace(facts, json.dumps(answer).encode())
    made = CompiledKernel(kernel, cc, cubin=cubin, **json.loads(facts.read_bytes()))
    if made.shared_bytes > shared_limit(cc):
        raise HetcompError(
            f"Kernel {kernel.name} needs {made.shared_bytes} bytes of shared memory, "
            f"sm_{cc} has {shared_limit(cc)} for a block; its tile must be smaller there."
        )
    return made


def _replace(target: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as staged:
        staged.write(data)
    Path(staged.name).replace(target)


class _Workers:
    """Compiler processes, started when there is work for one more, ended with the context."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []

    def __enter__(self) -> _Workers:
        # Triton's own cache would keep every stage of every kernel for good.
        self._folder = tempfile.TemporaryDirectory(prefix="hetcomp-triton-")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def ask(self, job: str) -> dict[str, Any]:
        """The answer to a job from a process that has nothing else to do."""
        with self._worker() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(job + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            return {"error": f"the compiler process ended with code {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextmanager
    def _worker(self) -> Iterator[subprocess.Popen[str]]:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        yield process
        if process.poll() is None:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": self._folder.name}
        process = subprocess.Popen(
            [sys.executable, "-m", "hetcomp.backends.gpu.compile_worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._all.append(process)
        return process
