"""Runs groups of the GPU backend one after the other in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends.gpu.groups import GpuGroup
from hetcomp.ir.ops import STATE_WRITERS
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType
from tests.reference.cache_blocks import cache_block, from_blocks, to_blocks
from tests.reference.kernel_harness import Step
from tests.reference.triton_harness import run

Arrays = dict[str, npt.NDArray[Any]]


def run_groups(
    groups: Sequence[GpuGroup], values: Mapping[str, Value], given: Arrays, rows: int, step: Step | None = None
) -> Arrays:
    """All values after the groups, by id. given: weights as stored, caches [slots, heads, context, dim] and other
    states as their types say, activations that no group writes. States are written in place; the groups are made for
    blocks of cache_block(values). A group that reads what nobody has written fails."""
    have = dict(given)
    states = {v.id for v in values.values() if v.kind is ValueKind.STATE and v.type.is_cache} & have.keys()
    block = cache_block(list(values.values()))
    have.update((name, to_blocks(have[name], block)) for name in states)
    values = {**values, **{v.id: v for group in groups for v in group.own}}
    for group in groups:
        writers = [op for op in group.ops if op.kind in STATE_WRITERS]
        written = {v for op in writers for v in op.inputs if values[v].kind is ValueKind.STATE}
        assert written <= set(group.inputs)
        made = run(
            group.code,
            [have[v] for v in group.inputs],
            [(_shape(values[v], rows), _NUMPY[values[v].type.dtype]) for v in group.outputs],
            rows=rows,
            step=step,
            changed={i: have[v] for i, v in enumerate(group.inputs) if v in written},
        )
        have.update(zip(group.outputs, made, strict=True))
    for name in states:
        _, heads, context, dim = given[name].shape
        given[name][...] = from_blocks(have[name], heads, context, dim)
        have[name] = given[name]
    return have


_NUMPY = {DType.F32: np.float32, DType.I32: np.int32, DType.BF16: np.uint16}


def _shape(value: Value, rows: int) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else rows for d in value.type.shape)
