"""Compiles generated kernels into a shared library and calls them on a lane set of N threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends.cpu import CpuBackend
from hetcomp.backends.native_compiler import cache_folder, contract_digest, isa_flags
from hetcomp.backends.packing import PANELS, TAKEN_OVER
from hetcomp.backends.precompiled_header import precompiled_header
from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.hardware.compilers import probe_cxx
from hetcomp.hardware.detect import detect_machine
from hetcomp.ir.ops import Attrs, Linear
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests import sampled_cases

ROOT = Path(__file__).resolve().parents[2]
_CONTRACT = ROOT / "runtime_lib" / "include"
_COMMON = (
    *("-std=c++20", "-fPIC", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-shared"),
    *("-Wall", "-Wextra", "-Werror", f"-I{_CONTRACT}"),
)
# GCC 12 sees uninitialised reads inside its own AVX-512 intrinsics (GCC bug 105593).
_GCC = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")
_GUARD = 256  # bytes in front of and behind a buffer


@functools.cache
def isas_here() -> list[Isa]:
    """The instruction sets that this machine can run, weakest first."""
    have = detect_machine().isas
    return [isa for isa in Isa if isa.value in have]


def isas_to_test() -> list[Isa]:
    """Those, and AMX_BF16 where only its tiles are missing: then they are emulated (``emulated_tiles.h``)."""
    here = isas_here()
    return [*here, Isa.AMX_BF16] if here[-1] == Isa.AVX512_BF16 else here


def weakest_and_best() -> list[Isa]:
    """The ends of isas_here(), for kernels whose code all instruction sets of a vocabulary share."""
    return sorted({isas_here()[0], isas_here()[-1]}, key=list(Isa).index)


def thorough_isas() -> list[Isa]:
    """Those of isas_to_test() whose kernels are tested in all shapes: the weakest, the best, and emulated ones. The
    others share vocabulary and tiles with one of them and differ in single instructions, which one odd shape a format
    shows."""
    return sorted({*weakest_and_best(), isas_to_test()[-1]}, key=list(Isa).index)


def code(kernel: Kernel) -> str:
    """The source without the names of kernel and instruction set, the latter in the first line."""
    return kernel.source.replace(kernel.name, "").partition("\n")[2]


@functools.cache
def isas_of(weight_format: str) -> list[Isa]:
    """What a format's kernels are tested on: thorough_isas(), and the best of each of the others whose code is the same
    as no other's (of f32 it is the same on all with AVX-512); K blocks on thorough_isas() alone, for beside other
    whole-number formats they add vocabulary of AVX2 and AVX-512 only."""
    if weight_format in TAKEN_OVER:
        return thorough_isas()
    w = weight("w", (16, 32), weight_format, PANELS)
    best = {}
    for isa in sorted(isas_to_test(), key=lambda isa: isa in thorough_isas()):
        best[code(emit(Linear(32, 16), [activation("x", "T", 32), w], [activation("y", "T", 16)], isa, {"T": 1}))] = isa
    return sorted(best.values(), key=list(Isa).index)


def _optimisation(isa: Isa) -> str:
    """What compiled programs have, on the weakest and the best instruction set here, if all cases run; else, between
    them and emulated, where g++ would take twice as long, less: the numbers are those of the source all the same."""
    return "-O3" if sampled_cases.everything and isa in weakest_and_best() else "-O1"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hetcomp-kernels-"))


_probed = functools.cache(probe_cxx)


def _compile(compiler: str, isa: Isa, source: Path, library: Path, emulate: bool = False) -> None:
    found = _probed(compiler)
    assert found is not None, compiler
    early: tuple[str, ...] = ()
    optimisation, headers = _optimisation(isa), cache_folder().parent / "headers"
    if found.kind == "g++":
        flags = (*_COMMON, optimisation, *_GCC, *isa_flags(isa), "-pthread")
        before = precompiled_header(found, flags, source.read_text(), contract_digest(_CONTRACT), headers)
        early = (*_GCC, "-Winvalid-pch", *before)
    if emulate:
        early = (*early, "-include", str(Path(__file__).with_name("emulated_tiles.h")))
    command = [compiler, *_COMMON, optimisation, *early, *isa_flags(isa), "-pthread", "-o", str(library), str(source)]
    subprocess.run(command, check=True)


@functools.cache
def _runner() -> Any:
    library = _folder() / "harness.so"
    _compile("g++", Isa.AVX2, Path(__file__).with_suffix(".cpp"), library)
    run = ctypes.CDLL(str(library)).hetcomp_harness_run
    run.restype = ctypes.c_double
    return run


class _Step(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("n_logit_rows", ctypes.c_int64),
        ("logit_rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("context", ctypes.c_int64),
        ("lane_ns", ctypes.c_void_p),
        ("pinned", ctypes.c_void_p),
        ("hand_over", ctypes.c_void_p),
    )


@dataclass
class Step:
    """What a step tells the kernel beside its operands: i32 positions [T], slots [T], logit_rows [R], f32
    inverse_temperatures [R]."""

    positions: npt.NDArray[np.int32] | None = None
    slots: npt.NDArray[np.int32] | None = None
    logit_rows: npt.NDArray[np.int32] | None = None
    context: int = 0
    inverse_temperatures: npt.NDArray[np.float32] | None = None


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes at a multiple of 64."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def activation(id: str, *shape: int | str) -> Value:
    """A row-major f32 operand."""
    return Value(id, TensorType(DType.F32, shape), ValueKind.ACT)


def weight(id: str, shape: tuple[int, ...], weight_format: str, layout: str) -> Value:
    """A packed operand."""
    return Value(id, TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn=id, format=weight_format)


def cache(id: str, dtype: DType, heads: int, dim: int) -> Value:
    """A KV cache."""
    return Value(id, TensorType(dtype, ("slots", heads, "context", dim)), ValueKind.STATE)


def state(id: str, *shape: int) -> Value:
    """A state of a recurrence; ``shape``: a sequence's."""
    return Value(id, TensorType(DType.F32, ("slots", *shape)), ValueKind.STATE)


def emit(
    attrs: Attrs,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    isa: Isa,
    dims: Mapping[str, int],
    *,
    from_disk: bool = False,
) -> Kernel:
    """The CPU backend's kernel for one op."""
    op = Op("op", attrs, (), ())
    return CpuBackend().emit(KernelRequest(op, tuple(inputs), tuple(outputs), isa, dict(dims), from_disk=from_disk))


def build(
    attrs: Attrs,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    isa: Isa,
    dims: Mapping[str, int],
    *,
    from_disk: bool = False,
) -> CompiledKernel:
    """The same, compiled."""
    return CompiledKernel(emit(attrs, inputs, outputs, isa, dims, from_disk=from_disk), isa)


class _Pair(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int64), ("scale", ctypes.c_float), ("a", ctypes.c_void_p), ("b", ctypes.c_void_p))


class _Adapters(ctypes.Structure):
    _fields_ = (
        ("of_token", ctypes.c_void_p),
        ("of_logit_row", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    )


class _AdaptedOp(ctypes.Structure):
    _fields_ = (
        ("adapters", ctypes.c_void_p),
        ("weights", ctypes.c_int64 * 2),
        ("of_row", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class AdaptedRows:
    """Adapters of an op's rows. ``pairs``: of each adapter, by weight of the op (one or two), (rank, scale, the bytes
    of a, of b), or None. ``of_row``: each row's adapter, -1: none. ``scratch``: numbers of scratch memory."""

    def __init__(
        self,
        pairs: Sequence[Sequence[tuple[int, float, npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None]],
        of_row: npt.NDArray[np.int32],
        scratch: int,
    ) -> None:
        self._of_row = np.ascontiguousarray(of_row, np.int32)
        self._scratch = _Guarded(4 * scratch)
        self._held: list[Any] = []
        tables = [(ctypes.c_void_p * 2)(*[self._pair(pair) for pair in (*adapter, None)[:2]]) for adapter in pairs]
        self._held += tables
        array = (ctypes.c_void_p * max(1, len(tables)))(*[ctypes.addressof(table) for table in tables])
        rank = max((pair[0] for adapter in pairs for pair in adapter if pair is not None), default=0)
        rows, numbers = self._of_row.ctypes.data, self._scratch.body.ctypes.data
        adapters = _Adapters(rows, rows, len(tables), ctypes.addressof(array), rank, numbers)
        self._held += [array, adapters]
        last = len(pairs[0]) - 1 if pairs else 0
        self.op = _AdaptedOp(ctypes.addressof(adapters), (ctypes.c_int64 * 2)(0, last), rows, numbers)

    def _pair(self, pair: tuple[int, float, npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None) -> int | None:
        if pair is None:
            return None
        rank, scale, *parts = pair
        copies = [_guarded_copy(part) for part in parts]
        struct = _Pair(rank, scale, *[copy.ctypes.data for copy in copies])
        self._held += [copies, struct]
        return ctypes.addressof(struct)

    def check(self) -> None:
        """Asserts that the kernel stayed inside the scratch memory."""
        self._scratch.check()


class CompiledKernel:
    """A kernel compiled for one instruction set, with the harness's lane set. Tiles are emulated where this machine
    lacks them, or, if not ``emulate``, compiled all the same."""

    def __init__(self, kernel: Kernel, isa: Isa, compiler: str = "g++", emulate: bool = True) -> None:
        self.kernel = kernel
        emulate = emulate and isa not in isas_here() and isa in isas_to_test()
        stem = hashlib.sha256(f"{kernel.name}{compiler}{emulate}{kernel.source}".encode()).hexdigest()[:16]
        library = _folder() / f"{stem}.so"
        if not library.exists():
            source = _folder() / f"{stem}.cpp"
            entry = f"return reinterpret_cast<void*>(&hetcomp::{kernel.name});"
            source.write_text(f'{kernel.source}\nextern "C" void* entry() {{ {entry} }}\n')
            _compile(compiler, isa, source, library, emulate)
        # Kept: unloading the library would pull the code from under the kernel.
        self._library = ctypes.CDLL(str(library))
        self._library.entry.restype = ctypes.c_void_p
        self._entry = self._library.entry()

    def __call__(
        self,
        inputs: Sequence[npt.NDArray[Any]],
        output_shapes: Sequence[tuple[int, ...]],
        *,
        rows: int,
        threads: int = 1,
        step: Step | None = None,
        in_place: Container[int] = (),
        adapted: AdaptedRows | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """Runs the kernel and returns its f32 outputs; asserts that it stays inside outputs and workspace.

        Inputs are copied, with NaNs behind them, so that a read beyond the end shows in the result; those
        whose index is in ``in_place`` (caches that the kernel changes) are passed as they are.
        """
        held = [a if i in in_place else _guarded_copy(a) for i, a in enumerate(inputs)]
        guarded = [_Guarded(4 * int(np.prod(s))) for s in output_shapes]
        workspace = _Guarded(self.kernel.workspace_bytes)
        self._call([held], [g.body for g in guarded], workspace.body, rows, threads, 1, step or Step(), adapted)
        for region in (*guarded, workspace):
            region.check()
        return [g.body.view(np.float32).reshape(s).copy() for g, s in zip(guarded, output_shapes, strict=True)]

    def seconds(
        self,
        input_sets: Sequence[Sequence[npt.NDArray[Any]]],
        output: npt.NDArray[Any],
        *,
        rows: int,
        threads: int,
        calls: int,
        step: Step | None = None,
    ) -> float:
        """Seconds of ``calls`` calls that take turns over ``input_sets`` (aligned arrays)."""
        workspace = aligned(self.kernel.workspace_bytes)
        workspace[:] = 0
        return self._call(input_sets, [output], workspace, rows, threads, calls, step or Step())

    def _call(
        self,
        input_sets: Sequence[Sequence[npt.NDArray[Any]]],
        outputs: Sequence[npt.NDArray[Any]],
        workspace: npt.NDArray[np.uint8],
        rows: int,
        threads: int,
        calls: int,
        step: Step,
        adapted: AdaptedRows | None = None,
    ) -> float:
        struct, alive = _step(step, rows)
        flat = [a.ctypes.data for inputs in input_sets for a in inputs]
        seconds: float = _runner()(
            ctypes.c_void_p(self._entry),
            threads,
            calls,
            ctypes.byref(struct),
            ctypes.c_int64(rows),
            len(input_sets),
            len(input_sets[0]),
            (ctypes.c_void_p * len(flat))(*flat),
            (ctypes.c_void_p * max(1, len(outputs)))(*[o.ctypes.data for o in outputs]),
            ctypes.c_void_p(workspace.ctypes.data),
            ctypes.byref(adapted.op) if adapted is not None else None,
        )
        del alive
        if adapted is not None:
            adapted.check()
        return seconds


class _Guarded:
    """A buffer full of NaN between two guard zones."""

    def __init__(self, size: int) -> None:
        self._all = aligned(size + 2 * _GUARD)
        self._all[:] = 0xFF
        self.body = self._all[_GUARD : _GUARD + size]

    def check(self) -> None:
        assert (self._all[:_GUARD] == 0xFF).all(), "the kernel wrote in front of a buffer"
        assert (self._all[_GUARD + self.body.size :] == 0xFF).all(), "the kernel wrote behind a buffer"


def _guarded_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    buffer = aligned(array.nbytes + _GUARD)
    buffer[:] = 0xFF
    copy = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _step(step: Step, rows: int) -> tuple[_Step, list[npt.NDArray[np.int32]]]:
    alive: list[npt.NDArray[np.int32]] = []

    def address(array: npt.NDArray[np.int32] | None) -> int | None:
        if array is None:
            return None
        alive.append(np.ascontiguousarray(array, np.int32))
        return alive[-1].ctypes.data

    struct = _Step(
        n_tokens=rows,
        positions=address(step.positions),
        slots=address(step.slots),
        n_logit_rows=0 if step.logit_rows is None else len(step.logit_rows),
        logit_rows=address(step.logit_rows),
        context=step.context,
    )
    return struct, alive


def clang_here() -> str | None:
    """clang++, if it is installed."""
    return shutil.which("clang++")
