"""Weights and activations as a kernel sees them, in float64, and the error that its arithmetic may make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hetcomp.backends import packing
from hetcomp.backends.cpu_isa import CpuIsa, Gemm
from hetcomp.backends.repacking import repack
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import GROUPS, K_SCALES, ZERO_POINTS, QuantisedNumbers
from tests.reference import plain_quantiser

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

EPS = float(np.finfo(np.float32).eps)
GROUP = 32  # activations that share a scale beside whole-number weights


def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Normal numbers."""
    return rng.standard_normal(shape).astype(np.float32)


def packed(numbers: Floats, value: Value) -> tuple[npt.NDArray[np.uint8], Floats]:
    """The weight as it is stored, and the numbers that the stored bytes mean. In a layout with an order of columns each
    matrix has a random one."""
    if has_act_order(value.type.layout):
        columns, rng = numbers.shape[-1], np.random.default_rng(numbers.size)
        each = numbers.reshape(-1, *numbers.shape[-2:])
        order = np.stack([rng.permutation(columns) for _ in each]).astype(np.int32)
        panels, _ = packed(np.take_along_axis(each, order[:, None], axis=-1).reshape(numbers.shape), _in_order(value))
        data = np.concatenate([panels.reshape(len(each), -1), order.view(np.uint8)], axis=1).reshape(-1)
        return data, packing.unpack(data, value)
    if value.format in packing.TAKEN_OVER:
        done = repack(plain_quantiser.quantised(numbers, str(value.format)), value)
        assert done is not None
        return done.data, packing.unpack(done.data, value)
    data, finite = packing.pack(numbers, value)
    assert finite
    return data, packing.unpack(data, value)


def _in_order(value: Value) -> Value:
    """The weight in the layout without an order of columns."""
    return replace(value, type=replace(value.type, layout=value.type.layout.removesuffix("_act_order")))


def column_orders(data: npt.NDArray[np.uint8], value: Value) -> npt.NDArray[np.int32] | None:
    """The orders i32 [matrices, K] that lie behind the matrices of a weight; None if its layout has none."""
    if not has_act_order(value.type.layout):
        return None
    return data.reshape(packing.matrices(value), -1)[:, -4 * int(value.type.shape[-1]) :].copy().view(np.int32)


def terms(data: npt.NDArray[np.uint8], value: Value) -> Floats:
    """Magnitudes of what a kernel adds up for each weight: in q4k and q5k the product with the scale and the minimum
    apart, in q4z those with the code and with the zero point."""
    columns = int(value.type.shape[-1])
    orders = column_orders(data, value)
    if orders is not None:
        panels = data.reshape(len(orders), -1)[:, : -4 * columns].reshape(-1)
        back = np.argsort(orders, axis=-1).reshape(*value.type.shape[:-2], 1, columns)
        return np.take_along_axis(terms(panels, _in_order(value)), back, axis=-1)
    if value.format == "q4z":
        panels = data.reshape(-1, packing.panel_bytes(columns, "q4z"))
        of_codes, of_zeros = panels.copy(), panels.copy()
        for group in range(-(-columns // 32)):
            of_codes[:, group * 304 + 288 : group * 304 + 304] = 0
            of_zeros[:, group * 304 : group * 304 + 256] = 0
        return sum(np.abs(packing.unpack(part.reshape(-1), value)) for part in (of_codes, of_zeros))
    if value.format in ("q4k", "q5k"):
        panels = data.reshape(-1, packing.panel_bytes(columns, value.format)).copy()
        size = packing.panel_bytes(256, value.format)
        for block in range(-(-columns // 256)):
            panels[:, block * size + 33 : block * size + 64 : 2] ^= 0x80  # the signs of e, which is subtracted
        data = panels.reshape(-1)
    return np.abs(packing.unpack(data, value))


def packed_extremes(rng: np.random.Generator, value: Value) -> tuple[npt.NDArray[np.uint8], Floats]:
    """The packed bytes of [N, K] codes as only checkpoints have them, and their numbers: the largest of both signs, q8
    of -128 among them, and in fp8 scales that differ from panel to panel of a block."""
    form = str(value.format)
    rows, columns = (int(d) for d in value.type.shape)
    ends = {"q8": (0, 255), "mxfp4": (7, 15), "fp8": (0x7E, 0xFE), "q5k": (0, 31), "q6k": (0, 63)}.get(form, (0, 15))
    codes = np.where(rng.random((rows, columns)) < 0.5, *np.array(ends, np.uint8))
    codes[::2] = ends[0]
    groups = -(-columns // GROUPS[form])
    if form == "mxfp4":
        scales = rng.integers(118, 122, (rows, groups)).astype(np.uint8)
    elif form == "fp8":
        scales = np.repeat(rng.random((-(-rows // 16), groups), np.float32), 16, axis=0)[:rows]
    elif form == "q4z":
        scales = np.zeros((rows, groups), ZERO_POINTS)
        scales["scale"], scales["zero"] = rng.random(scales.shape).astype(np.float16), rng.choice([0, 16], scales.shape)
    elif form in K_SCALES:
        scales = np.zeros((rows, groups), K_SCALES[form])
        scales["d"] = 0.75
        scales["scale"] = 63 if form != "q6k" else rng.choice([-128, 127], scales.shape)
        if form != "q6k":
            scales["d_minimum"], scales["minimum"] = 5.5, 63
    else:
        scales = rng.random((rows, groups)).astype(np.float16).astype(np.float32)
    numbers = QuantisedNumbers(form, codes, scales)
    done = repack(numbers, value)
    assert done is not None
    assert done.exact
    return done.data, numbers.to_f32()


def to_q8_cache(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The bytes of a q8 KV cache that holds ``numbers`` [slots, heads, context, dim], [slots, heads, bytes]: the codes
    of all rows, then their scales (``DType.Q8``). A scale is the fp16 number at or above the group's largest magnitude
    / 127; a group that is not finite has the scale NaN."""
    slots, heads, context, dim = numbers.shape
    groups = -(-dim // 32)
    padded = np.zeros((slots, heads, context, groups, 32), np.float32)
    padded.reshape(slots, heads, context, groups * 32)[..., :dim] = numbers
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = np.abs(padded).max(-1) / np.float32(127)
        scales = wanted.astype(np.float16)
        scales = np.where(scales.astype(np.float32) < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
        scales[~np.isfinite(wanted)] = np.nan
        steps = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
        codes = np.rint(padded / steps[..., None])
    codes[np.isnan(scales)] = 0
    flat = slots, heads, -1
    return np.concatenate(
        [codes.astype(np.int8).view(np.uint8).reshape(flat), scales.view(np.uint8).reshape(flat)], axis=-1
    )


def from_q8_cache(stored: npt.NDArray[np.uint8], context: int, dim: int) -> npt.NDArray[np.float32]:
    """The numbers [slots, heads, context, dim] that the bytes [slots, heads, bytes] of a q8 KV cache stand for."""
    slots, heads, _ = stored.shape
    groups = -(-dim // 32)
    codes = np.ascontiguousarray(stored[..., : context * groups * 32]).view(np.int8)
    scales = np.ascontiguousarray(stored[..., context * groups * 32 :]).view(np.float16).astype(np.float32)
    numbers = codes.reshape(slots, heads, context, groups, 32) * scales.reshape(slots, heads, context, groups, 1)
    return numbers.reshape(slots, heads, context, groups * 32)[..., :dim].astype(np.float32)


def to_fp8(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Codes of numbers in an fp8 KV cache: e4m3fn, to nearest, 448 beyond it, NaN where not finite."""
    cut = torch.from_numpy(np.where(np.isinf(numbers), np.nan, numbers).clip(-448, 448).astype(np.float32))
    return cut.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_fp8(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The numbers that codes of an fp8 KV cache stand for."""
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()


def dot_error(terms: int, magnitude: Doubles) -> Doubles:
    """Bound on the error of an f32 sum of ``terms`` products whose absolute values sum to ``magnitude``.

    Rounding errors of a sum grow like a random walk, sqrt(terms) units in the last place; 4 more for the last
    additions and the epilogue.
    """
    return EPS * (4 + np.sqrt(terms)) * magnitude


def family(weight_format: str, isa: CpuIsa, rows: float, gemv: bool) -> Gemm:
    """How a kernel multiplies: by single rows (``gemv``), or in tiles at ``rows`` tokens a weight."""
    if gemv:
        return "int8" if isa.whole_numbers(weight_format) else "float"
    return isa.gemm(weight_format, rows)


def seen(x: Floats, by: Gemm, order: npt.NDArray[np.int32] | None = None) -> Doubles:
    """Activations [.., K] as the kernel multiplies them: int8 in groups of 32 (of columns in ``order``), bf16, or as
    they are."""
    if order is not None:
        return seen(x[..., order], by)[..., np.argsort(order)]
    if by in ("bf16", "amx_bf16"):
        return packing.to_f32(packing.to_bf16_bits(x)).astype(np.float64)
    return quantised(x) if by == "int8" else x.astype(np.float64)


def quantised(x: Floats) -> Doubles:
    """Multiples of max |x| / 127 of each group of 32, rounded in f32 as the kernels do."""
    k = x.shape[-1]
    wide = np.zeros((*x.shape[:-1], -(-k // GROUP) * GROUP), np.float32)
    wide[..., :k] = x
    groups = wide.reshape(*x.shape[:-1], wide.shape[-1] // GROUP, GROUP)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    codes = np.rint(groups * inverse)
    back: Any = codes.astype(np.float64) * (top * np.float32(1 / 127)).astype(np.float64)
    return back.reshape(wide.shape)[..., :k]


def rounding_of(x: Doubles, by: Gemm, order: npt.NDArray[np.int32] | None = None) -> Doubles:
    """Bound, element by element, on what :func:`seen` changes: half a step of the group's scale, with a part of a step
    for the f32 arithmetic before; or half a unit in the last place of bf16."""
    if order is not None:
        return rounding_of(x[..., order], by)[..., np.argsort(order)]
    if by in ("bf16", "amx_bf16"):
        return np.abs(x) * 2.0**-8
    if by == "float":
        return np.zeros_like(x)
    k = x.shape[-1]
    wide = np.zeros((*x.shape[:-1], -(-k // GROUP) * GROUP))
    wide[..., :k] = np.abs(x)
    top = wide.reshape(*x.shape[:-1], wide.shape[-1] // GROUP, GROUP).max(axis=-1)
    return np.repeat(top * (0.5 + 1e-4) / 127, GROUP, axis=-1)[..., :k]


def weight_rounding(weight_format: str, by: Gemm) -> float:
    """Relative error of a weight in a tile of bf16 that holds number and scale in one."""
    return 2.0**-8 if by == "amx_bf16" and weight_format != "bf16" else 0.0
