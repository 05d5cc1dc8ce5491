"""What a plan needs of the machine's memory, and the refusal when it is not there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.errors import DoesNotFit
from hetcomp.hardware.figures import Gpu
from hetcomp.ir.expert_matrices import expert_matrices
from hetcomp.ir.kv_pool import CHECKPOINTS, KvPool
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.adapter_memory import pair_bytes
from hetcomp.passes.choose_formats import ROW_MAJOR, weight_role
from hetcomp.passes.context import FORMATS, TAKEN_OVER, Context

# CUDA context, module code and the graph's own nodes on every GPU in use (300 to 500 MB seen with R570 drivers).
GPU_RESERVE = 600 << 20


@dataclass(frozen=True)
class MemoryRow:
    """One line of the byte table."""

    what: str
    bytes: int


def expert_weight_bytes(plan: Plan, context: Context) -> int:
    """Bytes of the packed matrices of all routed experts; their biases stay in memory."""
    ids = expert_matrices(plan)
    return sum(context.target.packed_bytes(v) for v in plan.values if v.id in ids)


def memory_table(plan: Plan, context: Context) -> tuple[MemoryRow, ...]:
    """Bytes of the packed weights by role and format, of the KV cache and of the arena (0 before plan_memory)."""
    roles: dict[str, str] = {}
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for name in op.inputs:
                if name in actual:
                    roles.setdefault(actual[name], weight_role(op))
    rows: dict[str, int] = {}
    for value in plan.values:
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
            what = f"weights, {roles.get(value.id, 'unused')}, {value.format}"
            rows[what] = rows.get(what, 0) + context.target.packed_bytes(value)
    if pairs := sum(pair_bytes(plan, context).values()):
        room = context.adapter_room
        rows[f"LoRA adapters, {room.count} of rank {room.rank}" if room else "LoRA adapters"] = pairs
    dims = plan.max_dims()
    rows |= state_bytes(plan)
    if plan.arena_bytes:
        rows[f"activations, {dims['T']} tokens a step"] = plan.arena_bytes
    return tuple(MemoryRow(what, size) for what, size in rows.items())


def cache_bytes(plan: Plan) -> int:
    """Of the KV cache in the CPU's memory; a GPU takes up to 63 positions a sequence more."""
    pool = KvPool.of(plan.max_dims())
    return sum(pool.cpu_bytes(v.type) for v in plan.values if v.kind is ValueKind.STATE and v.type.is_cache)


def state_bytes(plan: Plan) -> dict[str, int]:
    """Of all states in the CPU's memory, by what they are."""
    pool = KvPool.of(plan.max_dims())
    recurrent = [v for v in plan.values if v.kind is ValueKind.STATE and not v.type.is_cache]
    found = {f"KV cache, {pool}": cache_bytes(plan)}
    states = sum(pool.cpu_bytes(v.type) for v in recurrent)
    found[f"states of recurrences, {pool.slots} sequences, with checkpoints"] = (1 + CHECKPOINTS) * states
    return {what: size for what, size in found.items() if size}


def refuse_if_too_large(plan: Plan, context: Context) -> None:
    """Raises DoesNotFit with the byte table, and the nearest plans that would fit, if the plan needs more memory than
    the profile says is free on all devices that take part; experts that may be read from the disk need none."""
    rows = memory_table(plan, context)
    need = sum(row.bytes for row in rows)
    if context.from_disk:
        need -= expert_weight_bytes(plan, context)
    limits = _limits(context)
    free = sum(row.bytes for row in limits)
    if need > free:
        missing = MemoryRow("missing", need - free)
        raise DoesNotFit(
            f"{plan.model.name} does not fit into memory; nothing was read. {_nearest(plan, context, need, free)}\n"
            + _lines([*rows, MemoryRow("needed", need), *limits, missing]),
            need,
            free,
        )


def refuse_placement(plan: Plan, context: Context, limits: tuple[MemoryRow, ...], message: str) -> DoesNotFit:
    """Why the solver found no placement although the sum of all memories would do: the limits that it had to keep."""
    rows = memory_table(plan, context)
    need = sum(row.bytes for row in rows)
    why = "with these pins " if context.pins else ""
    return DoesNotFit(
        f"{plan.model.name} cannot be placed {why}within each device's memory ({message}); nothing was read. "
        f"{'Loosen a pin, or ' if context.pins else ''}{_nearest(plan, context, need, need - 1)}\n"
        + _lines([*rows, MemoryRow("needed", need), *limits]),
        need,
        sum(row.bytes for row in _limits(context)),
    )


def _limits(context: Context) -> tuple[MemoryRow, ...]:
    gpus = context.profile.gpus if context.use_gpus else ()
    cpu = MemoryRow(f"free on {context.profile.name}", context.profile.available_bytes())
    return (cpu, *(MemoryRow(f"free on gpu:{i}, {g.name}", gpu_limit(context, i)) for i, g in enumerate(gpus)))


def gpu_limit(context: Context, number: int) -> int:
    """Bytes of GPU ``number`` of the profile that a plan may use: what is free, at most the user's limit."""
    return usable_bytes(context.profile.gpus[number], number, context.vram)


def usable_bytes(gpu: Gpu, number: int, vram: int | tuple[int, ...] | None) -> int:
    """The same by the user's limits alone: one figure for each GPU, or one a GPU."""
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    if vram is None:
        return free
    return min(free, vram if isinstance(vram, int) else vram[number])


def _lines(rows: list[MemoryRow]) -> str:
    return "\n".join(f"  {row.what:<52} {row.bytes:>20,} bytes" for row in rows)


def _nearest(plan: Plan, context: Context, need: int, free: int) -> str:
    """The smallest changes with which the sum would fit: another format, a shorter context, more memory."""
    ways = []
    for form in (form for form in FORMATS if form not in TAKEN_OVER):
        size = _bytes_in(plan, context, form)
        if size < need and size <= free:
            ways.append(f"with --formats {form} ({size / 1e9:.1f} GB)")
            break
    cache, pool = cache_bytes(plan), KvPool.of(plan.max_dims())
    option, length = ("--context", pool.context) if pool.is_whole else ("--kv-tokens", pool.tokens)
    whole = length
    while length > 256 and cache:
        length //= 2
        if need - cache + cache * length // whole <= free:
            ways.append(f"with {option} {length}")
            break
    ways.append(f"with {(need - free) / 1e9:.1f} GB more memory")
    if not context.from_disk and need - expert_weight_bytes(plan, context) < free:
        ways.append("with experts read from the disk as they are chosen (--from-disk; hetcomp plan says how fast)")
    return f"It would fit {', or '.join(ways)}."


def _bytes_in(plan: Plan, context: Context, form: str) -> int:
    """Bytes of the plan with all packed matrices in ``form``."""
    size = sum(row.bytes for row in memory_table(plan, context))
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT and value.type.layout != ROW_MAJOR and value.format != form:
            size += context.target.packed_bytes(replace(value, format=form)) - context.target.packed_bytes(value)
    return size


def workspace_estimate(plan: Plan) -> int:
    """Upper bound of a step's activations: those of the largest template without sharing memory."""
    dims = plan.max_dims()
    sizes = [sum(v.type.bytes(dims) for v in t.values if v.kind is ValueKind.ACT) for t in plan.templates]
    handed = {v.type.bytes(dims) for v in plan.values if v.kind is ValueKind.ACT}
    return max(sizes, default=0) + 2 * max(handed, default=0)
