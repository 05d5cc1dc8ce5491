"""Which weights of a plan are the matrices of routed experts."""

from __future__ import annotations

from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Plan


def expert_matrices(plan: Plan) -> set[str]:
    """Ids of the weights that hold gate and up, and down, of all experts of a layer."""
    found: set[str] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            if isinstance(op.attrs, MoeExperts):
                found |= {actual[name] for name in op.inputs[3:5]}
    return found
