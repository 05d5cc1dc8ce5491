"""Ops of a step on the GPU as groups that run one after the other, each with its launches."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends.gpu.kernels import GpuCode, GpuRequest
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.ir.plan import Op, Value


@dataclass(frozen=True)
class GpuGroup:
    """Ops with common launches. ``ops``: what is covered, in order. ``inputs``: ids of the values that
    ``Operand("input", i)`` stands for; a state that is appended to is one. ``outputs``: ids of the values that the
    launches write, ``Operand("output", i)``."""

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    code: GpuCode


def group_ops(
    ops: Sequence[Op],
    values: Mapping[str, Value],
    wanted: Container[str],
    dims: Mapping[str, int],
    rows: int | None,
) -> tuple[GpuGroup, ...]:
    """The ops in groups, in an order of execution.

    ops: a run of ops without branches, all on the GPU, ids of values unique; a ``moe_experts`` has all its experts
    here. wanted: ids of values that others read too. A value that is neither wanted nor read by another group need not
    be written. dims, rows: as ``GpuRequest``. Raises HetcompError naming an op that there is no kernel for.
    """
    return tuple(_single(op, values, dims, rows) for op in ops)


def _single(op: Op, values: Mapping[str, Value], dims: Mapping[str, int], rows: int | None) -> GpuGroup:
    operands = (tuple(values[v] for v in ids) for ids in (op.inputs, op.outputs))
    code = TritonBackend().emit(GpuRequest(op, *operands, dims, rows))
    return GpuGroup((op,), op.inputs, op.outputs, code)
