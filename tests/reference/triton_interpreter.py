"""Triton's interpreter, repaired, and fast enough for whole models: importing this module patches it for the process.

Triton patches its language anew for every launch and every call of a device function, which costs more than small
kernels themselves; here it is patched once. What it works out again for every value of a kernel from the value's type
(the shape as a tuple of constants, numpy's type) is kept by type, and shapes are compared as lists of numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

from hetcomp.backends import packing
from hetcomp.backends.gpu.kernels import GpuKernel

_STAGES = 1  # of kernels that have the constant: pipelining means nothing here
_SCALARS = {"i32": (tl.int32, np.int32), "i64": (tl.int64, np.int64), "fp32": (tl.float32, np.float32)}
_memory: Sequence[range] = ()  # addresses that the running kernel may touch


def _dot_of_numbers(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """The interpreter of Triton 3.9 multiplies the bits of bf16 operands as whole numbers."""
    wide = [
        interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _given_dot(builder, *wide, d, input_precision, max_num_imprecise_acc)


def _convert_as_gpus(data: Any, given: Any, wanted: Any, rounding_mode: Any) -> Any:
    """The interpreter of Triton 3.9 cuts f32 off to bf16 or carries into the wrong bits; GPUs round to nearest even."""
    if given == tl.float32 and wanted == tl.bfloat16:
        return packing.to_bf16_bits(data).reshape(data.shape)
    return _given_convert(data, given, wanted, rounding_mode)


def _checked_load(builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    _check("reads", ptrs, mask)
    return _given_load(builder, ptrs, mask, *rest, **named)


def _checked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check("writes", ptrs, mask)
    return _given_store(builder, ptrs, value, mask, *rest)


def _check(verb: str, ptrs: Any, mask: Any) -> None:
    """Raises IndexError where a GPU would touch memory that no argument points into."""
    addresses = ptrs.data[mask.data]
    if not addresses.size:
        return
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    low, high = int(addresses.min()), int(addresses.max())
    if any(area.start <= low and high + size <= area.stop for area in _memory):  # the usual case
        return
    inside = np.zeros(addresses.shape, bool)
    for area in _memory:
        inside |= (addresses >= area.start) & (addresses + np.uint64(size) <= area.stop)
    if not inside.all():
        place = int(addresses[~inside][0])
        near = max((a for a in _memory if a.start <= place), key=lambda area: area.start, default=range(place))
        raise IndexError(f"the kernel {verb} outside of its memory, {place - near.start} bytes into {len(near)} bytes")


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *[s.value if isinstance(s, tl.constexpr) else s for s in shape])
    self.element_ty = element_ty
    if key not in _blocks:
        _given_block_type(self, element_ty, shape)
        _blocks[key] = (self.shape, self.numel, self.name)
    self.shape, self.numel, self.name = _blocks[key]


def _tensor(self: Any, handle: Any, type: Any) -> None:
    key = type.name if type.is_block() else ""
    if key not in _shapes:
        _given_tensor(self, handle, type)
        _shapes[key] = (self.shape, self.numel)
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[key]


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    """Blocks of equal rank, whose shapes Triton compares as tuples of constants, and scalars."""
    if not (lhs.type.is_block() and rhs.type.is_block()):
        return _given_broadcast(self, lhs, rhs) if lhs.type.is_block() or rhs.type.is_block() else (lhs, rhs)
    left, right = (list(x.type.shape.values) for x in (lhs, rhs))
    if left == right:
        return lhs, rhs
    if len(left) != len(right) or any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        return _given_broadcast(self, lhs, rhs)
    shape = [b if a == 1 else a for a, b in zip(left, right, strict=True)]
    return tuple(
        x
        if own == shape
        else self.make_tensor(self.builder.create_broadcast(x.handle, shape), tl.block_type(x.type.scalar, shape))
        for x, own in ((lhs, left), (rhs, right))
    )


def _np_dtype(type: Any) -> Any:
    if type.name not in _np_dtypes:
        _np_dtypes[type.name] = _given_np_dtype(type)
    return _np_dtypes[type.name]


def _patched_once(_: Any) -> Any:
    """Stands in for interpreter._patch_lang, whose answer only undoes what it did."""
    return SimpleNamespace(restore=lambda: None)


assert triton.knobs.runtime.interpret, "tests/conftest.py must be read before Triton is imported"
_given_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
_given_load = interpreter.InterpreterBuilder.create_masked_load
interpreter.InterpreterBuilder.create_masked_load = _checked_load
_given_store = interpreter.InterpreterBuilder.create_masked_store
interpreter.InterpreterBuilder.create_masked_store = _checked_store
_given_convert = interpreter._convert_float
interpreter._convert_float = _convert_as_gpus
_blocks: dict[tuple[Any, ...], tuple[Any, Any, str]] = {}
_given_block_type = tl.block_type.__init__
tl.block_type.__init__ = _block_type
_shapes: dict[str, tuple[Any, Any]] = {}
_given_tensor = tl.tensor.__init__
tl.tensor.__init__ = _tensor
_given_broadcast = semantic.TritonSemantic.broadcast_impl_value
semantic.TritonSemantic.broadcast_impl_value = _broadcast
_np_dtypes: dict[str, Any] = {}
_given_np_dtype = interpreter._get_np_dtype
interpreter._get_np_dtype = _np_dtype
# Our kernels see triton.language, Triton's own functions (tl.zeros, tl.max) see triton.language.core.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = _patched_once


@functools.cache
def _function(kernel: GpuKernel) -> Callable[..., None]:
    """The kernel with its constants given."""
    module = import_module(f"hetcomp.codegen_templates.gpu.{kernel.module}")
    stages = {"STAGES": _STAGES} if kernel.stages else {}
    return functools.partial(getattr(module, kernel.function).rewrite(), **dict(kernel.constants), **stages)


def _argument(kind: str, value: int | float) -> Any:
    if kind.startswith("*"):
        type_, number = tl.pointer_type(tl.str_to_ty(kind[1:], None)), np.uint64(value)
    else:
        type_, dtype = _SCALARS[kind]
        number = dtype(value)
    return tl.tensor(interpreter.TensorHandle(np.array([number]), type_), type_)


def run_kernel(
    kernel: GpuKernel,
    grid: tuple[int, int, int],
    values: Mapping[str, int | float],
    memory: Sequence[range],
    *,
    find_overflows: bool = True,
) -> None:
    """Runs all programs of ``grid`` one after the other. ``values``: the kernel's arguments by name, addresses for
    pointers. Raises IndexError when it leaves the addresses of ``memory``. ``find_overflows``: whole numbers of 32 bits
    are computed in 64 as well and must agree, which takes three times as long. Not for several threads at once."""
    global _memory
    _memory = memory
    function = _function(kernel)
    arguments = {name: _argument(kind, values[name]) for name, kind in kernel.arguments}
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=find_overflows)
    builder.set_grid_dim(*grid)
    with np.errstate(all="ignore"):
        for x, y, z in np.ndindex(*grid):
            builder.set_grid_idx(x, y, z)
            function(**arguments)
