"""Experts for which the CPU has no memory stay on the disk, and those that are chosen are read into the page cache.

See docs/decisions/experts-from-disk.md.
"""

from __future__ import annotations

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import DiskReads
from hetcomp.ir.deferral import moe_layers
from hetcomp.ir.expert_matrices import expert_matrices
from hetcomp.ir.homes import CPU, memory_of, read_in
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.memory_table import expert_weight_bytes, gpu_limit, memory_table, workspace_estimate
from hetcomp.passes.stream_experts import expert_bytes


def expected_reads(plan: Plan, context: Context) -> DiskReads | None:
    """Before placement: as if GPUs held all but experts, and of these what they have room for. None: nothing is
    read."""
    if not context.from_disk:
        return None
    experts = expert_weight_bytes(plan, context)
    on_gpus = sum(gpu_limit(context, i) for i in range(len(context.profile.gpus))) if context.use_gpus else 0
    others = sum(row.bytes for row in memory_table(plan, context)) - experts + workspace_estimate(plan)
    return _reads(experts - max(0, on_gpus - others), max(0, others - on_gpus), context)


def disk_reads(plan: Plan, context: Context) -> DiskReads | None:
    """Of a placed plan. None: nothing is read. Raises HetcompError where the memory does not hold what every token
    reads."""
    if not context.from_disk:
        return None
    experts = 0
    for layer in moe_layers(plan):
        size = expert_bytes(layer.op, layer.template, context)
        experts += size * sum(r.last - r.first + 1 for r in layer.placement.experts if memory_of(r.device) == CPU)
    found = _reads(experts, resident_bytes(plan, context), context)
    if found is not None and found.room <= 0:
        raise HetcompError(
            f"{plan.model.name} does not run from the disk here: what every token reads takes all of the memory, "
            f"and nothing is left for the chosen experts. More than {-found.room / 1e9:.3f} GB more, a shorter "
            "--context or coarser --formats would do."
        )
    return found


def resident_bytes(plan: Plan, context: Context) -> int:
    """What all but experts take of the CPU's memory, of a placed plan."""
    experts, readers, pool = expert_matrices(plan), read_in(plan), KvPool.of(plan.max_dims())
    size = workspace_estimate(plan)
    for value in plan.values:
        if CPU not in readers[value.id] or value.id in experts:
            continue
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
            size += context.target.packed_bytes(value)
        elif value.kind is ValueKind.STATE:
            size += pool.cpu_bytes(value.type)
    return size


def _reads(experts: int, others: int, context: Context) -> DiskReads | None:
    room = context.profile.available_bytes() - others
    if experts <= max(0, room):
        return None
    disk = context.profile.disk
    if disk is None:
        raise HetcompError(
            f"Profile {context.profile.name} has no speed of the disk, which decides how fast experts are read from "
            "it: run hetcomp profile, and give its file with --hw."
        )
    return DiskReads(experts, room, disk.gb_per_s)
