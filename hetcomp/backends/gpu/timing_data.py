"""Random contents of what launches read, so that they can be timed and compared without a model's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetcomp.backends import packing
from hetcomp.backends.gpu.groups import GpuGroup
from hetcomp.backends.gpu.tile_timer import TimedBuffer
from hetcomp.ir.kv_pool import BLOCK_POSITIONS, GpuCacheMemory
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType

_PANELS = 8  # different ones that a weight is made of
_NUMBERS = (1 << 20) - 3  # different ones that an activation is made of: no multiple of a row's, so that rows differ
_DEVIATION = 0.02  # of weights


class TimingData:
    """Buffers of a graph's groups; their contents are files of ``folder``. ``rows`` of the step, ``dims`` of its
    values; ``cache``: how the KV cache lies."""

    def __init__(self, folder: Path, rows: int, dims: Mapping[str, int], cache: GpuCacheMemory) -> None:
        self._folder = folder
        self._rows = rows
        self._dims = {**dims, "slots": 1}
        self._cache_bytes = -(-rows // BLOCK_POSITIONS) * cache.block

    def value(self, value: Value, group: GpuGroup, values: Mapping[str, Value]) -> TimedBuffer:
        """What the group's launches read as ``value``."""
        experts = next((op.attrs for op in group.ops if isinstance(op.attrs, MoeExperts)), None)
        dtype, shape = value.type.dtype, value.type.shape
        if value.kind is ValueKind.WEIGHT:
            return self._weight(value)
        cached = value.kind is ValueKind.STATE and value.type.is_cache
        size = self._cache_bytes if cached else value.type.bytes(self._dims)
        if dtype is DType.FP8:
            return TimedBuffer(size)  # random bytes would be NaN now and then
        if dtype is not DType.I32:
            return TimedBuffer(size, self._normal(str(dtype), 1.0))
        assert experts is not None
        if value.kind is ValueKind.CONST:
            here = self._here(group, values)
            resident = np.arange(experts.experts, dtype=np.int32)
            return TimedBuffer(
                size, self._file(["resident", experts.experts, here], np.where(resident < here, resident, -1))
            )
        assert isinstance(shape[-1], int)
        return TimedBuffer(size, self._choices(shape[-1], experts.experts))

    def written(self, value: Value) -> TimedBuffer:
        """What the group's launches write."""
        return TimedBuffer(value.type.bytes(self._dims))

    def step(self, name: str) -> TimedBuffer:
        """An array that a step brings: the rows are the first tokens of a slot."""
        if name in ("rows", "logit_row_count"):
            return TimedBuffer(4, self._file([name, self._rows], np.array([self._rows], np.int32)))
        numbers = np.arange(self._rows, dtype=np.int32) * (name != "slots")
        return TimedBuffer(numbers.nbytes, self._file([name, self._rows], numbers))

    def _here(self, group: GpuGroup, values: Mapping[str, Value]) -> int:
        """Experts whose weights the group has."""
        shapes = (values[name].type.shape for name in group.inputs if values[name].kind is ValueKind.WEIGHT)
        here = next(shape[0] for shape in shapes if len(shape) == 3)
        assert isinstance(here, int)
        return here

    def _weight(self, value: Value) -> TimedBuffer:
        size = packing.packed_bytes(value)
        if value.type.layout == packing.ROW_MAJOR:
            return TimedBuffer(size, self._normal(str(value.format or "f32"), 1.0))
        columns, form = value.type.shape[-1], str(value.format)
        assert isinstance(columns, int)
        path = self._panels(columns, form)
        return TimedBuffer(size, self._ordered(value, columns, path) if has_act_order(value.type.layout) else path)

    def _ordered(self, value: Value, columns: int, panels: Path) -> Path:
        """A matrix of ``value`` of these panels, with an order of its columns."""
        rows = int(value.type.shape[-2])
        path = self._path(["ordered", rows, columns, str(value.format), value.type.layout])
        if not path.exists():
            order = np.random.default_rng(3).permutation(columns).astype(np.int32)
            size = packing.matrix_bytes(rows, columns, str(value.format), value.type.layout) - order.nbytes
            whole = np.resize(np.frombuffer(panels.read_bytes(), np.uint8), size)
            path.write_bytes(whole.tobytes() + order.tobytes())
        return path

    def _panels(self, columns: int, form: str) -> Path:
        path = self._path(["panels", columns, form])
        if not path.exists():
            shape = (_PANELS * packing.PANEL, columns)
            panels = Value("w", TensorType(DType.F32, shape, packing.PANELS), ValueKind.WEIGHT, fqn="w", format=form)
            random = np.random.default_rng(0)
            if form in packing.TAKEN_OVER:
                # No quantiser makes these. Bytes up to 31 are codes, small scales and fp16 numbers below 0.01.
                data = random.integers(0, 32, packing.packed_bytes(panels), np.uint8)
            else:
                numbers = random.standard_normal(shape, np.float32) * np.float32(_DEVIATION)
                data, _ = packing.pack(numbers, panels, threads=1)
            path.write_bytes(data.tobytes())
        return path

    def _normal(self, dtype: str, deviation: float) -> Path:
        path = self._path(["normal", dtype, deviation])
        if not path.exists():
            numbers = np.random.default_rng(1).standard_normal(_NUMBERS, np.float32) * np.float32(deviation)
            bits = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else numbers
            path.write_bytes(bits.tobytes())
        return path

    def _choices(self, top_k: int, experts: int) -> Path:
        """Different experts for each row, all equally likely."""
        path = self._path(["choices", self._rows, top_k, experts])
        if not path.exists():
            scores = np.random.default_rng(2).random((self._rows, experts), np.float32)
            path.write_bytes(np.argsort(scores, axis=1)[:, :top_k].astype(np.int32).tobytes())
        return path

    def _file(self, spec: list[Any], numbers: NDArray[Any]) -> Path:
        path = self._path(spec)
        if not path.exists():
            path.write_bytes(numbers.astype(np.int32).tobytes())
        return path

    def _path(self, spec: list[Any]) -> Path:
        return self._folder / hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
