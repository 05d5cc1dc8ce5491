"""What a plan needs of the machine's memory, and the refusal when it is not there."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.passes.choose_formats import weight_role
from hetcomp.passes.context import Context


@dataclass(frozen=True)
class MemoryRow:
    """One line of the byte table."""

    what: str
    bytes: int


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
    dims = plan.max_dims()
    cache = sum(v.type.bytes(dims) for v in plan.values if v.kind is ValueKind.STATE)
    rows[f"KV cache, {dims['slots']} x {dims['context']} positions"] = cache
    if plan.arena_bytes:
        rows[f"activations, {dims['T']} tokens a step"] = plan.arena_bytes
    return tuple(MemoryRow(what, size) for what, size in rows.items())


def refuse_if_too_large(plan: Plan, context: Context) -> None:
    """Raises HetcompError with the byte table if the plan needs more memory than the profile says is free."""
    rows = memory_table(plan, context)
    need = sum(row.bytes for row in rows)
    free = context.profile.available_bytes()
    if need <= free:
        return
    lines = [f"  {row.what:<44} {row.bytes:>18,} bytes" for row in (*rows, MemoryRow("needed", need))]
    lines.append(f"  {'free on ' + context.profile.name:<44} {free:>18,} bytes")
    lines.append(f"  {'missing':<44} {need - free:>18,} bytes")
    raise HetcompError(
        f"{plan.model.name} does not fit into memory; nothing was read. Use a shorter --context, a smaller --batch, "
        "or --formats bf16:\n" + "\n".join(lines)
    )
