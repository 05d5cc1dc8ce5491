"""Reads quantised weights: codes, scales and zero points out of what each quantiser packs them into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.frontend.act_order import Groups, scattered_groups
from hetcomp.frontend.quantisation_config import Stored
from hetcomp.frontend.quantised_tensors import GROUP, has_whole_groups
from hetcomp.ir.plan import CheckpointTensor
from hetcomp.quantised_numbers import E4M3, GROUPS, OFFSETS, QuantisedNumbers, e8m0, with_zero_points

Raw = npt.NDArray[Any]
_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
# Where AutoAWQ's gemm layout has each of eight columns in a word: it puts columns 0 2 4 6 1 3 5 7 into its half bytes.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
# What GPTQ's first checkpoint format has taken off a word of zero points.
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}

Read = Callable[[CheckpointTensor], Raw]


def read_quantised(tensor: CheckpointTensor, stored: Stored, read: Read) -> QuantisedNumbers | _Floats:
    """The weight ``tensor``, or one expert of it: codes and scales, with columns brought into runs that share a scale
    where they are in the order of activations; or f32 numbers where scales are not those of runs of columns, or whole
    numbers too many.

    read: the raw array of a part, or the wanted expert's slice of it. Raises HetcompError if the numbers contradict the
    config."""
    assert tensor.quantised is not None
    parts = {name: read(part) for name, part in tensor.quantised.parts}
    if stored.kind in ("mxfp4", "mxfp4-pack-quantized"):
        codes = parts["codes"]
        if stored.kind == "mxfp4":
            codes = codes.reshape(*codes.shape[:-2], -1)  # [.., rows, groups, 16]
        return QuantisedNumbers("mxfp4", _nibbles(codes), parts["scales"])
    scales = _scales(parts["scales"], tensor.quantised.part("scales").dtype)
    if stored.kind in ("fp8", "float-quantized"):
        return _fp8(parts["codes"], scales, tensor.quantised.block)
    rows, columns = tensor.shape
    codes, zeros, by_column = _WHOLE_NUMBERS[stored.kind](parts, stored, rows)
    _check_symmetric(zeros, stored, tensor)
    if by_column:
        scales, zeros = scales.T, None if zeros is None else zeros.T
    scales = _rows(scales, rows)
    zeros = None if zeros is None or stored.symmetric else _rows(zeros, rows)
    groups = groups_of_columns(parts.get("groups"), stored, tensor)
    if tensor.quantised.act_order:
        order = np.arange(columns) if groups is None else np.argsort(groups, kind="stable")
        return replace(_in_runs(codes[:, order], zeros, scales, stored), order=order.astype(np.int32))
    runs = groups is None and has_whole_groups(stored, columns)
    if runs and (zeros is None or stored.bits == 4):
        return _in_runs(codes, zeros, scales, stored)
    if groups is None:
        groups = np.arange(columns) // (columns // scales.shape[1])
    middle = np.float32(OFFSETS["q4" if stored.bits == 4 else "q8"])
    off = middle if zeros is None else zeros.astype(np.float32)[:, groups]
    return (codes.astype(np.float32) - off) * scales[:, groups]


def _scales(raw: Raw, dtype: str) -> _Floats:
    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return e8m0(raw) if dtype in ("F8_E8M0", "U8") else raw.astype(np.float32)


def _rows(of_groups: Raw, rows: int) -> Raw:
    """Scales or zero points as [rows, groups]: there may be one a row, or one of all."""
    if of_groups.ndim < 2:
        of_groups = of_groups.reshape(-1, 1)
    return np.broadcast_to(of_groups, (rows, of_groups.shape[1]))


def _nibbles(packed: _Bytes) -> _Bytes:
    """Two codes a byte along the last axis, the low half first."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


def _fp8(codes: _Bytes, scales: _Floats, block: tuple[int, int]) -> QuantisedNumbers | _Floats:
    rows, columns = codes.shape[-2:]
    scales = scales.reshape(*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    by_row = np.repeat(scales, block[0], axis=-2)[..., :rows, :]
    group = GROUPS["fp8"]
    if block[1] % group == 0 or block[1] >= columns:
        each = np.repeat(by_row, -(-block[1] // group), axis=-1)[..., : -(-columns // group)]
        return QuantisedNumbers("fp8", codes, each)
    return E4M3[codes] * np.repeat(by_row, block[1], axis=-1)[..., :columns]


# ---------------------------------------------------------------- whole numbers: codes and zero points, not negative

_Whole = tuple[_Bytes, _Bytes | None, bool]  # codes [N, K], zero points, whether these (and scales) are [groups, N]


def _from_words(words: Raw, bits: int) -> _Bytes:
    """int32 words along the last axis as codes, the lowest bits first."""
    each = np.ascontiguousarray(words).view(np.uint8)
    return _nibbles(each) if bits == 4 else each


def _gptq(parts: Mapping[str, Raw], stored: Stored, rows: int) -> _Whole:
    words = parts["zeros"].view(np.uint32)
    if stored.zeros_less_one:
        words = words + _ONES[stored.bits]
    return _from_words(parts["codes"].T, stored.bits), _from_words(words, stored.bits)[:, :rows], True


def _awq(parts: Mapping[str, Raw], stored: Stored, rows: int) -> _Whole:
    def unpacked(words: Raw) -> _Bytes:
        codes = _from_words(words, 4)
        return codes.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].reshape(codes.shape)

    return np.ascontiguousarray(unpacked(parts["codes"]).T), unpacked(parts["zeros"]), True


def _packed(parts: Mapping[str, Raw], stored: Stored, rows: int) -> _Whole:
    zeros = None if stored.symmetric else _from_words(parts["zeros"].T, stored.bits)[:, :rows].T
    return _from_words(parts["codes"], stored.bits), zeros, False


def _int8(parts: Mapping[str, Raw], stored: Stored, rows: int) -> _Whole:
    def unsigned(numbers: Raw) -> _Bytes:
        return numbers.view(np.uint8) ^ np.uint8(128)

    return unsigned(parts["codes"]), None if stored.symmetric else unsigned(parts["zeros"]), False


_WHOLE_NUMBERS = {"gptq": _gptq, "awq": _awq, "pack-quantized": _packed, "int-quantized": _int8}


def _check_symmetric(zeros: _Bytes | None, stored: Stored, tensor: CheckpointTensor) -> None:
    middle = OFFSETS["q4" if stored.bits == 4 else "q8"]
    if zeros is not None and stored.symmetric and (zeros != middle).any():
        raise HetcompError(
            f"quantization_config says that {tensor.name} in {tensor.file} is symmetric, but it has zero points other "
            f"than {middle}"
        )


def groups_of_columns(raw: Raw | None, stored: Stored, tensor: CheckpointTensor) -> Groups:
    """Each column's group; None if they are runs. Raises HetcompError if the config says so, but they are not."""
    if raw is None:
        return None
    columns = tensor.shape[1]
    groups = columns // stored.group if stored.group else 1
    found = scattered_groups(raw, columns, columns // groups, groups, tensor)
    if found is not None and not stored.act_order:
        raise HetcompError(
            f"quantization_config says that the groups of {tensor.name} in {tensor.file} are runs of columns, but they "
            "are not"
        )
    return found


def _in_runs(codes: _Bytes, zeros: _Bytes | None, scales: _Floats, stored: Stored) -> QuantisedNumbers:
    width = codes.shape[1] // scales.shape[1]
    of_groups = [np.repeat(part, -(-width // GROUP), axis=1) for part in (scales, zeros) if part is not None]
    if zeros is None:
        return QuantisedNumbers("q4" if stored.bits == 4 else "q8", codes, of_groups[0])
    return with_zero_points(codes, *of_groups)
