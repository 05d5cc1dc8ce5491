"""Loads and stores of kernels on host memory, which may not leave the memory that they were given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from triton._C.libtriton import interpreter as memory_access

from tests.reference.ttir_frame import Frame, Launch, Step
from tests.reference.ttir_operations import DTYPES, Array
from tests.reference.ttir_text import Operation, Type


def _dtype_in_memory(type_: Type) -> Any:
    """Of the same size, known to numpy itself."""
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[type_.bytes]


def load(operation: Operation) -> Step:
    pointer, *rest = operation.operands
    (name,), type_ = operation.results, operation.types[0]
    stored, dtype = _dtype_in_memory(type_), np.dtype(DTYPES[type_.element])

    def run(frame: Frame, launch: Launch) -> None:
        given = [frame[pointer], frame[rest[0]] if rest else np.ones(1, np.bool_).reshape((1,) * frame[pointer].ndim)]
        given += (
            [frame[rest[1]].astype(dtype, copy=False)] if len(rest) > 1 else [np.zeros((1,) * given[0].ndim, dtype)]
        )
        at, mask, other = (np.ascontiguousarray(a) for a in np.broadcast_arrays(*given))
        _check("reads", at, mask, type_.bytes, launch.memory)
        found = memory_access.load(at.view(np.uint64), mask, other.view(stored), np.dtype(stored))
        frame[name] = found.view(dtype)

    return run


def store(operation: Operation) -> Step:
    type_ = operation.types[0]
    stored, dtype = _dtype_in_memory(type_), np.dtype(DTYPES[type_.element])

    def run(frame: Frame, launch: Launch) -> None:
        pointer, value, *masks = (frame[name] for name in operation.operands)
        mask = masks[0] if masks else np.ones((1,) * pointer.ndim, np.bool_)
        rows = np.broadcast_to(np.zeros(1, np.bool_), (frame.programs, *type_.shape))
        at, new, where, _ = np.broadcast_arrays(pointer, value.astype(dtype, copy=False), mask, rows)
        at, new, where = (np.ascontiguousarray(a) for a in (at, new, where))
        _check("writes", at, where, type_.bytes, launch.memory)
        memory_access.store(at.view(np.uint64), new.view(stored), where)

    return run


def hand_over(operation: Operation) -> Step:
    """The assembly by which kernels await and raise flags (codegen_templates/gpu/flags.py): x86 keeps the order of what
    is written, and of what is read."""
    (name,), (pointer,) = operation.results, operation.operands
    raises = "st.relaxed.sys" in operation.attributes
    if not raises and "ld.acquire.sys" not in operation.attributes:
        raise ValueError(f"assembly that the interpreter does not know: {operation.attributes}")

    def run(frame: Frame, launch: Launch) -> None:
        at = np.ascontiguousarray(frame[pointer])
        everywhere = np.ones(at.shape, np.bool_)
        _check("awaits or raises a flag", at, everywhere, 4, launch.memory)
        if raises:
            memory_access.store(at.view(np.uint64), np.ones(at.shape, np.uint32), everywhere)
            frame[name] = np.ones(1, np.int32)
        else:
            time.sleep(0)  # whoever raises it may need Python
            nothing = np.zeros(at.shape, np.uint32)
            found = memory_access.load(at.view(np.uint64), everywhere, nothing, np.dtype(np.uint32))
            frame[name] = found.view(np.int32)

    return run


def _check(verb: str, pointers: Array, mask: Array, size: int, memory: Sequence[range]) -> None:
    """Raises IndexError where a GPU would touch memory that no argument points into."""
    addresses = pointers[mask]
    if not addresses.size:
        return
    low, high = int(addresses.min()), int(addresses.max())
    if any(area.start <= low and high + size <= area.stop for area in memory):  # the usual case
        return
    inside = np.zeros(addresses.shape, bool)
    for area in memory:
        inside |= (addresses >= area.start) & (addresses + size <= area.stop)
    if not inside.all():
        place = int(addresses[~inside][0])
        near = max((a for a in memory if a.start <= place), key=lambda area: area.start, default=range(place))
        raise IndexError(f"the kernel {verb} outside of its memory, {place - near.start} bytes into {len(near)} bytes")
