"""Decides the stored format and layout of every weight, and the element type of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetcomp.errors import HetcompError
from hetcomp.ir.native_format import native_format
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind
from hetcomp.ir.types import DType
from hetcomp.passes.context import TAKEN_OVER, Context, Role
from hetcomp.passes.registry import plan_pass

ROW_MAJOR = "row_major"


def weight_role(op: Op) -> Role:
    """The role under which users choose the format of the op's weights."""
    if op.kind == "moe_experts":
        return "experts"
    if op.kind == "embed" or op.role == "lm_head":
        return "embedding"
    # The gates a and b of a delta rule are as small as routers (0.4 % of such a layer's attention in Qwen3-Next), and
    # their errors last: a decides how fast the state of all tokens so far decays.
    if op.role in ("moe.router", "attn.a", "attn.b"):
        return "router"
    return "attention" if op.kind == "head_linear" or op.role.startswith("attn") else "dense"


@plan_pass(requires=("weights_bound",), establishes=("formats_chosen",))
def choose_formats(plan: Plan, context: Context) -> Plan:
    """Sets format and layout of weights (in the plan's values and in the templates' params alike).

    ``auto`` keeps what the checkpoint has: bf16 stays bf16 (nothing is lost), f32 and f16 become f32 if all of
    it fits into 80 % of the free memory and bf16 otherwise, with a note; what is quantised is taken over in the format
    that holds it (see hetcomp.ir.native_format). Without a checkpoint auto is bf16.
    Where memory wants coarser formats than these, or the user allowed several, format_search decides which request
    comes here. Columns that a checkpoint has in the order of activations keep it in its own format alone.
    One-dimensional weights stay f32 row-major. The KV cache is f32 if attention is, else bf16.
    Raises HetcompError if two ops want one weight in different formats, or a weight is to have a format that the
    checkpoint does not have it in and that none is converted to.
    """
    chosen: dict[str, tuple[str, str]] = {}
    templates = {t.name: t for t in plan.templates}
    values = plan.value_map()
    fallback, notes = _auto_format(plan, context)
    for call in plan.calls:
        template = templates[call.template]
        actual = dict(zip(template.params, call.args, strict=True))
        for op, operand, formal in _weight_operands(template):
            layout = context.target.weight_layout(op, operand, False)
            if layout == ROW_MAJOR:
                form = "f32"
            else:
                weight, ordered = values[actual[formal]], context.target.weight_layout(op, operand, True)
                form = _format(weight, ordered, weight_role(op), context) or fallback
                if _keeps_order(weight, ordered, form):
                    layout = ordered
            earlier = chosen.setdefault(actual[formal], (form, layout))
            if earlier != (form, layout):
                raise HetcompError(
                    f"The weight {actual[formal]} is used in format {earlier[0]} ({earlier[1]}) and, by {op.origin}, "
                    f"in {form} ({layout}); ask for one format for both uses."
                )
    kv = context.formats.of("kv")
    if kv == "auto":
        attention = context.formats.of("attention")
        kv = "f32" if (fallback if attention == "auto" else attention) == "f32" else "bf16"
    return replace(_apply(plan, chosen, DType(kv)), notes=(*plan.notes, *notes))


def _format(weight: Value, layout: str, role: Role, context: Context) -> str | None:
    """None: what ``auto`` is for unquantised weights."""
    native = native_format(weight, layout)
    if native is None:
        wanted = context.formats.of(role)
    else:
        wanted = context.formats.of_quantised(role, native.format)
    if wanted in TAKEN_OVER and (native is None or native.format != wanted):
        stored = "is not quantised" if native is None else f"is stored as {native.label}"
        raise HetcompError(
            f"Weights are not converted to {wanted}, and {weight.fqn or weight.id} {stored}; give auto or another "
            f"format for {role}."
        )
    return None if wanted == "auto" else wanted


def _keeps_order(weight: Value, layout: str, form: str) -> bool:
    """Whether the weight is taken over in the order of columns that the checkpoint's groups give it."""
    native = native_format(weight, layout)
    return native is not None and native.act_order and native.format == form


def _weight_operands(template: Template) -> Iterator[tuple[Op, int, str]]:
    values = template.value_map()
    for op in template.ops:
        for i, name in enumerate(op.inputs):
            if values[name].kind in (ValueKind.WEIGHT, ValueKind.CONST):
                yield op, i, name


def _auto_format(plan: Plan, context: Context) -> tuple[str, tuple[str, ...]]:
    tensors = [t for v in plan.values if v.source is not None for t in v.source.tensors]
    sources = {t.dtype for t in tensors if len(t.shape) > 1 and t.quantised is None}
    if not sources or sources <= {"BF16", "bf16"}:
        return "bf16", ()
    quantised = {v.id for v in plan.values if v.source is not None and v.source.tensors[0].quantised is not None}
    needed = sum(4 * v.type.numel({}) for v in plan.values if v.kind is ValueKind.WEIGHT and v.id not in quantised)
    free = 0.8 * context.profile.available_bytes()
    if needed <= free:
        return "f32", ()
    note = (
        f"formats auto: the checkpoint's {', '.join(sorted(sources))} weights need {needed / 1e9:.1f} GB as f32, "
        f"80 % of the free memory is {free / 1e9:.1f} GB; they are rounded to bf16"
    )
    return "bf16", (note,)


def _apply(plan: Plan, chosen: dict[str, tuple[str, str]], kv: DType) -> Plan:
    def formatted(value: Value, key: str) -> Value:
        if key in chosen:
            form, layout = chosen[key]
            return replace(value, format=form, type=replace(value.type, layout=layout))
        if value.kind is ValueKind.STATE and value.type.is_cache:
            return replace(value, type=replace(value.type, dtype=kv))
        return value

    first: dict[str, dict[str, str]] = {}
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        known = first.setdefault(call.template, actual)
        for formal, value in actual.items():
            if chosen.get(value) != chosen.get(known[formal]):
                raise HetcompError(
                    f"Layer {call.layer} wants {value} in another format than the layers it shares code with; "
                    "give one format a role."
                )
    templates = {
        t.name: replace(t, values=tuple(formatted(v, first.get(t.name, {}).get(v.id, "")) for v in t.values))
        for t in plan.templates
    }
    return replace(plan.map_templates(templates), values=tuple(formatted(v, v.id) for v in plan.values))
