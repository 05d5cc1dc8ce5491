"""Equal layers become one template, called once a layer with other weights and states.

``fold_layers`` and ``unfold_layers`` are inverse to each other on plans as lowered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hetcomp.frontend.plan_builder import assemble
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind

PROLOGUE, EPILOGUE = "prologue", "epilogue"


@dataclass(frozen=True)
class _Segment:
    """Ops of one layer, or a run of ops outside layers, with what goes in and out (ids of the plan)."""

    layer: int | None
    ops: tuple[Op, ...]
    params: tuple[str, ...]
    results: tuple[str, ...]


def fold_layers(plan: Plan, stored: Mapping[str, str] | None = None) -> Plan:
    """``plan`` (one template, one call) with a template for every kind of layer, and one each for what comes
    before and after them. Templates are named ``layer_0``, ``layer_1``, ... in the order of first use.

    stored: by id of a weight how the checkpoint stores it, where that matters; layers are equal only if theirs are
    stored alike."""
    (model,) = plan.templates
    values = model.value_map()
    segments = _segments(model)
    templates: dict[tuple[Template, tuple[str, ...]], str] = {}
    kinds = stored or {}
    calls: list[Call] = []
    layers = 0
    for index, segment in enumerate(segments):
        shape = _template(segment, values), tuple(kinds.get(param, "") for param in segment.params)
        if shape not in templates:
            if segment.layer is not None:
                name, layers = f"layer_{layers}", layers + 1
            else:
                name = PROLOGUE if index == 0 else EPILOGUE
                name = f"segment_{index}" if 0 < index < len(segments) - 1 else name
            templates[shape] = name
        calls.append(Call(templates[shape], segment.layer, segment.params, segment.results))
    used = dict.fromkeys(v for call in calls for v in (*call.args, *call.results))
    return replace(
        plan,
        values=tuple(values[v] for v in used),
        templates=tuple(replace(t, name=name) for (t, _), name in templates.items()),
        calls=tuple(calls),
    )


def _segments(model: Template) -> list[_Segment]:
    runs = [(layer, tuple(ops)) for layer, ops in itertools.groupby(model.ops, key=lambda op: op.layer)]
    readers: dict[str, set[int]] = {}
    for index, (_, ops) in enumerate(runs):
        for op in ops:
            for value in op.inputs:
                readers.setdefault(value, set()).add(index)
    out: list[_Segment] = []
    for index, (layer, ops) in enumerate(runs):
        made = dict.fromkeys(v for op in ops for v in op.outputs)
        params = dict.fromkeys(v for op in ops for v in op.inputs if v not in made)
        results = [v for v in made if v in model.results or readers.get(v, set()) - {index}]
        out.append(_Segment(layer, ops, tuple(params), tuple(results)))
    return out


def _starred(path: str, layer: int) -> str:
    """``path`` with the first component that is the layer's number replaced by ``*``."""
    parts = path.split(".")
    if str(layer) in parts:
        parts[parts.index(str(layer))] = "*"
    return ".".join(parts)


def _template(segment: _Segment, values: dict[str, Value]) -> Template:
    """The segment with names that are the same in every equal layer; its own name is empty."""
    layer = segment.layer
    prefix = "" if layer is None else f"l{layer}."
    local: dict[str, str] = {}
    acts = itertools.count()
    for value in segment.params:
        kind = values[value].kind
        if kind is ValueKind.ACT:
            local[value] = f"in{next(acts)}"
        elif kind is ValueKind.WEIGHT and layer is not None:
            local[value] = _starred(value, layer)
        else:
            local[value] = value.removeprefix(prefix)
    for op in segment.ops:
        for value in op.outputs:
            local[value] = value.removeprefix(prefix)
    ops = tuple(
        replace(
            op,
            id=op.id.removeprefix(prefix),
            inputs=tuple(local[v] for v in op.inputs),
            outputs=tuple(local[v] for v in op.outputs),
            layer=None,
            origin=op.origin if layer is None else _starred(op.origin, layer),
        )
        for op in segment.ops
    )
    own = tuple(_local_value(values[v], name, layer) for v, name in local.items())
    return Template("", own, ops, tuple(local[v] for v in segment.params), tuple(local[v] for v in segment.results))


def _local_value(value: Value, name: str, layer: int | None) -> Value:
    fqn = value.fqn
    if fqn is not None and layer is not None:
        fqn = _starred(fqn, layer).removeprefix(f"l{layer}.")
    return replace(value, id=name, fqn=fqn)


def unfold_layers(plan: Plan) -> Plan:
    """The plan with one template and one call that ``fold_layers`` came from."""
    values = plan.value_map()
    ops: list[Op] = []
    for call in plan.calls:
        template = plan.template(call.template)
        names = dict(zip(template.params, call.args, strict=True))
        names |= dict(zip(template.results, call.results, strict=True))
        prefix = "" if call.layer is None else f"l{call.layer}."
        for value in template.values:
            if value.id not in names:
                names[value.id] = prefix + value.id
                values[prefix + value.id] = replace(value, id=prefix + value.id)
        for op in template.ops:
            origin = op.origin if call.layer is None else op.origin.replace("*", str(call.layer), 1)
            ops.append(
                replace(
                    op,
                    id=prefix + op.id,
                    inputs=tuple(names[v] for v in op.inputs),
                    outputs=tuple(names[v] for v in op.outputs),
                    layer=call.layer,
                    origin=origin,
                )
            )
    return assemble(ops, values, plan.model, plan.dims)
