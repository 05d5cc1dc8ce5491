"""The quantiser of runtime_lib/src/quantise: turns numbers, or codes and scales, into packed panels, on all cores."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError
from hetcomp.quantised_numbers import GROUPS, QuantisedNumbers

# Numbers as the checkpoint has them; bf16 comes as its bits in uint16 because numpy has no such type.
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

# The values of hetcomp_number_type and hetcomp_weight_format in quantise.h.
_NUMBER_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
_FORMATS = {"f32": 0, "bf16": 1, "q8": 2, "fp8": 3, "q4": 4, "mxfp4": 5, "q4k": 6, "q6k": 7, "q5k": 8, "q4z": 9}
# hetcomp_row_encoding: codes of the weight format, a byte each. hetcomp_scale_type by the format of the codes.
_CODES = 0
_SCALE_TYPES = {"q8": 1, "q4": 1, "fp8": 1, "mxfp4": 4, "q4k": 5, "q5k": 5, "q6k": 6, "q4z": 7}
_OK, _NOT_FINITE = 0, 1
_FAILURES = {
    -1: "it was given a request that it does not understand; report this bug",
    -2: "this CPU lacks AVX2 or FMA; compile on a newer one, the artifact can be copied",
    -3: "there is no memory left",
}


class _Request(ctypes.Structure):
    """hetcomp_quantise_request."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("importance", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_bytes", ctypes.c_int64),
        ("number_type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("gate_up", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _RepackRequest(ctypes.Structure):
    """hetcomp_repack_request."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_count", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale_columns", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_bytes", ctypes.c_int64),
        ("encoding", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("gate_up", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def quantise(
    matrix: Numbers,
    weight_format: str,
    gate_up: bool,
    out: npt.NDArray[np.uint8],
    importance: npt.NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> bool:
    """Fills ``out`` with the packed matrix; returns whether all its numbers are finite and fit the format.

    matrix: [rows, columns] in f32, f16 or bf16 bits (uint16), in any strides of whole numbers. out: contiguous, of
    exactly ``packing.matrix_bytes``. importance: f32 [columns], contiguous and not negative. threads: as many as this
    process may run at once if None. The interpreter's lock is free meanwhile. Raises HetcompError for another dtype
    or on an old CPU.
    """
    number_type = _NUMBER_TYPES.get(matrix.dtype)
    if number_type is None:
        raise HetcompError(f"Weights of dtype {matrix.dtype} cannot be packed; expected f32, f16 or bf16.")
    size = matrix.itemsize
    assert not any(stride % size for stride in matrix.strides)
    request = _Request(
        numbers=matrix.ctypes.data,
        rows=matrix.shape[0],
        columns=matrix.shape[1],
        row_stride=matrix.strides[0] // size,
        column_stride=matrix.strides[1] // size,
        importance=None if importance is None else importance.ctypes.data,
        out=out.ctypes.data,
        out_bytes=out.size,
        number_type=number_type,
        format=_FORMATS[weight_format],
        gate_up=gate_up,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    return _checked(_library().hetcomp_quantise(ctypes.byref(request))) == _OK


def repack(numbers: QuantisedNumbers, gate_up: bool, out: npt.NDArray[np.uint8], threads: int | None = None) -> None:
    """Fills ``out`` with the panels of one matrix's codes and scales, as they are (scales as fp16 in q4, q4z, q8).

    numbers: [rows, columns]. out: contiguous, of exactly ``packing.matrix_bytes``. threads: as :func:`quantise`. Raises
    HetcompError on an old CPU.
    """
    codes = np.ascontiguousarray(numbers.codes)
    wanted = np.float32 if _SCALE_TYPES[numbers.format] == 1 else numbers.scales.dtype
    scales = np.ascontiguousarray(numbers.scales, wanted)
    code_rows, scale_rows = _row_addresses(codes), _row_addresses(scales)
    request = _RepackRequest(
        rows=code_rows.ctypes.data,
        scales=scale_rows.ctypes.data,
        row_count=codes.shape[0],
        columns=codes.shape[1],
        scale_columns=GROUPS[numbers.format],
        out=out.ctypes.data,
        out_bytes=out.size,
        encoding=_CODES,
        scale_type=_SCALE_TYPES[numbers.format],
        format=_FORMATS[numbers.format],
        gate_up=gate_up,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    _checked(_library().hetcomp_repack(ctypes.byref(request)))


def _row_addresses(array: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Of each row of a contiguous array."""
    return array.ctypes.data + np.arange(len(array), dtype=np.uint64) * np.uint64(array.strides[0])


def _checked(status: int) -> int:
    if status not in (_OK, _NOT_FINITE):
        raise HetcompError(f"The quantiser failed: {_FAILURES.get(status, f'status {status}')}.")
    return status


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(installed_runtime.quantiser()))
    for function, request in ((library.hetcomp_quantise, _Request), (library.hetcomp_repack, _RepackRequest)):
        function.argtypes = (ctypes.POINTER(request),)
        function.restype = ctypes.c_int32
    return library
