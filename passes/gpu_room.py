"""What a GPU has room for: its memory, and what a placed plan takes of it."""

from __future__ import annotations

from hetcomp.ir.homes import read_in
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.node_parts import gpu_cut_weights
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.adapter_memory import pair_bytes_on
from hetcomp.passes.context import Context
from hetcomp.passes.memory_table import GPU_RESERVE, gpu_limit, workspace_estimate


def rooms_of_gpus(context: Context) -> list[int]:
    """Bytes of each GPU that a plan may use; empty where none takes part."""
    return [gpu_limit(context, i) for i in range(len(context.profile.gpus))] if context.use_gpus else []


def taken_on(plan: Plan, context: Context, gpu: str) -> int:
    """Bytes of ``gpu`` that what is placed on it takes, its runtime, activations, adapters and the ring for streamed
    weights included; without slots of experts."""
    readers, cuts, pool = read_in(plan), gpu_cut_weights(plan, gpu), KvPool.of(plan.max_dims())
    taken = GPU_RESERVE + pool.granule_waste + workspace_estimate(plan) + pair_bytes_on(plan, context, gpu)
    if plan.weight_stream is not None and gpu in plan.weight_stream.gpus:
        taken += plan.weight_stream.ring_bytes
    for value in plan.values:
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST) and (value.id in cuts or gpu in readers[value.id]):
            taken += context.target.packed_bytes(cuts[value.id][0] if value.id in cuts else value)
        elif value.kind is ValueKind.STATE and gpu in readers[value.id]:
            taken += pool.gpu_bytes(value.type)
    return taken
