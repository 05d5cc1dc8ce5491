"""A plan's ops in the order of a step, each call's by itself, with ids that are unique in the step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.ir.annotations import Placement
from hetcomp.ir.plan import Op, Plan, Value


@dataclass(frozen=True)
class FlatOp:
    """An op of call number ``call``. ``op`` names values of the step; ``id`` is the op's own in its template."""

    op: Op
    id: str
    call: int
    placement: Placement


def flat_ops(plan: Plan) -> tuple[tuple[FlatOp, ...], dict[str, Value]]:
    """The ops, and all values that they name: the plan's under their ids, those of a call under ``<call>.<id>``."""
    values = plan.value_map()
    found: list[FlatOp] = []
    for index, call in enumerate(plan.calls):
        template = plan.template(call.template)
        names = dict(zip(template.params, call.args, strict=True))
        names |= {f: a for f, a in zip(template.results, call.results, strict=True) if f not in names}
        for value in template.values:
            if value.id not in names:
                names[value.id] = f"{index}.{value.id}"
                values[names[value.id]] = replace(value, id=names[value.id])
        placements = dict(call.placements)
        for op in template.ops:
            renamed = replace(
                op,
                id=f"{index}.{op.id}",
                inputs=tuple(names[name] for name in op.inputs),
                outputs=tuple(names[name] for name in op.outputs),
                layer=call.layer,
            )
            found.append(FlatOp(renamed, op.id, index, placements[op.id]))
    return tuple(found), values
