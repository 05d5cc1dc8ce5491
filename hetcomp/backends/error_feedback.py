"""Packs a matrix group by group of columns, each group's error made good by the columns after it.

The error that matters is that of the products, tr(D C D^T) for errors D [N, K] and second moments C [K, K] of the
activations. When columns B are rounded with error D_B, the other columns minimise it by the error
D_B U_BB^-1 U_B,rest, where U^T U = C^-1 and U is upper triangular; what a column's own error then costs is 1 / U_kk^2
(GPTQ: Frantar et al., 2022, arXiv:2210.17323). GPTQ does so column by column; here a group of 32 columns is rounded at
once, so that the quantiser's search for a scale stays what it is. On demo-moe both give the same divergence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hetcomp.backends import packing
from hetcomp.backends.quantiser import quantise
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value

FORMATS = ("q4", "mxfp4")  # the error of finer ones is too small to be worth it
_GROUP = 32
_DAMPING = 0.01  # of the mean of the diagonal, added to it: GPTQ's
_ROWS = 4096  # at once, where rows lie in order: bounds the f32 copy of a large vocabulary's head

_Floats = npt.NDArray[np.float32]


def pack_with_feedback(matrix: _Floats, value: Value, moments: _Floats) -> tuple[packing.Bytes, bool]:
    """The packed bytes of one matrix of ``value``, in a format of ``FORMATS``, and whether its scales can hold it.

    matrix: finite f32 [N, K]; moments: f32 [K, K], the mean of x x^T over activations x, not zero. Raises HetcompError
    if no activations can have these moments.
    """
    assert value.format in FORMATS
    try:
        weights, carried = _factors(moments)
    except np.linalg.LinAlgError:
        raise HetcompError(
            f"The second moments of {value.fqn or value.id} are not those of activations (not positive semidefinite); "
            "make the importance file anew."
        ) from None
    if value.type.layout == packing.PANELS_GLU:
        return _pack(matrix, value, weights, carried)
    blocks = range(0, len(matrix), _ROWS)
    parts = [_pack(matrix[i : i + _ROWS], value, weights, carried) for i in blocks]
    return np.concatenate([data for data, _ in parts]), all(finite for _, finite in parts)


def _factors(moments: _Floats) -> tuple[_Floats, list[_Floats]]:
    """The weights of the columns' errors [K], and for each group U_BB^-1 U_B,rest [group, rest]."""
    columns = len(moments)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(columns)] += _DAMPING * damped.diagonal().mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    carried = []
    for start in range(0, columns, _GROUP):
        end = min(start + _GROUP, columns)
        carried.append(np.linalg.solve(upper[start:end, start:end], upper[start:end, end:]).astype(np.float32))
    return (1 / upper.diagonal() ** 2).astype(np.float32), carried


def _pack(matrix: _Floats, value: Value, weights: _Floats, carried: list[_Floats]) -> tuple[packing.Bytes, bool]:
    assert value.format is not None
    form, layout = value.format, value.type.layout
    rows, columns = matrix.shape
    left = matrix.copy()
    panels = packing.panels(rows, layout)
    packed = np.zeros((panels, packing.panel_bytes(columns, form)), np.uint8)
    each, finite = packing.group_bytes(form), True
    for group, carry in enumerate(carried):
        start = group * _GROUP
        part = left[:, start : start + _GROUP]
        one = np.empty(packing.matrix_bytes(rows, part.shape[1], form, layout), np.uint8)
        own = np.ascontiguousarray(weights[start : start + _GROUP])
        finite &= quantise(part, form, layout == packing.PANELS_GLU, one, own)
        packed[:, group * each : (group + 1) * each] = one.reshape(panels, -1)[:, :each]
        if not finite:
            continue  # its error is no number
        error = part - packing.unpack_matrix(one, rows, part.shape[1], form, layout)
        left[:, start + _GROUP :] -= error @ carry
    return packed.reshape(-1), finite
