"""The numbers of GGUF's block types (ggml-common.h, ggml-quants.c): codes as they are where a weight format holds them,
else f32 numbers, computed in the order of dequantize_row_*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.gguf.block_types import BY_NAME
from hetcomp.quantised_numbers import K_SCALES, QuantisedNumbers

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
# Numbers that are dequantised in one go: bounds what lies beside them.
_PIECE = 1 << 24


@dataclass(frozen=True)
class Quantisation:
    """A block type that is read. ``format``: the weight format that holds it, exactly unless ``inexact`` says why not;
    ``group``: columns that share a scale."""

    format: str
    inexact: str = ""
    group: int = 32


_MINIMA = "the minima of its groups are no multiples of their scales"
# Without minima, 8 bits hold what Q4_K has within 0.5 % relative RMS, 4 bits within 7 % (docs/decisions/gguf-files.md).
QUANTISED = {
    "Q8_0": Quantisation("q8"),
    "Q4_0": Quantisation("q4"),
    "MXFP4": Quantisation("mxfp4"),
    "Q5_0": Quantisation("q8"),
    "Q4_1": Quantisation("q8", _MINIMA),
    "Q5_1": Quantisation("q8", _MINIMA),
    "Q4_K": Quantisation("q4k"),
    "Q5_K": Quantisation("q5k"),
    "Q6_K": Quantisation("q6k", group=16),
}


def decode(kind: str, rows: _Bytes) -> QuantisedNumbers | _Floats:
    """``rows`` [.., bytes of a row] of the block type ``kind`` (of QUANTISED) as [.., K]."""
    block = BY_NAME[kind]
    blocks = rows.reshape(*rows.shape[:-1], -1, block.bytes)
    if kind in _CODES:
        return _CODES[kind](blocks)
    shape = (*blocks.shape[:-2], blocks.shape[-2] * block.size)
    flat = blocks.reshape(-1, block.bytes)
    out = np.empty((len(flat), block.size), np.float32)
    step = _PIECE // block.size
    for start in range(0, len(flat), step):
        out[start : start + step] = _NUMBERS[kind](flat[start : start + step])
    return out.reshape(shape)


def _halves(packed: _Bytes) -> _Bytes:
    """Two codes a byte: first all low halves of the last axis, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _f16(raw: _Bytes) -> _Floats:
    """Two bytes along the last axis as one number; the axis stays."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


# ---------------------------------------------------------------- codes: blocks [.., K / 32, bytes]


def _coded(form: str, codes: _Bytes, scales: npt.NDArray[np.generic]) -> QuantisedNumbers:
    return QuantisedNumbers(form, codes.reshape(*codes.shape[:-2], -1), scales[..., 0])


def _q8_0(blocks: _Bytes) -> QuantisedNumbers:
    return _coded("q8", blocks[..., 2:] ^ np.uint8(128), _f16(blocks[..., :2]))


def _q4_0(blocks: _Bytes) -> QuantisedNumbers:
    return _coded("q4", _halves(blocks[..., 2:]), _f16(blocks[..., :2]))


def _q5_0(blocks: _Bytes) -> QuantisedNumbers:
    codes = _fifth_bits(blocks[..., 2:6]) | _halves(blocks[..., 6:])
    return _coded("q8", codes + np.uint8(128 - 16), _f16(blocks[..., :2]))


def _mxfp4(blocks: _Bytes) -> QuantisedNumbers:
    return _coded("mxfp4", _halves(blocks[..., 1:]), blocks[..., :1])


def _scales_and_minima(blocks: _Bytes) -> tuple[_Bytes, _Bytes]:
    """Of the eight groups of Q4_K or Q5_K blocks, [.., 8] each: 6 bits, packed as get_scale_min_k4 has them."""
    first, second, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([first & 63, high & 15 | first >> 2 & 48], axis=-1)
    minima = np.concatenate([second & 63, high >> 4 | second >> 2 & 48], axis=-1)
    return scales, minima


def _q4_k(blocks: _Bytes) -> QuantisedNumbers:
    scales, minima = _scales_and_minima(blocks)
    codes = _halves(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32))
    return _k_coded("q4k", codes, scale=scales, minimum=minima, d=blocks[..., :2], d_minimum=blocks[..., 2:4])


def _q5_k(blocks: _Bytes) -> QuantisedNumbers:
    scales, minima = _scales_and_minima(blocks)
    shape = blocks.shape[:-1]
    codes = _halves(blocks[..., 48:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    codes |= (blocks[..., None, 16:48] >> shifts & np.uint8(1)) << np.uint8(4)
    return _k_coded("q5k", codes, scale=scales, minimum=minima, d=blocks[..., :2], d_minimum=blocks[..., 2:4])


def _q6_k(blocks: _Bytes) -> QuantisedNumbers:
    shape = blocks.shape[:-1]
    low = _halves(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 256)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> shifts & np.uint8(3)) << np.uint8(4)
    scales = blocks[..., 192:208].view(np.int8)
    return _k_coded("q6k", low | high.reshape(*shape, 256), scale=scales, d=blocks[..., 208:])


def _k_coded(form: str, codes: _Bytes, **fields: npt.NDArray[np.generic]) -> QuantisedNumbers:
    """Of blocks [.., n]: codes, and records whose fields a block has for each group or, in two bytes, once."""
    records = np.empty(fields["scale"].shape, K_SCALES[form])
    for name, part in fields.items():
        records[name] = np.ascontiguousarray(part).view("<f2") if K_SCALES[form][name].kind == "f" else part
    shape = codes.shape[: records.ndim - 2]
    return QuantisedNumbers(form, codes.reshape(*shape, -1), records.reshape(*shape, -1))


def _fifth_bits(packed: _Bytes) -> _Bytes:
    """A bit a code, as 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


_CODES: dict[str, Callable[[_Bytes], QuantisedNumbers]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "MXFP4": _mxfp4,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

# ---------------------------------------------------------------- numbers: blocks [n, bytes]


def _q4_1(blocks: _Bytes) -> _Floats:
    scale, least = _f16(blocks[:, :2]), _f16(blocks[:, 2:4])
    return scale * _halves(blocks[:, 4:]).astype(np.float32) + least


def _q5_1(blocks: _Bytes) -> _Floats:
    scale, least = _f16(blocks[:, :2]), _f16(blocks[:, 2:4])
    codes = _fifth_bits(blocks[:, 4:8]) | _halves(blocks[:, 8:])
    return scale * codes.astype(np.float32) + least


_NUMBERS: dict[str, Callable[[_Bytes], _Floats]] = {"Q4_1": _q4_1, "Q5_1": _q5_1}
