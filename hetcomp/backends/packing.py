"""Packed weight layouts: the bytes that kernels stream, the same for GEMV, GEMM and row gather.

A matrix w[N, K] is stored in *panels* of 16 rows, each panel along K; rows beyond N are zero:

``f32``   [N/16][K][16]        one vector of 16 rows for every k
``bf16``  [N/16][K/2][16][2]   64 bytes hold 16 rows of two adjacent k (an odd K is padded with zeros);
                               the same bytes feed vdpbf16ps

Layout ``panels16`` is one such matrix, or several (experts, heads: all axes before the last two) one after
the other. Layout ``panels16_glu`` has the gate rows 0 .. I-1 and the up rows I .. 2I-1 of each matrix in
panels of their own, interleaved: gate panel 0, up panel 0, gate panel 1, ... so that one task streams both
halves of 16 columns. Everything else (norm weights, biases, sinks, constants) is ``row_major`` in f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value

PANEL = 16
ALIGNMENT = 64
ROW_MAJOR = "row_major"
PANELS = "panels16"
PANELS_GLU = "panels16_glu"

# Bits a weight, scales included, of formats that can be planned with but not packed yet: q8 and q4 with an fp16 scale a
# group of 32, fp8-e4m3 with an f32 scale a block of 128 x 128, mxfp4 with an e8m0 scale a group of 32.
PLANNED_BITS = {"q8": 8.5, "fp8": 8.0 + 32 / (128 * 128), "q4": 4.5, "mxfp4": 4.25}

Bytes = npt.NDArray[np.uint8]
# Numbers as the checkpoint has them; bf16 comes as its bits in uint16 because numpy has no such type.
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]


def layout_for(kind: str, operand: int) -> str:
    """Layout of weight operand ``operand`` (index into the op's inputs) of an op of kind ``kind``.

    ``row_major`` for operands that are not stored in a weight format (biases, norm weights, sinks).
    """
    packed = {("embed", 1), ("linear", 1), ("head_linear", 1), ("moe_experts", 4)}
    if (kind, operand) == ("moe_experts", 3):
        return PANELS_GLU
    return PANELS if (kind, operand) in packed else ROW_MAJOR


def padded_columns(columns: int, weight_format: str) -> int:
    """Columns of a panel: ``columns`` rounded up to whole loads of the format."""
    step = _form(weight_format).step
    return -(-columns // step) * step


def panel_bytes(columns: int, weight_format: str) -> int:
    """Bytes of one panel of 16 rows; a multiple of 64."""
    return PANEL * padded_columns(columns, weight_format) * _form(weight_format).bytes


def panels(rows: int, layout: str) -> int:
    """Number of panels of a matrix of ``rows`` rows in ``layout``."""
    if layout == PANELS_GLU:
        return 2 * -(-(rows // 2) // PANEL)
    return -(-rows // PANEL)


def matrix_bytes(rows: int, columns: int, weight_format: str, layout: str = PANELS) -> int:
    """Bytes of one packed matrix [rows, columns]; a multiple of 64."""
    return panels(rows, layout) * panel_bytes(columns, weight_format)


def matrices(value: Value) -> int:
    """Number of matrices (experts, heads) of a packed weight; 1 for a plain matrix."""
    return math.prod(_shape(value)[:-2])


def packed_bytes(value: Value) -> int:
    """Bytes of the weight or constant in its layout and format, padded to a multiple of 64.

    Raises HetcompError if the format is unknown or does not go with the layout.
    """
    shape = _shape(value)
    _check(value)
    if value.type.layout == ROW_MAJOR:
        return -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    assert value.format is not None
    if value.format in PLANNED_BITS:
        return -(-int(math.prod(shape) * PLANNED_BITS[value.format] / 8) // ALIGNMENT) * ALIGNMENT
    return matrices(value) * matrix_bytes(shape[-2], shape[-1], value.format, value.type.layout)


def pack(array: Numbers, value: Value, out: Bytes | None = None) -> tuple[Bytes, bool]:
    """Packs the weight ``value`` from ``array``, or one or several of its matrices.

    array: f32, f16 or bf16 (bits in uint16), of the value's shape. For a weight of several matrices it may
    hold only a run of them ([n, N, K], or [N, K] for one): experts can be packed one at a time. It may be a
    view with any strides. out: uint8 buffer of the exact size (``packed_bytes(value) / matrices(value)`` a
    matrix), filled and returned; a new one if None.

    Returns the bytes and whether all numbers are finite (NaN and infinity are the caller's to report; a
    finite f32 that bf16 cannot hold counts as infinite). Raises HetcompError if shape or dtype do not fit.
    """
    _check(value)
    shape = _shape(value)
    if value.type.layout == ROW_MAJOR:
        if array.shape != shape:
            raise HetcompError(_shape_message(value, array.shape, shape))
        return _pack_row_major(array, packed_bytes(value), out)
    if array.ndim < 2 or array.shape[-2:] != shape[-2:] or array.ndim > max(len(shape), 2):
        raise HetcompError(_shape_message(value, array.shape, shape))
    assert value.format is not None
    rows, columns = shape[-2:]
    stack = array.reshape((-1, rows, columns)) if array.ndim != 2 else array[None]
    each = matrix_bytes(rows, columns, value.format, value.type.layout)
    target = _target(out, len(stack) * each)
    finite = True
    for i, matrix in enumerate(stack):
        finite &= _pack_matrix(matrix, value.format, value.type.layout, target[i * each : (i + 1) * each])
    return target, finite


def to_f32(array: Numbers) -> npt.NDArray[np.float32]:
    """The numbers in f32. array: f32, f16 or bf16 bits in uint16. Raises HetcompError for another dtype."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype in (np.float32, np.float16):
        return array.astype(np.float32, copy=False)
    raise HetcompError(f"Weights of dtype {array.dtype} cannot be packed; expected f32, f16 or bf16.")


def to_bf16_bits(array: Numbers) -> npt.NDArray[np.uint16]:
    """The numbers in bf16 (bits), rounded to nearest, ties to even. NaN stays NaN."""
    if array.dtype == np.uint16:
        return array  # type: ignore[return-value]  # numpy cannot narrow a union by dtype
    bits = np.ascontiguousarray(to_f32(array)).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    # Rounding a NaN's mantissa may overflow into the exponent or the sign.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        result[nan] = 0x7FC0
    return result


def _pack_row_major(array: Numbers, size: int, out: Bytes | None) -> tuple[Bytes, bool]:
    numbers = np.ascontiguousarray(to_f32(array))
    target = _target(out, size)
    target[: numbers.nbytes] = numbers.reshape(-1).view(np.uint8)
    target[numbers.nbytes :] = 0
    return target, bool(np.isfinite(numbers).all())


def _pack_matrix(matrix: Numbers, weight_format: str, layout: str, out: Bytes) -> bool:
    """Fills ``out`` with one packed matrix; returns whether all numbers are finite."""
    rows, columns = matrix.shape
    size = panel_bytes(columns, weight_format)
    by_panel = out.reshape(-1, size)
    if layout == PANELS:
        return _pack_rows(matrix, weight_format, by_panel)
    half = rows // 2
    gate = _pack_rows(matrix[:half], weight_format, by_panel[0::2])
    return _pack_rows(matrix[half:], weight_format, by_panel[1::2]) and gate


def _pack_rows(matrix: Numbers, weight_format: str, by_panel: Bytes) -> bool:
    """Packs the rows of ``matrix`` into ``by_panel`` [panels, panel bytes]; returns whether all are finite.

    Works in runs of panels so that the temporaries stay within the L2 cache and a fraction of a matrix.
    """
    rows, columns = matrix.shape
    form, width = _form(weight_format), padded_columns(columns, weight_format)
    finite = True
    run = max(1, (1 << 18) // (PANEL * width))
    for first in range(0, len(by_panel), run):
        last = min(first + run, len(by_panel))
        part = matrix[first * PANEL : min(last * PANEL, rows)]
        encoded, ok = form.encode(part)
        finite &= ok
        padded = (last - first) * PANEL, width
        if encoded.shape != padded:
            grown = np.zeros(padded, encoded.dtype)
            grown[: part.shape[0], :columns] = encoded
            encoded = grown
        form.fill(encoded.reshape(last - first, PANEL, width), by_panel[first:last])
    return finite


def _encode_f32(part: Numbers) -> tuple[npt.NDArray[np.generic], bool]:
    numbers = to_f32(part)
    return numbers, bool(np.isfinite(numbers).all())


def _encode_bf16(part: Numbers) -> tuple[npt.NDArray[np.generic], bool]:
    bits = to_bf16_bits(part)
    return bits, not bool(((bits & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())


def _fill_f32(part: npt.NDArray[np.generic], by_panel: Bytes) -> None:
    n, _, columns = part.shape
    by_panel.view(np.float32).reshape(n, columns, PANEL)[...] = part.transpose(0, 2, 1)


def _fill_bf16(part: npt.NDArray[np.generic], by_panel: Bytes) -> None:
    # A pair of adjacent k is moved as one 32-bit word.
    n, _, columns = part.shape
    pairs = np.ascontiguousarray(part).view(np.uint32)
    by_panel.view(np.uint32).reshape(n, columns // 2, PANEL)[...] = pairs.transpose(0, 2, 1)


@dataclass(frozen=True)
class _Form:
    """A weight format: bytes of an element, k of a load, numbers -> elements, elements -> panels."""

    bytes: int
    step: int
    encode: Callable[[Numbers], tuple[npt.NDArray[np.generic], bool]]
    fill: Callable[[npt.NDArray[np.generic], Bytes], None]


_FORMS = {"f32": _Form(4, 1, _encode_f32, _fill_f32), "bf16": _Form(2, 2, _encode_bf16, _fill_bf16)}


def _form(weight_format: str) -> _Form:
    try:
        return _FORMS[weight_format]
    except KeyError:
        raise HetcompError(
            f"Weight format '{weight_format}' cannot be packed for the CPU; expected one of {', '.join(_FORMS)}."
        ) from None


def _check(value: Value) -> None:
    name = value.fqn or value.id
    if value.type.layout == ROW_MAJOR:
        if value.format not in (None, "f32"):
            raise HetcompError(f"Weight {name} has format {value.format} but layout row_major; expected {PANELS}.")
        return
    if value.type.layout not in (PANELS, PANELS_GLU):
        raise HetcompError(f"Weight {name} has the unknown layout '{value.type.layout}'.")
    if value.format is None:
        raise HetcompError(f"Weight {name} has layout {value.type.layout} but no format; run choose_formats.")
    if value.format not in PLANNED_BITS:
        _form(value.format)
    shape = _shape(value)
    if len(shape) < 2 or (value.type.layout == PANELS_GLU and shape[-2] % 2):
        raise HetcompError(f"Weight {name} of shape {list(shape)} does not fit layout {value.type.layout}.")


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else _symbolic(value) for d in value.type.shape)


def _symbolic(value: Value) -> int:
    raise HetcompError(f"Weight {value.fqn or value.id} has a symbolic dimension; weights have fixed shapes.")


def _shape_message(value: Value, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    return f"Weight {value.fqn or value.id} has shape {list(got)}, expected {list(want)}."


def _target(out: Bytes | None, size: int) -> Bytes:
    if out is None:
        return np.empty(size, np.uint8)
    if out.dtype != np.uint8 or out.shape != (size,) or not out.flags.c_contiguous:
        raise HetcompError(f"A buffer of {size} contiguous bytes is needed, got {out.dtype} {list(out.shape)}.")
    return out
