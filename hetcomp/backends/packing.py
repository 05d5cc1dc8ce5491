"""Packed weight layouts: the bytes that kernels stream, the same for GEMV, GEMM and row gather.

A matrix w[N, K] is stored in *panels* of 16 rows, each panel along K and padded to a multiple of 64 bytes; rows beyond
N are zero. In formats with groups of 32 columns a group is its elements, then its scales: all scales behind all
elements would be a second stream of memory, which halves the speed of the first. fp8 has the scales of its
B = ceil(K/128) blocks, a line or two, behind its elements.

``f32``    elements [K][16]: one vector of 16 rows for every k
``bf16``   elements [K/2][16][2]: 64 bytes hold 16 rows of two adjacent k, the same bytes feed vdpbf16ps
``q8``     elements u8 = q + 128, q in -127..127 (-128 from checkpoints), a group [8][16][4]: 64 bytes hold four
           adjacent k; scales fp16 [16]; w = scale * q
``q4``     elements 4-bit c = q + 8, q in -8..7: byte 64 j + 4 r + b of group g holds, of row r, k = 32 g + 8 j + b in
           its low half and k + 4 in its high half; scales fp16 [16], which may be negative; w = scale * q
``q4z``    elements as q4 with c in 0..15; scales fp16 [16], zero points u8 [16], 0..16; w = scale * (c - zero)
``mxfp4``  elements as q4, the codes being e2m1 (bit 3 is the sign, magnitudes 0 .5 1 1.5 2 3 4 6); scales e8m0
           [16], the byte s meaning 2^(s - 127) (OCP Microscaling Formats 1.0)
``q4k``    a block of 256 columns: fp16 d [16], fp16 e [16], then its groups of 32: elements as q4 with c = q in 0..15,
           scales u8 [16], minima u8 [16]; w = d * scale * q - e * minimum (block_q4_K of ggml-common.h)
``q5k``    as q4k, behind the elements [16][4] bytes: bit s of byte b is the fifth bit of q of k = 32 g + 4 s + b
``q6k``    a block of 256 columns: fp16 d [16], then its groups of 16: low halves of c = q + 32, q in -32..31, as q4
           (two vectors), [16][4] bytes whose bits 2 s, 2 s + 1 of byte b are the high bits of k = 16 g + 4 s + b,
           scales int8 [16]; w = d * scale * q (block_q6_K)
``fp8``    elements e4m3fn [K/2][16][2]; scales f32 [B], one for 128 columns of the panel; as the quantiser makes them
           equal in the 8 panels of a block of 128 x 128; w = scale * e4m3

K is padded to whole loads (``padded_columns``) with codes of zero; where these stand for other numbers (q4z, q4k, q5k)
activations of zero meet them. The last of a row's K blocks has the groups that there are. Layout ``panels16`` is one
such matrix, or several (experts, heads: all axes before the last two) one after the other. Layout ``panels16_glu`` has
the gate rows 0 .. I-1 and the up rows I .. 2I-1 of each matrix in panels of their own, in turn (gate panel 0, up panel
0, gate panel 1, ..) so that a task streams both halves of 16 columns; blocks of 128 rows are counted in each half by
itself. In layouts that end in ``_act_order`` (of weights whose groups of columns are scattered: GPTQ's act-order) i32
[K] lie behind each matrix: the column of the numbers, and of the activations, that each column of its panels is.
Everything else (norm weights, biases, sinks, constants) is ``row_major`` in f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends.k_blocks import K_BYTES, read_panels
from hetcomp.backends.quantiser import Numbers, quantise
from hetcomp.errors import HetcompError
from hetcomp.ir.layouts import has_act_order, has_gate_up, with_act_order
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import BLOCK, E2M1, E4M3, GROUPS, e8m0

PANEL = 16
ALIGNMENT = 64
ROW_MAJOR = "row_major"
PANELS = "panels16"
PANELS_GLU = "panels16_glu"

Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def padded_columns(columns: int, weight_format: str) -> int:
    """Columns of a panel: ``columns`` rounded up to whole loads of the format (a pair, a group of 32)."""
    return _up(columns, 32 if weight_format in K_BYTES else _form(weight_format).step)


def element_bytes(columns: int, weight_format: str) -> int:
    """Bytes of a panel's elements, in fp8 also the offset of its scales; a multiple of 64."""
    form = _form(weight_format)
    return _up(PANEL * _up(columns, form.step) * form.bits // 8, ALIGNMENT)


def panel_bytes(columns: int, weight_format: str) -> int:
    """Bytes of one panel of 16 rows, scales included; a multiple of 64."""
    if weight_format in K_BYTES:
        size, groups = K_BYTES[weight_format], padded_columns(columns, weight_format) // GROUPS[weight_format]
        return _up(groups * (size.codes + size.scales) + -(-columns // BLOCK) * size.head, ALIGNMENT)
    form = _form(weight_format)
    scales = -(-columns // form.group) * (form.scale_bytes + form.zero_bytes) if form.group else 0
    return _up(element_bytes(columns, weight_format) + scales, ALIGNMENT)


def group_bytes(weight_format: str) -> int:
    """Bytes of a group of a panel, its scales included, in formats that have scales behind each group."""
    form = _form(weight_format)
    assert form.group == form.step
    return PANEL * form.group * form.bits // 8 + form.scale_bytes + form.zero_bytes


def panels(rows: int, layout: str) -> int:
    """Number of panels of a matrix of ``rows`` rows in ``layout``."""
    if has_gate_up(layout):
        return 2 * -(-(rows // 2) // PANEL)
    return -(-rows // PANEL)


def order_bytes(columns: int, layout: str) -> int:
    """Bytes of the order of the columns of one matrix; a multiple of 64."""
    return _up(4 * columns, ALIGNMENT) if has_act_order(layout) else 0


def matrix_bytes(rows: int, columns: int, weight_format: str, layout: str = PANELS) -> int:
    """Bytes of one packed matrix [rows, columns], the order of its columns included; a multiple of 64."""
    return panels(rows, layout) * panel_bytes(columns, weight_format) + order_bytes(columns, layout)


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
        return _up(4 * math.prod(shape), ALIGNMENT)
    assert value.format is not None
    return matrices(value) * matrix_bytes(shape[-2], shape[-1], value.format, value.type.layout)


def pack(
    array: Numbers,
    value: Value,
    out: Bytes | None = None,
    importance: _Floats | None = None,
    threads: int | None = None,
) -> tuple[Bytes, bool]:
    """Packs the weight ``value`` from ``array``, or one or several of its matrices.

    array: f32, f16 or bf16 (bits in uint16), of the value's shape. For a weight of several matrices it may
    hold only a run of them ([n, N, K], or [N, K] for one): experts can be packed one at a time. It may be a
    view with any strides. out: uint8 buffer of the exact size (``packed_bytes(value) / matrices(value)`` a
    matrix), filled and returned; a new one if None. importance: f32 [K], or [n, K] for n matrices: how much
    the squared error of each column counts where a scale is chosen (q4, mxfp4); all alike if None.
    threads: as many as this process may run at once if None.

    Returns the bytes and whether all numbers are finite (NaN and infinity are the caller's to report; a
    finite f32 that bf16 cannot hold, or whose scale fp16 cannot, counts as infinite). Raises HetcompError if
    shape or dtype do not fit, or for a format of ``TAKEN_OVER`` or an order of columns, which only checkpoints have.
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
    if value.format in TAKEN_OVER or has_act_order(value.type.layout):
        ordered = " with an order of columns" if has_act_order(value.type.layout) else ""
        raise HetcompError(
            f"Numbers cannot be packed as {value.format}{ordered}: weight {value.fqn or value.id} is not stored so; "
            f"give one of {', '.join(FORMATS)}."
        )
    rows, columns = shape[-2:]
    stack = array.reshape((-1, rows, columns)) if array.ndim != 2 else array[None]
    weights = None if importance is None else _column_weights(importance, value, len(stack))
    each = matrix_bytes(rows, columns, value.format, value.type.layout)
    target = _target(out, len(stack) * each)
    finite = True
    for i, matrix in enumerate(stack):
        part = target[i * each : (i + 1) * each]
        own = None if weights is None else weights[i]
        finite &= quantise(matrix, value.format, has_gate_up(value.type.layout), part, own, threads)
    return target, finite


def _column_weights(importance: _Floats, value: Value, count: int) -> _Floats:
    """The importance as contiguous f32 [count, K]."""
    columns = _shape(value)[-1]
    if importance.shape not in ((columns,), (count, columns)):
        raise HetcompError(
            f"The importance of weight {value.fqn or value.id} has shape {list(importance.shape)}, "
            f"expected [{columns}] or [{count}, {columns}]."
        )
    return np.ascontiguousarray(np.broadcast_to(importance, (count, columns)), np.float32)


def to_f32(array: Numbers) -> _Floats:
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


def unpack(data: Bytes | bytes, value: Value) -> _Floats:
    """The numbers that the packed bytes stand for, f32 in the value's shape: exact, but for fp8, whose products with
    the scale are rounded to f32.

    data: ``packed_bytes(value)`` bytes. Raises HetcompError if there are more or fewer.
    """
    _check(value)
    shape = _shape(value)
    raw = np.frombuffer(data, np.uint8)
    if raw.size != packed_bytes(value):
        raise HetcompError(f"Weight {value.fqn or value.id} has {raw.size} bytes, expected {packed_bytes(value)}.")
    if value.type.layout == ROW_MAJOR:
        return raw[: 4 * math.prod(shape)].view(np.float32).reshape(shape).copy()
    assert value.format is not None
    rows, columns = shape[-2:]
    parts = raw.reshape(matrices(value), -1)
    return np.stack([unpack_matrix(p, rows, columns, value.format, value.type.layout) for p in parts]).reshape(shape)


def unpack_matrix(data: Bytes, rows: int, columns: int, weight_format: str, layout: str = PANELS) -> _Floats:
    """One matrix f32 [rows, columns] from its ``matrix_bytes`` bytes, as :func:`unpack`."""
    end = len(data) - order_bytes(columns, layout)
    panel = unpack_panels(data[:end], columns, weight_format)[:, :, :columns]
    if has_act_order(layout):
        panel = panel[:, :, np.argsort(data[end:].view(np.int32)[:columns])]
    if not has_gate_up(layout):
        return panel.reshape(-1, columns)[:rows]
    halves = [panel[i::2].reshape(-1, columns)[: rows // 2] for i in (0, 1)]
    return np.concatenate(halves)


def unpack_panels(data: Bytes, columns: int, weight_format: str) -> _Floats:
    """Panels as they lie in memory, f32 [panels, 16, padded columns], padding included; as :func:`unpack`."""
    width = padded_columns(columns, weight_format)
    by_panel = np.ascontiguousarray(data).reshape(-1, panel_bytes(columns, weight_format))
    if weight_format in K_BYTES:
        return read_panels(by_panel, weight_format, width).to_f32().reshape(-1, PANEL, width)
    form, zeros = _form(weight_format), None
    if form.group == form.step:  # scales behind each group
        each = PANEL * form.group * form.bits // 8
        groups = width // form.group
        by_group = by_panel[:, : groups * group_bytes(weight_format)].reshape(len(by_panel), groups, -1)
        parts = by_group[:, :, :each], by_group[:, :, each : each + form.scale_bytes]
        zeros = by_group[:, :, each + form.scale_bytes :] if form.zero_bytes else None
    else:
        end, groups = PANEL * width * form.bits // 8, -(-columns // form.group) if form.group else 0
        start = element_bytes(columns, weight_format)
        parts = by_panel[:, :end], by_panel[:, start : start + groups * form.scale_bytes]
    elements, raw = (np.ascontiguousarray(part).reshape(len(by_panel), -1) for part in parts)
    codes = form.decode(elements, width)
    if not form.group:
        return codes
    if zeros is not None:
        codes -= np.repeat(zeros.transpose(0, 2, 1), form.group, axis=2)
    scales = form.scales(raw).reshape(len(by_panel), groups, -1).transpose(0, 2, 1)
    return codes * np.repeat(scales, form.group, axis=2)[:, :, :width]


def _from_steps(elements: npt.NDArray[Any], step: int) -> npt.NDArray[Any]:
    """[panels, width / step, 16, step] as [panels, 16, width]."""
    n = len(elements)
    return elements.reshape(n, -1, PANEL, step).transpose(0, 2, 1, 3).reshape(n, PANEL, -1)


def _from_nibbles(elements: Bytes, width: int) -> Bytes:
    """The 4-bit codes as [panels, 16, width]."""
    n = len(elements)
    vectors = elements.reshape(n, width // 32, 4, PANEL, 4)
    codes = np.stack([vectors & 15, vectors >> 4], axis=4)  # [panels, group, vector, row, half, byte]
    return codes.transpose(0, 3, 1, 2, 4, 5).reshape(n, PANEL, width)


@dataclass(frozen=True)
class _Form:
    """A weight format: bits of an element, columns of a load, columns that share a scale (0: none), bytes of a panel's
    scales for these, how elements [panels, bytes] and scales become f32, bytes of a group's zero points."""

    bits: int
    step: int
    group: int
    scale_bytes: int
    decode: Callable[[Bytes, int], _Floats]
    scales: Callable[[Bytes], _Floats] = lambda raw: raw.view(np.float16).astype(np.float32)
    zero_bytes: int = 0


def _decode_f32(elements: Bytes, width: int) -> _Floats:
    return _from_steps(elements.view(np.float32), 1)


def _decode_bf16(elements: Bytes, width: int) -> _Floats:
    return to_f32(_from_steps(elements.view(np.uint16), 2))


def _decode_q8(elements: Bytes, width: int) -> _Floats:
    return _from_steps(elements, 4).astype(np.float32) - 128


def _decode_q4(elements: Bytes, width: int) -> _Floats:
    return _from_nibbles(elements, width).astype(np.float32) - 8


def _decode_q4z(elements: Bytes, width: int) -> _Floats:
    return _from_nibbles(elements, width).astype(np.float32)


def _decode_mxfp4(elements: Bytes, width: int) -> _Floats:
    return E2M1[_from_nibbles(elements, width)]


def _decode_fp8(elements: Bytes, width: int) -> _Floats:
    numbers: _Floats = E4M3[_from_steps(elements, 2)]
    return numbers


_FORMS = {
    "f32": _Form(32, 1, 0, 0, _decode_f32),
    "bf16": _Form(16, 2, 0, 0, _decode_bf16),
    "q8": _Form(8, 32, 32, 2 * PANEL, _decode_q8),
    "fp8": _Form(8, 2, 128, 4, _decode_fp8, lambda raw: raw.view(np.float32)),
    "q4": _Form(4, 32, 32, 2 * PANEL, _decode_q4),
    "q4z": _Form(4, 32, 32, 2 * PANEL, _decode_q4z, zero_bytes=PANEL),
    "mxfp4": _Form(4, 32, 32, PANEL, _decode_mxfp4, e8m0),
}

# What numbers can be packed in, and formats that only checkpoints have: their codes are repacked.
TAKEN_OVER = ("q4z", *K_BYTES)
FORMATS = tuple(form for form in _FORMS if form not in TAKEN_OVER)


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
    if value.type.layout not in (*(PANELS, PANELS_GLU), *map(with_act_order, (PANELS, PANELS_GLU))):
        raise HetcompError(f"Weight {name} has the unknown layout '{value.type.layout}'.")
    if value.format is None:
        raise HetcompError(f"Weight {name} has layout {value.type.layout} but no format; run choose_formats.")
    if value.format not in K_BYTES:
        _form(value.format)
    shape = _shape(value)
    layout = value.type.layout
    if len(shape) < 2 or (has_gate_up(layout) and shape[-2] % 2) or (has_act_order(layout) and shape[-1] % 32):
        raise HetcompError(f"Weight {name} of shape {list(shape)} does not fit layout {value.type.layout}.")


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else _symbolic(value) for d in value.type.shape)


def _symbolic(value: Value) -> int:
    raise HetcompError(f"Weight {value.fqn or value.id} has a symbolic dimension; weights have fixed shapes.")


def _shape_message(value: Value, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    return f"Weight {value.fqn or value.id} has shape {list(got)}, expected {list(want)}."


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _target(out: Bytes | None, size: int) -> Bytes:
    if out is None:
        return np.empty(size, np.uint8)
    if out.dtype != np.uint8 or out.shape != (size,) or not out.flags.c_contiguous:
        raise HetcompError(f"A buffer of {size} contiguous bytes is needed, got {out.dtype} {list(out.shape)}.")
    return out
