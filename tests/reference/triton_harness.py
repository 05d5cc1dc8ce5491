"""Runs the GPU backend's launches on numpy arrays, interpreted (ttir_interpreter.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hetcomp.backends.gpu.kernels import GpuCode, GpuRequest, Launch, Operand
from hetcomp.backends.gpu.low_rank import PAIR_TABLE, PAIRS
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Op, Value
from tests.gpu.record_cases import buffer_name, folder, record
from tests.reference.cache_blocks import cache_block, slot_blocks
from tests.reference.kernel_harness import Step
from tests.reference.ttir_interpreter import run_kernel

_GUARD = 256  # bytes in front of and behind a buffer
_BACKEND = TritonBackend()


def request(
    attrs: Attrs,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    dims: Mapping[str, int],
    rows: int | None = None,
    resident: bool = False,
    f32: bool = False,
) -> GpuRequest:
    """A request around ``attrs``; KV caches are in blocks (tests.reference.cache_blocks)."""
    op = Op("op", attrs, (), (), origin="model.layers.0.test")
    dims = {"cache_block": cache_block(inputs), **dims}
    return GpuRequest(op, tuple(inputs), tuple(outputs), dims, rows, resident, f32=f32)


def emit(asked: GpuRequest) -> GpuCode:
    """The backend's answer."""
    return _BACKEND.emit(asked)


@dataclass(frozen=True)
class StepAdapters:
    """What a step has of adapters: the slot of each row, all pairs, and the table i64 [weights, slots, 4] by which
    kernels find them."""

    of_row: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int64]


@dataclass
class _Buffer:
    """Bytes between two guard zones, all 0xFF (NaN, and -1) at first."""

    everything: torch.Tensor
    size: int

    @classmethod
    def of_size(cls, size: int) -> _Buffer:
        return cls(torch.full((size + 2 * _GUARD,), 0xFF, dtype=torch.uint8), size)

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> _Buffer:
        buffer = cls.of_size(array.nbytes)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.everything[_GUARD : _GUARD + array.nbytes] = torch.from_numpy(flat.copy())
        return buffer

    def body(self) -> torch.Tensor:
        return self.everything[_GUARD : _GUARD + self.size]

    def area(self) -> range:
        """Addresses of the bytes."""
        start = self.everything.data_ptr() + _GUARD
        return range(start, start + self.size)

    def numpy(self, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self.body().numpy().view(dtype).reshape(shape).copy()

    def check(self) -> None:
        assert (self.everything[:_GUARD] == 0xFF).all(), "the kernel wrote in front of a buffer"
        assert (self.everything[_GUARD + self.size :] == 0xFF).all(), "the kernel wrote behind a buffer"


def run(
    asked: GpuRequest | GpuCode,
    inputs: Sequence[npt.NDArray[Any]],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    *,
    rows: int,
    step: Step | None = None,
    grid_rows: int | None = None,
    changed: Mapping[int, npt.NDArray[Any]] | None = None,
    adapters: StepAdapters | None = None,
) -> list[npt.NDArray[Any]]:
    """Runs the op, or a group's code, and returns its outputs (shape, dtype); asserts that nothing is written outside
    of them and of the workspace. ``grid_rows``: rows that the grids are made for, ``rows`` if None. ``changed``: inputs
    (by index) that are written; what is left in them is copied into the given arrays."""
    code = asked if isinstance(asked, GpuCode) else emit(asked)
    step = step or Step()
    of_step = {
        "positions": step.positions,
        "slots": step.slots,
        "logit_rows": step.logit_rows,
        "inverse_temperatures": step.inverse_temperatures,
        "rows": np.array([rows], np.int32),
        "logit_row_count": np.array([rows], np.int32),
    }
    buffers: dict[tuple[str, Any], _Buffer] = {("workspace", 0): _Buffer.of_size(code.workspace_bytes)}
    buffers |= {("input", i): _Buffer.of(a) for i, a in enumerate(inputs)}
    buffers |= {
        ("output", i): _Buffer.of_size(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        for i, (shape, dtype) in enumerate(outputs)
    }
    buffers |= {("step", name): _Buffer.of(a) for name, a in of_step.items() if a is not None}
    if adapters is not None:
        buffers["step", "adapters"] = _Buffer.of(adapters.of_row)
        buffers["adapters", PAIRS] = _Buffer.of(adapters.pairs)
        buffers["adapters", PAIR_TABLE] = _Buffer.of(adapters.table)
    before = {buffer_name(*key): b.everything.numpy().copy() for key, b in buffers.items()}
    for launch in code.launches:
        _run_launch(launch, buffers, slot_blocks(step.context), rows if grid_rows is None else grid_rows)
    for buffer in buffers.values():
        buffer.check()
    if recorded := folder():
        written = {
            key: b
            for key, b in buffers.items()
            if key[0] == "output" or (key[0] == "input" and key[1] in (changed or ()))
        }
        after = {buffer_name(*key): b.everything.numpy() for key, b in written.items()}
        record(
            recorded, code, before, after, slot_blocks(step.context), rows if grid_rows is None else grid_rows, _GUARD
        )
    for i, target in (changed or {}).items():
        target[...] = buffers["input", i].numpy(target.dtype, target.shape)
    return [buffers["output", i].numpy(dtype, shape) for i, (shape, dtype) in enumerate(outputs)]


def _run_launch(launch: Launch, buffers: Mapping[tuple[str, Any], _Buffer], blocks: int, rows: int) -> None:
    def value(operand: Operand) -> int:
        if operand.source == "slot_blocks":
            return blocks
        key = operand.name if operand.source in ("step", "adapters") else operand.index
        return buffers[operand.source, key].area().start + operand.offset

    names = (name for name, _ in launch.kernel.arguments)
    values = {name: value(operand) for name, operand in zip(names, launch.operands, strict=True)}
    x, y, z = (axis.programs(rows) for axis in launch.grid)
    run_kernel(launch.kernel, (x, y, z), values, [buffer.area() for buffer in buffers.values()])
