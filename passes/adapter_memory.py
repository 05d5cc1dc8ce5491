"""Memory for the pairs of LoRA adapters that come at run time."""

from __future__ import annotations

from hetcomp.ir.adaptable import adaptable_weights
from hetcomp.ir.expert_matrices import expert_matrices
from hetcomp.ir.homes import read_in
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context


def pair_bytes(plan: Plan, context: Context) -> dict[str, int]:
    """By id of a weight that adapters may change: what the pairs of as many adapters take as the user wants room for;
    empty: for none."""
    room = context.adapter_room
    if room is None:
        return {}
    ids = adaptable_weights(plan)
    return {v.id: room.count * context.target.pair_bytes(v, room.rank) for v in plan.values if v.id in ids}


def pair_bytes_on(plan: Plan, context: Context, gpu: str) -> int:
    """What they take of a GPU of a placed plan: of weights that it has whole, and of all experts whose input it makes,
    wherever these are."""
    sizes = pair_bytes(plan, context)
    if not sizes:
        return 0
    readers, experts = read_in(plan), expert_matrices(plan)
    held = {id for id in sizes if gpu in readers[id] and id not in experts}
    if context.adapter_room is not None and context.adapter_room.experts:
        for call in plan.calls:
            template, placements = plan.template(call.template), dict(call.placements)
            actual = dict(zip(template.params, call.args, strict=True))
            for op in template.ops:
                if isinstance(op.attrs, MoeExperts) and placements[op.id].device == gpu:
                    held |= {actual[name] for name in op.inputs[3:5]}
    return sum(sizes[id] for id in held)
