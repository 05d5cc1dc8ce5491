"""The contract between the Plan and a kernel backend (Jinja C++ templates, TVM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hetcomp.hardware.tuning import KernelTuning
from hetcomp.ir.plan import Op, Value


class Isa(StrEnum):
    """Instruction sets that CPU code is generated for, weakest first."""

    AVX2 = "avx2"  # x86-64-v3: AVX2, FMA, F16C
    AVX_VNNI = "avx_vnni"  # and byte products in 256 bits (Intel Core since Alder Lake, Zen 5)
    AVX512 = "avx512"  # x86-64-v4: AVX-512 F, BW, CD, DQ, VL
    AVX512_VNNI = "avx512_vnni"  # and byte products (Cascade Lake and later)
    AVX512_BF16 = "avx512_bf16"  # and products of bf16 pairs (Cooper Lake, Zen 4, Sapphire Rapids)
    AMX_BF16 = "amx_bf16"  # and matrix tiles of bf16 (Sapphire Rapids and later)

    @property
    def level(self) -> Isa:
        """The micro-architecture level that it extends: AVX2 (x86-64-v3) or AVX512 (x86-64-v4)."""
        return Isa.AVX2 if self in (Isa.AVX2, Isa.AVX_VNNI) else Isa.AVX512


@dataclass(frozen=True)
class KernelRequest:
    """One op to generate code for. ``dims`` are upper bounds of the symbolic dimensions (T, R, slots, context);
    ``inputs``/``outputs`` are the op's values in order, weights with their ``format`` chosen. ``tunings``: constants
    that were measured on the machine; where they lack the op's family, the instruction set's defaults serve.
    ``from_disk``: an op of experts whose weights may have to be read from the disk."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    isa: Isa
    dims: Mapping[str, int] = field(default_factory=dict)
    tunings: tuple[KernelTuning, ...] = ()
    from_disk: bool = False


@dataclass(frozen=True)
class Kernel:
    """Generated code of one op.

    ``source`` is a complete C++20 translation unit that includes ``hetcomp/kernel.h`` and defines
    ``void hetcomp::<name>(hetcomp::Lane&, const hetcomp::KernelArgs&)``. The name is derived from what the code
    depends on: equal names have equal sources. ``objects`` are relocatable object files to link with it, keyed
    by a stable name. ``workspace_bytes`` is the scratch memory at the upper bounds of the request's dims.
    """

    name: str
    source: str
    workspace_bytes: int = 0
    objects: tuple[tuple[str, bytes], ...] = ()


class KernelBackend(Protocol):
    """A generator of kernels. Where several backends support an op, the highest score wins."""

    name: str

    def score(self, request: KernelRequest) -> int:
        """How well this backend serves the request; 0: not at all."""
        ...

    def workspace_bytes(self, request: KernelRequest) -> int:
        """The ``workspace_bytes`` that ``emit`` will report, without generating code."""
        ...

    def emit(self, request: KernelRequest) -> Kernel:
        """Generates the kernel. Raises HetcompError with the op's origin if it cannot."""
        ...
