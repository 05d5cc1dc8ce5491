"""Which weights of a plan LoRA adapters may change at run time: those that ops multiply with, and read no other way."""

from __future__ import annotations

from hetcomp.ir.plan import Plan

# Operands that adapters may change: of experts two matrices, else one.
OPERANDS = {"linear": (1,), "head_linear": (1,), "moe_experts": (3, 4)}


def adaptable_weights(plan: Plan) -> set[str]:
    """Ids of the plan's values; a table of embeddings that is the output layer's matrix as well is none of them."""
    matrices: set[str] = set()
    others: set[str] = set()
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for operand, name in enumerate(op.inputs):
                if name in actual:
                    (matrices if operand in OPERANDS.get(op.kind, ()) else others).add(actual[name])
    return matrices - others
