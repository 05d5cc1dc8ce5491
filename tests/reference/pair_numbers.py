"""The numbers that packed low-rank pairs stand for, read back as program.h describes them (hetcomp_pair)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hetcomp.backends.adapted_ops import AdaptableWeight
from hetcomp.backends.packing import to_f32

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float32]


def pair_numbers(a: Bytes, b: Bytes, rank: int, shape: AdaptableWeight) -> tuple[Numbers, Numbers]:
    """a f32 [matrices, rank, columns] and b f32 [matrices, rows, rank] of the bytes from which on they lie. Asserts
    that what pads them is zero."""
    n, rows = shape.matrices, shape.rows // shape.halves
    columns, panels = -(-shape.columns // 16) * 16, -(-rows // 16)
    along = _blocks(a, n, (rank, columns), (rank, 1), np.dtype(np.float32), shape.number_bytes)
    assert not along[..., shape.columns :].any()
    across = _blocks(b, n * panels * shape.halves, (rank, 16), (1, 16), np.dtype(np.uint16), shape.number_bytes)
    across = across.reshape(n, panels, shape.halves, rank, 16).transpose(0, 2, 1, 4, 3)
    across = across.reshape(n, shape.halves, panels * 16, rank)
    assert not across[:, :, rows:].any()
    return along[..., : shape.columns], across[:, :, :rows].reshape(n, shape.rows, rank)


def _blocks(
    data: Bytes, n: int, sizes: tuple[int, int], scales: tuple[int, int], scale: np.dtype, number_bytes: int
) -> Numbers:
    """f32 [n, *sizes]. In 8 bits scales of the dtype ``scale`` and shape ``scales`` are behind each block."""
    count = sizes[0] * sizes[1]
    if number_bytes > 1:
        dtype = np.dtype(np.float32 if number_bytes == 4 else np.uint16)
        return to_f32(data[: n * count * number_bytes].view(dtype)).reshape(n, *sizes)
    stride = count + max(scales) * scale.itemsize
    blocks = data[: n * stride].reshape(n, stride)
    factors = to_f32(np.ascontiguousarray(blocks[:, count:]).view(scale)).reshape(n, *scales)
    return np.ascontiguousarray(blocks[:, :count]).view(np.int8).reshape(n, *sizes) * factors
