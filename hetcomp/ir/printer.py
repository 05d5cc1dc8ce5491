"""The Plan as text for people: one op a line. Stable, so that tests and diffs can use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields

from hetcomp.ir.annotations import AttachedAdapter
from hetcomp.ir.ops import Aten, AtenArg, AtenRef
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind


def print_plan(plan: Plan) -> str:
    """The whole plan: model, dimensions, templates with their ops, calls, memory, predictions, notes."""
    return "\n".join(_lines(plan)) + "\n"


def print_template(template: Template) -> str:
    """One template."""
    return "\n".join(_template(template)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    m = plan.model
    yield f"plan {m.name} ({m.architecture}, {m.layers} layers, vocabulary {m.vocab})"
    yield "  dims " + ", ".join(f"{d.name} {d.min}..{d.max}" for d in plan.dims)
    if plan.established:
        yield "  established " + ", ".join(plan.established)
    yield from _memory(plan)
    yield from _moving_experts(plan)
    for adapter in plan.adapters:
        yield f"  {adapter_line(adapter)}"
    for template in plan.templates:
        yield ""
        yield from _template(template)
    yield ""
    yield f"values ({len(plan.values)})"
    for value in plan.values:
        yield "  " + _value(value)
    yield ""
    yield f"calls ({len(plan.calls)})"
    for call in plan.calls:
        yield from _call(call)
    for t in plan.timelines:
        yield ""
        yield (
            f"predicted {t.phase}: {t.tokens} tokens in {t.total_us / 1000:.3f} ms = {t.tokens_per_s:.1f} tokens/s; "
            + ", ".join(f"{lane.lane} busy {lane.busy_us / max(t.total_us, 1e-9):.0%}" for lane in t.lanes)
        )
        yield "  " + ", ".join(f"{role} {us / 1000:.3f} ms" for role, us in t.roles)
    if (d := plan.deferral) is not None:
        yield ""
        yield (
            f"deferral on {d.tokens} tokens of {d.text}: KL {d.kl:.3g} nats a token, "
            f"perplexity {d.perplexity:.4g} instead of {d.undeferred_perplexity:.4g}"
        )
    for note in plan.notes:
        yield f"note {note}"


def adapter_line(adapter: AttachedAdapter) -> str:
    """One line on an adapter: name, content, and what it changes."""
    kinds = Counter(f"{t.fqn.removesuffix('.weight').rpartition('.')[2]} (rank {t.rank})" for t in adapter.targets)
    changed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    merged = "merged into" if adapter.merged else "beside"
    return f"adapter {adapter.name} (sha256 {adapter.sha256[:16]}) {merged} {len(adapter.targets)} weights: {changed}"


def _memory(plan: Plan) -> Iterator[str]:
    if plan.arena_bytes:
        yield f"  arena {plan.arena_bytes} bytes"
        for slot in plan.call_arena:
            yield f"    {slot.value} @{slot.offset}+{slot.bytes}"


def _moving_experts(plan: Plan) -> Iterator[str]:
    if plan.disk is not None:
        yield f"  experts from the disk: {plan.disk.bytes} bytes, memory for {plan.disk.room}"
    if plan.stream is not None:
        yield f"  experts streamed to the GPU in prefill, {plan.stream.slots} of a layer at once"
    if plan.weight_stream is not None:
        w = plan.weight_stream
        yield (
            f"  weights streamed to {', '.join(w.gpus)} in prompts of {w.tokens} tokens and more: {w.bytes} bytes "
            f"through {w.ring_bytes}"
        )
    if plan.expert_cache is not None:
        yield f"  expert cache {plan.expert_cache.policy} of {len(plan.expert_cache.first)} layers"
        for c in plan.expert_cache.gpus:
            yield f"    {c.gpu}: {c.slots} slots a layer, {c.bytes} bytes; {c.bytes_per_step} bytes may change a step"


def _template(template: Template) -> Iterator[str]:
    yield f"template {template.name}({', '.join(template.params)}) -> {', '.join(template.results)}"
    values = template.value_map()
    offsets = {slot.value: slot for slot in template.arena}
    for op in template.ops:
        yield "  " + _op(op, values)
        for name in (*op.outputs, f"workspace:{op.id}"):
            if name in offsets:
                slot = offsets[name]
                yield f"      {name} @{slot.offset}+{slot.bytes}"
        if op.cost is not None:
            for p in op.cost.phases:
                yield (
                    f"      {p.phase} T={p.tokens}: {p.flops / 1e6:.3f} MFLOP, {p.weight_bytes / 1e6:.3f} MB weights, "
                    f"{p.intensity:.2f} FLOP/B, {p.us:.2f} us ({p.bound})"
                )


def _op(op: Op, values: dict[str, Value]) -> str:
    results = ", ".join(f"{o}: {values[o].type}" for o in op.outputs)
    schedule = ""
    if op.schedule is not None:
        schedule = f"  | {op.schedule.lane} #{op.schedule.index}{' barrier' if op.schedule.barrier_before else ''}"
    where = f"  # {op.role}" + (f" {op.origin}" if op.origin else "")
    layer = "" if op.layer is None else f" [layer {op.layer}]"
    arrow = f"{results} = " if results else ""
    return f"%{op.id} {arrow}{op.kind}({', '.join(op.inputs)}){_attrs(op)}{schedule}{where}{layer}"


def _attrs(op: Op) -> str:
    if isinstance(op.attrs, Aten):
        return " {" + "; ".join(_aten(op.attrs)) + "}"
    shown = []
    for f in fields(op.attrs):
        value = getattr(op.attrs, f.name)
        if f.name != "kind" and (f.default is MISSING or value != f.default):
            shown.append(f"{f.name}={value}")
    return " {" + ", ".join(shown) + "}" if shown else ""


def _aten(attrs: Aten) -> Iterator[str]:
    for i, node in enumerate(attrs.nodes):
        args = [_aten_arg(a) for a in node.args] + [f"{k}={_aten_arg(v)}" for k, v in node.kwargs]
        yield f"${i} = {node.target}({', '.join(args)}): {node.dtype}{list(node.shape)}"


def _aten_arg(arg: AtenArg) -> str:
    if isinstance(arg, AtenRef):
        return f"in{arg.index}" if arg.source == "input" else f"${arg.index}"
    if isinstance(arg, tuple):
        return "[" + ", ".join(_aten_arg(a) for a in arg) + "]"
    return repr(arg)


def _value(value: Value) -> str:
    parts = [f"{value.id}: {value.kind} {value.type}"]
    if value.format:
        parts.append(f"as {value.format}")
    if value.fqn:
        parts.append(f"= {value.fqn}")
    if value.source is not None:
        names = [t.name for t in value.source.tensors]
        many = f" .. {names[-1]} ({len(names)})" if len(names) > 1 else ""
        parts.append(f"<- {value.source.recipe} {names[0] if names else ''}{many}")
    if value.kind is ValueKind.CONST and value.data is not None:
        parts.append(f"{len(value.data)} numbers")
    return " ".join(parts)


def _call(call: Call) -> Iterator[str]:
    layer = "" if call.layer is None else f" layer {call.layer}"
    yield f"  {call.template}{layer}({', '.join(call.args)}) -> {', '.join(call.results)}"
    devices = {p.device for _, p in call.placements}
    if devices:
        yield "    on " + ", ".join(sorted(devices))
    for op, p in call.placements:
        if p.experts:
            ranges = ", ".join(f"{e.first}..{e.last} {e.device}" for e in p.experts)
            deferred = f", {p.deferred} of a token deferred" if p.deferred else ""
            yield f"    %{op} experts {ranges}{deferred}"
        if len(p.slices) > 1:
            yield f"    %{op} slices " + ", ".join(f"node {s.node} {s.start}..{s.stop}" for s in p.slices)
