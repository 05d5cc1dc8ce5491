"""The quantiser of runtime_lib/src/quantise: turns a matrix into packed panels, on all cores."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np
import numpy.typing as npt

from hetcomp import installed_runtime
from hetcomp.errors import HetcompError

# Numbers as the checkpoint has them; bf16 comes as its bits in uint16 because numpy has no such type.
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

# The values of hetcomp_number_type and hetcomp_weight_format in quantise.h.
_NUMBER_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
_FORMATS = {"f32": 0, "bf16": 1, "q8": 2, "fp8": 3, "q4": 4, "mxfp4": 5}
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
    status = _library().hetcomp_quantise(ctypes.byref(request))
    if status not in (_OK, _NOT_FINITE):
        raise HetcompError(f"The quantiser failed: {_FAILURES.get(status, f'status {status}')}.")
    return bool(status == _OK)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(installed_runtime.quantiser()))
    library.hetcomp_quantise.argtypes = (ctypes.POINTER(_Request),)
    library.hetcomp_quantise.restype = ctypes.c_int32
    return library
