"""Attaches LoRA adapters to the weights that they change."""

from __future__ import annotations

from dataclasses import replace

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import AttachedAdapter
from hetcomp.ir.plan import Plan, Value, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass

_FLOATS = ("F64", "F32", "F16", "BF16")


@plan_pass(requires=("weights_bound",))
def attach_lora(plan: Plan, context: Context) -> Plan:
    """Records the adapters that the model is compiled with. Their deltas are added where the weights are read for
    packing, which is before they are quantised. Also records what there shall be memory for at run time.

    Raises HetcompError if a target is no weight of the plan, or if one that an adapter is merged into is not stored as
    floating-point numbers: rounded twice, a small delta may be lost.
    """
    weights: dict[str, list[Value]] = {}
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT and value.fqn is not None:
            weights.setdefault(value.fqn, []).append(value)
    for adapter in context.adapters:
        for target in adapter.targets:
            if target.fqn not in weights:
                raise HetcompError(
                    f"Adapter {adapter.name} changes {target.fqn}, which {plan.model.name} does not use."
                )
            for value in weights[target.fqn] if adapter.merged else ():
                _check_mergeable(adapter, value)
    return replace(plan, adapters=context.adapters, adapter_room=context.adapter_room)


def _check_mergeable(adapter: AttachedAdapter, value: Value) -> None:
    for tensor in value.source.tensors if value.source is not None else ():
        if tensor.dtype.upper() not in _FLOATS:
            raise HetcompError(
                f"Adapter {adapter.name} cannot be merged: {tensor.name} in {tensor.file} is stored as {tensor.dtype}; "
                "give a checkpoint in f32, f16 or bf16."
            )
