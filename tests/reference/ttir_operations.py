"""What operations of Triton's IR compute, on many programs at once.

A scalar is an array (programs,), a tensor (programs, ...); what does not depend on the program has one row instead, and
what does not change along a dimension may have length 1 there: numpy broadcasts. bf16 and fp8 are ml_dtypes'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from scipy import special

from tests.reference.ttir_text import Operation, Type

Array = npt.NDArray[Any]
DTYPES: dict[str, Any] = {
    "i1": np.bool_,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
}
_UNSIGNED = {"i1": np.bool_, "i8": np.uint8, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def constant(operation: Operation) -> Array:
    """One row, of length 1 in all dimensions if all numbers are equal."""
    (type_,) = operation.types
    text = operation.attributes.strip()
    if (dense := re.fullmatch(r"dense<(.*)>", text)) is not None:
        text = dense.group(1)
    values = [_number(part, type_) for part in text.strip("[]").split(", ")]
    if len(values) == 1:
        return np.array(values, DTYPES[type_.element]).reshape(1, *(1 for _ in type_.shape))
    return np.array(values, DTYPES[type_.element]).reshape(1, *type_.shape)


def _number(text: str, type_: Type) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if not text.startswith("0x"):
        return float(text) if type_.element.startswith(("f", "bf")) else int(text)
    bits = int(text, 16).to_bytes(type_.bytes, "little")  # what has no decimal form: infinities, NaN
    return np.frombuffer(bits, DTYPES[type_.element])[0]


def full(array: Array, shape: tuple[int, ...]) -> Array:
    """As many rows as it has, and ``shape`` in each."""
    return np.broadcast_to(array, (array.shape[0], *shape))


def _of_same_rank(*arrays: Array) -> tuple[Array, ...]:
    """Scalars beside tensors get their dimensions."""
    rank = max(a.ndim for a in arrays)
    return tuple(a if a.ndim == rank else a.reshape(-1, *(1 for _ in range(rank - 1))) for a in arrays)


def _whole(op: Callable[..., Any], unsigned: bool = False) -> Callable[[Operation], Callable[..., Array]]:
    """An operation on whole numbers of equal types."""

    def make(operation: Operation) -> Callable[..., Array]:
        element = operation.types[0].element
        if not unsigned:
            return lambda *args: op(*args)
        as_is, other = DTYPES[element], _UNSIGNED[element]
        return lambda *args: op(*(a.view(other) for a in args)).view(as_is)

    return make


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero."""
    q = np.floor_divide(a, b)
    return q + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0))).astype(q.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, b)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Products of f32 are exact in f64; the sum is rounded there and to f32, which is one rounding but for ties."""
    wide = a.astype(np.float64) * b + c
    return wide.astype(a.dtype)


def _wide(op: Callable[..., Any]) -> Callable[[Operation], Callable[..., Array]]:
    return lambda operation: lambda *args: op(*args).astype(args[0].dtype, copy=False)


def _compare_whole(operation: Operation) -> Callable[..., Array]:
    predicate = operation.attributes.split(",")[0].strip()
    if predicate in _COMPARE:
        return _COMPARE[predicate]
    op, unsigned = _COMPARE[predicate[1:]], _UNSIGNED[operation.types[0].element]
    if predicate[0] == "s":
        return op
    return lambda a, b: op(a.view(unsigned), b.view(unsigned))


def _compare_real(operation: Operation) -> Callable[..., Array]:
    predicate = operation.attributes.split(",")[0].strip()
    if predicate in ("uno", "ord"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (predicate == "uno")
    op = _COMPARE[predicate[1:]]
    if predicate == "one":
        return lambda a, b: np.not_equal(a, b) & ~(np.isnan(a) | np.isnan(b))
    if predicate[0] == "o" or predicate == "une":
        return op
    return lambda a, b: op(a, b) | np.isnan(a) | np.isnan(b)


def _select(_: Operation) -> Callable[..., Array]:
    return lambda c, a, b: np.where(*_of_same_rank(c, a, b))


def _extend(signed: bool) -> Callable[[Operation], Callable[..., Array]]:
    def make(operation: Operation) -> Callable[..., Array]:
        given, wanted = (t.element for t in operation.types)
        dtype = DTYPES[wanted]
        if given == "i1":
            return lambda x: -x.astype(dtype) if signed else x.astype(dtype)
        return lambda x: (x if signed else x.view(_UNSIGNED[given])).astype(dtype)

    return make


def _truncate_whole(operation: Operation) -> Callable[..., Array]:
    dtype = DTYPES[operation.types[-1].element]
    if dtype is np.bool_:
        return lambda x: (x & 1).astype(np.bool_)
    return lambda x: x.astype(dtype)


def _convert(operation: Operation) -> Callable[..., Array]:
    """Between real types, to nearest even; to E4M3 what is too large becomes the largest, as GPUs do it."""
    element = operation.types[-1].element
    dtype = DTYPES[element]
    if element == "f8E4M3FN":
        return lambda x: np.clip(x.astype(np.float32), -448, 448).astype(dtype)
    return lambda x: x.astype(dtype)


def _bitcast(operation: Operation) -> Callable[..., Array]:
    wanted = operation.types[-1]
    return lambda x: x if wanted.pointer else x.view(DTYPES[wanted.element])


def _to_whole(operation: Operation) -> Callable[..., Array]:
    dtype = DTYPES[operation.types[-1].element]
    return lambda x: np.trunc(x.astype(np.float64)).astype(dtype)


def _unsigned_to_real(operation: Operation) -> Callable[..., Array]:
    given, wanted = (t.element for t in operation.types)
    return lambda x: x.view(_UNSIGNED[given]).astype(DTYPES[wanted])


def _range(operation: Operation) -> Callable[..., Array]:
    row = np.arange(operation.number("start"), operation.number("end"), dtype=np.int32)[None]
    return lambda: row


def _splat(operation: Operation) -> Callable[..., Array]:
    ones = tuple(1 for _ in operation.types[-1].shape)
    return lambda x: x.reshape(-1, *ones)


def _expand(operation: Operation) -> Callable[..., Array]:
    axis = operation.number("axis") + 1
    return lambda x: np.expand_dims(x, axis)


def _transpose(operation: Operation) -> Callable[..., Array]:
    found = re.search(r"order = array<i32: ([\d, ]+)>", operation.attributes)
    assert found is not None, operation.attributes
    axes = (0, *(int(n) + 1 for n in found.group(1).split(", ")))
    return lambda x: x.transpose(axes)


def _reshape(operation: Operation) -> Callable[..., Array]:
    given, wanted = (t.shape for t in operation.types)
    return lambda x: full(x, given).reshape(-1, *wanted)


def _join(operation: Operation) -> Callable[..., Array]:
    return lambda a, b: np.stack(np.broadcast_arrays(a, b), -1)


def _split(operation: Operation) -> Callable[..., tuple[Array, ...]]:
    shape = operation.types[0].shape

    def split(x: Array) -> tuple[Array, ...]:
        whole = full(x, shape)
        return whole[..., 0], whole[..., 1]

    return split


def _concatenate(operation: Operation) -> Callable[..., Array]:
    shape = operation.types[0].shape

    def concatenate(a: Array, b: Array) -> Array:
        rows = max(a.shape[0], b.shape[0])
        return np.concatenate([np.broadcast_to(x, (rows, *shape)) for x in (a, b)], 1)

    return concatenate


def _dot(operation: Operation) -> Callable[..., Array]:
    """In f32, whatever the precision of GPUs' products; operands in one layout, since BLAS sums up by layout."""
    left, right, out = (t.shape for t in operation.types)

    def dot(a: Array, b: Array, c: Array) -> Array:
        wide = (np.ascontiguousarray(full(x, s), np.float32) for x, s in ((a, left), (b, right)))
        return np.matmul(*wide) + full(c, out)

    return dot


def _add_to_pointer(operation: Operation) -> Callable[..., Array]:
    size = operation.types[0].bytes
    return lambda pointer, offset: pointer + offset.astype(np.int64) * size


def _same(_: Operation) -> Callable[..., Array]:
    return lambda x: x


def _extern(operation: Operation) -> Callable[..., Array]:
    """Functions of CUDA's libdevice."""
    found = re.search(r'symbol = "__nv_(\w+?)f?"', operation.attributes)
    if found is None or found.group(1) not in ("tanh", "log1p", "expm1", "exp", "log"):
        raise ValueError(f"a function that the interpreter does not know: {operation.attributes}")
    op = getattr(np, found.group(1))
    return lambda x: op(x)


MAKERS: dict[str, Callable[[Operation], Callable[..., Any]]] = {
    "arith.addi": _whole(np.add),
    "arith.subi": _whole(np.subtract),
    "arith.muli": _whole(np.multiply),
    "arith.divsi": _whole(_quotient),
    "arith.divui": _whole(np.floor_divide, unsigned=True),
    "arith.remsi": _whole(_remainder),
    "arith.remui": _whole(np.remainder, unsigned=True),
    "arith.andi": _whole(np.bitwise_and),
    "arith.ori": _whole(np.bitwise_or),
    "arith.xori": _whole(np.bitwise_xor),
    "arith.shli": _whole(np.left_shift),
    "arith.shrsi": _whole(np.right_shift),
    "arith.shrui": _whole(np.right_shift, unsigned=True),
    "arith.maxsi": _whole(np.maximum),
    "arith.minsi": _whole(np.minimum),
    "arith.maxui": _whole(np.maximum, unsigned=True),
    "arith.minui": _whole(np.minimum, unsigned=True),
    "arith.cmpi": _compare_whole,
    "arith.addf": _wide(np.add),
    "arith.subf": _wide(np.subtract),
    "arith.mulf": _wide(np.multiply),
    "arith.divf": _wide(np.divide),
    "arith.remf": _wide(np.fmod),
    "arith.negf": _wide(np.negative),
    "arith.maxnumf": _wide(np.fmax),
    "arith.minnumf": _wide(np.fmin),
    "arith.maximumf": _wide(np.maximum),
    "arith.minimumf": _wide(np.minimum),
    "arith.cmpf": _compare_real,
    "arith.select": _select,
    "arith.extsi": _extend(signed=True),
    "arith.extui": _extend(signed=False),
    "arith.trunci": _truncate_whole,
    "arith.extf": _convert,
    "arith.truncf": _convert,
    "arith.sitofp": _convert,
    "arith.uitofp": _unsigned_to_real,
    "arith.fptosi": _to_whole,
    "arith.bitcast": _bitcast,
    "math.absf": _wide(np.abs),
    "math.absi": _whole(np.abs),
    "math.ceil": _wide(np.ceil),
    "math.cos": _wide(np.cos),
    "math.erf": _wide(special.erf),
    "math.exp": _wide(np.exp),
    "math.exp2": _wide(np.exp2),
    "math.floor": _wide(np.floor),
    "math.fma": _wide(_fused),
    "math.log": _wide(np.log),
    "math.log2": _wide(np.log2),
    "math.rsqrt": _wide(lambda x: 1 / np.sqrt(x)),
    "math.sin": _wide(np.sin),
    "math.sqrt": _wide(np.sqrt),
    "tt.addptr": _add_to_pointer,
    "tt.bitcast": _bitcast,
    "tt.broadcast": _same,
    "tt.cat": _concatenate,
    "tt.dot": _dot,
    "tt.expand_dims": _expand,
    "tt.extern_elementwise": _extern,
    "tt.fp_to_fp": _convert,
    "tt.int_to_ptr": _same,
    "tt.join": _join,
    "tt.make_range": _range,
    "tt.precise_divf": _wide(np.divide),
    "tt.precise_sqrt": _wide(np.sqrt),
    "tt.ptr_to_int": _same,
    "tt.reshape": _reshape,
    "tt.splat": _splat,
    "tt.split": _split,
    "tt.trans": _transpose,
}
_EXACT: dict[str, Callable[[Array, Array], Array]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
}


def overflows(operation: Operation, arguments: list[Array], result: Array) -> bool:
    """Whether sums or products of 32 bits are not those of 64."""
    if operation.name not in _EXACT or operation.types[0].element != "i32":
        return False
    a, b = arguments
    return bool((_EXACT[operation.name](a.astype(np.int64), b) != result).any())
