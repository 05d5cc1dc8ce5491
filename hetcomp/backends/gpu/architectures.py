"""What GPU architectures differ in, as far as our kernels care."""

from __future__ import annotations

from hetcomp.errors import HetcompError

# Shared memory that one block may have, KB (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": maximum amount of shared memory per thread block).
_SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}

ARCHITECTURES = tuple(_SHARED_KB)


def shared_limit(cc: int) -> int:
    """Bytes of shared memory that a block may have. Raises HetcompError for an architecture we do not know."""
    if cc not in _SHARED_KB:
        known = ", ".join(map(str, ARCHITECTURES))
        raise HetcompError(f"GPU kernels cannot be compiled for compute capability {cc}; expected one of {known}.")
    return _SHARED_KB[cc] * 1024


def has_deep_memory(cc: int) -> bool:
    """Whether a block has room for the deeper pipelines (``GpuKernel.shallow``)."""
    return shared_limit(cc) >= 160 * 1024


def has_tensor_copies(cc: int) -> bool:
    """Whether tiles are copied to shared memory by a unit of their own (PTX ISA, cp.async.bulk.tensor)."""
    return cc >= 90
