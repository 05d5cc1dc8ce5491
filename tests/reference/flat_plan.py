"""A plan's calls as one list of ops with values of their own, as the GPU backend groups them; its weights packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.backends import packing
from hetcomp.backends.operand_layouts import layouts_for
from hetcomp.ir.plan import Op, Plan, Value, ValueKind
from hetcomp.ir.types import DType
from tests.reference.group_harness import Arrays


@dataclass(frozen=True)
class FlatPlan:
    """Ops in order and their values. An op is called ``<number of its call>.<its id>``."""

    ops: list[Op]
    values: dict[str, Value]

    def call_of(self, op: Op) -> int:
        """Number of the op's call."""
        return int(op.id.split(".")[0])


def flatten(plan: Plan, format_of: Callable[[Op], str], cache: DType) -> FlatPlan:
    """format_of: the weight format of an op of the plan. cache: type of the KV cache."""
    values = {v.id: v for v in plan.values}
    made: list[Op] = []
    for number, call in enumerate(plan.calls):
        template = plan.template(call.template)
        names = dict(zip(template.params, call.args, strict=True)) | dict(
            zip(template.results, call.results, strict=True)
        )
        for value in template.values:
            if value.id not in names:
                names[value.id] = f"{number}.{value.id}"
                values[names[value.id]] = replace(value, id=names[value.id])
        for op in template.ops:
            inputs, outputs = (tuple(names[v] for v in ids) for ids in (op.inputs, op.outputs))
            made.append(replace(op, id=f"{number}.{op.id}", inputs=inputs, outputs=outputs))
            for i, v in enumerate(inputs):
                values[v] = _stored(values[v], layouts_for(op.kind, i)[0], format_of(op), cache)
    return FlatPlan(made, values)


def _stored(value: Value, layout: str, weight_format: str, cache: DType) -> Value:
    if value.kind is ValueKind.STATE and value.type.is_cache:
        return replace(value, type=replace(value.type, dtype=cache))
    if value.kind is not ValueKind.WEIGHT or layout == packing.ROW_MAJOR:
        return value
    return replace(value, type=replace(value.type, layout=layout), format=weight_format)


class StoredWeights:
    """Weights in their formats: as bytes for kernels, and as the numbers that these mean for the plan's interpreter."""

    def __init__(self, flat: FlatPlan, checkpoint: Any, dims: dict[str, int]) -> None:
        self.arrays: Arrays = {}
        self._numbers: dict[str, npt.NDArray[np.float32]] = {}
        for value in flat.values.values():
            if value.kind is ValueKind.WEIGHT:
                data, _ = packing.pack(checkpoint.read(value), value)
                self._numbers[value.id] = packing.unpack(data, value)
                self.arrays[value.id] = data
            elif value.kind is ValueKind.CONST:
                self.arrays[value.id] = np.array(value.data, np.float32)
            elif value.kind is ValueKind.STATE:
                shape = [d if isinstance(d, int) else dims[d] for d in value.type.shape]
                self.arrays[value.id] = np.zeros(shape, np.uint16 if value.type.dtype is DType.BF16 else np.float32)

    def read(self, value: Value) -> npt.NDArray[np.float32]:
        """The numbers of a weight."""
        return self._numbers[value.id]
