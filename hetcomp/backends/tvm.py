"""Kernel backend of the long tail: TVM compiles the arithmetic to a bare object, a C++ wrapper feeds it rows.

Nothing of TVM is needed on the machine that runs the program: the objects are serial, allocate nothing, and
what they leave open is in `support_source`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.backends.templates import render
from hetcomp.backends.tvm_cache import cached_kernel
from hetcomp.backends.tvm_kinds import BUILDERS, check_types, place_of
from hetcomp.backends.tvm_rowwise import RowKernel, emit_rowwise, kernel_name
from hetcomp.backends.tvm_toolchain import load_tvm
from hetcomp.errors import HetcompError
from hetcomp.ir import ops

if TYPE_CHECKING:
    from hetcomp.backends.tvm_region import Region

_SCORE = 50  # below hand-written kernels (100), above "can if it must"
_LINEAR_SCORE = 1


def support_source() -> str:
    """C++ source of what the kernel objects leave open; linked exactly once into a program that has any."""
    return render("tvm/support.cpp.j2")


def _compiled(name: str, build: Callable[[KernelRequest], RowKernel], request: KernelRequest) -> Kernel:
    load_tvm()
    return emit_rowwise(name, request.isa, build(request))


class TvmBackend:
    """See the module's text. Kernels are remembered by name for the life of the backend."""

    name = "tvm"

    def __init__(self) -> None:
        self._kernels: dict[str, Kernel] = {}
        self._regions: dict[str, Region] = {}

    def score(self, request: KernelRequest) -> int:
        """50 for the kinds of the long tail on f32, 1 for linear on f32 weights, 0 for the rest."""
        attrs = request.op.attrs
        if isinstance(attrs, ops.Aten):
            return _SCORE
        if isinstance(attrs, ops.Linear):
            return _LINEAR_SCORE if request.inputs[1].format == "f32" else 0
        return _SCORE if type(attrs) in BUILDERS else 0

    def workspace_bytes(self, request: KernelRequest) -> int:
        """0 but for aten regions, whose intermediates live there.

        Raises HetcompError, as emit does, for a region that TVM cannot take.
        """
        return self._region(request)[1].workspace_bytes if isinstance(request.op.attrs, ops.Aten) else 0

    def emit(self, request: KernelRequest) -> Kernel:
        """Generates the kernel.

        Raises HetcompError with the op's origin if the request is not one that this backend serves, or if the
        installed TVM is not the supported one.
        """
        attrs = request.op.attrs
        if isinstance(attrs, ops.Aten):
            return self._emit_region(request)
        build = BUILDERS.get(type(attrs))
        if build is None:
            raise HetcompError(f"TVM has no kernel for '{request.op.kind}' at {place_of(request)}.")
        check_types(request)
        facts = {
            "attrs": asdict(attrs),
            "shapes": [v.type.shape[1:] for v in (*request.inputs, *request.outputs)],
        }
        name = kernel_name(attrs.kind, request.isa, facts)
        if name not in self._kernels:
            self._kernels[name] = cached_kernel(name, lambda: _compiled(name, build, request))
        return self._kernels[name]

    def _emit_region(self, request: KernelRequest) -> Kernel:
        from hetcomp.backends.tvm_region import emit_region

        name, region = self._region(request)
        if name not in self._kernels:
            attrs = request.op.attrs
            assert isinstance(attrs, ops.Aten)
            self._kernels[name] = emit_region(name, request.isa, region, attrs, place_of(request))
        return self._kernels[name]

    def _region(self, request: KernelRequest) -> tuple[str, Region]:
        """Kernel name and lowered form of an aten region; the latter is the same for all instruction sets."""
        from hetcomp.backends.tvm_region import plan_region

        facts = {
            "attrs": repr(request.op.attrs),
            "types": [(str(v.type), v.format) for v in (*request.inputs, *request.outputs)],
            "dims": sorted(request.dims.items()),
        }
        key = kernel_name("aten", Isa.AVX2, facts)
        if key not in self._regions:
            load_tvm()
            self._regions[key] = plan_region(request)
        return kernel_name("aten", request.isa, facts), self._regions[key]
