"""Inserts a transfer wherever an op reads what another memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.ir import ops
from hetcomp.ir.annotations import Placement
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.node_parts import NodePart, node_parts
from hetcomp.ir.plan import Call, Op, Plan, Template, Value, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.registry import plan_pass

Devices = tuple[str, ...]
Parts = tuple[tuple[NodePart, ...], ...]
Kept = tuple[tuple[str, str], ...]  # values and the memories in which later calls read the copies made of them
Pattern = tuple[Devices, Devices, Devices, Devices, Parts, Kept]
Inserted = dict[str, dict[str, Placement]]


@plan_pass(requires=("sliced",), establishes=("transfers_inserted",))
def insert_transfers(plan: Plan, context: Context) -> Plan:
    """Gives every placement pattern of a template a template of its own and inserts transfers into it.

    A value handed between calls stays in the memory of the op that wrote it; the next call's template moves it where
    its readers need it elsewhere. A copy on a GPU serves the later calls that read the value there (rope tables), one
    on the CPU only its call, for it lies in a buffer of its hand-over. Inputs (ids, positions) lie in host memory that
    every device reads. The experts of one op that live on other devices get their input and return their sum within
    the op. Where all ops share one memory, and every call of a template is cut over NUMA nodes alike, nothing changes.

    Ops that a GPU runs in some prompts (``in_prompts``) read the CPU's values as in other steps; of those that the CPU
    makes in prompts, too, it gets copies. Transfers between ends that are both on that GPU then say so.
    """
    patterns: dict[str, dict[Pattern, str]] = defaultdict(dict)
    home = {v.id: CPU for v in plan.values}
    in_prompts = dict(home)
    readers = [_reading_memories(plan, call) for call in plan.calls]
    last_read = {key: i for i, found in enumerate(readers) for key in found.items()}
    copies: dict[tuple[str, str], str] = {}
    made: list[Value] = []
    calls = []
    for i, original in enumerate(plan.calls):
        call = _with_copies(original, readers[i], copies)
        template = plan.template(call.template)
        devices = tuple(memory_of(p.device) for _, p in call.placements)
        moved = tuple(p.in_prompts or memory_of(p.device) for _, p in call.placements)
        inputs, prompt_inputs = tuple(home[a] for a in call.args), tuple(in_prompts[a] for a in call.args)
        placements = dict(call.placements)
        parts = tuple(node_parts(op, placements[op.id]) for op in template.ops)
        kept = _kept(template, call, {a: m for a, m in readers[i].items() if last_read[a, m] > i}, home)
        names = patterns[call.template]
        name = names.setdefault(
            (devices, moved, inputs, prompt_inputs, parts, kept),
            call.template if not names else f"{call.template}_{len(names)}",
        )
        for homes, memories in ((home, devices), (in_prompts, moved)):
            written = {out: memory for op, memory in zip(template.ops, memories, strict=True) for out in op.outputs}
            for formal, actual in zip(template.results, call.results, strict=True):
                kind = template.value(formal).kind
                homes[actual] = CPU if kind is ValueKind.OUTPUT else written.get(formal, homes.get(actual, CPU))
        actuals = dict(zip(template.params, call.args, strict=True))
        for formal, memory in kept:
            copy = replace(plan.value_map()[actuals[formal]], id=_copy_id(actuals[formal], memory))
            copies[actuals[formal], memory], home[copy.id], in_prompts[copy.id] = copy.id, memory, memory
            made.append(copy)
        results = tuple(copies[actuals[formal], memory] for formal, memory in kept)
        calls.append(replace(call, template=name, results=(*call.results, *results)))
    templates, inserted = _by_pattern(plan, patterns)
    return replace(
        plan,
        values=(*plan.values, *made),
        templates=templates,
        calls=tuple(_place_transfers(c, inserted[c.template]) for c in calls),
    )


def _by_pattern(plan: Plan, patterns: Mapping[str, Mapping[Pattern, str]]) -> tuple[tuple[Template, ...], Inserted]:
    """The templates of all patterns, with their transfers, and by template the memory that each of these writes to."""
    templates: list[Template] = []
    inserted: Inserted = {}
    for template in plan.templates:
        for (devices, moved, inputs, prompt_inputs, _, kept), name in patterns[template.name].items():
            ids = [op.id for op in template.ops]
            usual = _Homes(dict(zip(ids, devices, strict=True)), dict(zip(template.params, inputs, strict=True)))
            prompts = _Homes(dict(zip(ids, moved, strict=True)), dict(zip(template.params, prompt_inputs, strict=True)))
            done, inserted[name] = _insert(replace(template, name=name), usual, prompts)
            results = tuple(_copy_id(formal, memory) for formal, memory in kept)
            templates.append(replace(done, results=(*done.results, *results)))
    return tuple(templates), inserted


def _copy_id(name: str, memory: str) -> str:
    return f"{name}.{memory.replace(':', '')}"


def _reading_memories(plan: Plan, call: Call) -> dict[str, str]:
    """By value of the plan that ops of the call read, all of them in one memory: which."""
    template, placements = plan.template(call.template), dict(call.placements)
    found: dict[str, set[str]] = defaultdict(set)
    for op in template.ops:
        for name in op.inputs:
            found[name].add(memory_of(placements[op.id].device))
    actuals = zip(template.params, call.args, strict=True)
    return {actual: min(found[formal]) for formal, actual in actuals if len(found[formal]) == 1}


def _kept(template: Template, call: Call, readers: Mapping[str, str], home: Mapping[str, str]) -> Kept:
    """Values whose copies on GPUs later calls read. ``readers``: memories in which they read the call's arguments."""
    values = template.value_map()
    return tuple(
        (formal, readers[actual])
        for formal, actual in zip(template.params, call.args, strict=True)
        if readers.get(actual, CPU) not in (CPU, home[actual]) and values[formal].kind is ValueKind.ACT
    )


def _with_copies(call: Call, readers: Mapping[str, str], copies: Mapping[tuple[str, str], str]) -> Call:
    """The call with copies that earlier calls have made in the memory where it reads a value."""
    return replace(call, args=tuple(copies.get((a, readers.get(a, "")), a) for a in call.args))


@dataclass(frozen=True)
class _Homes:
    """The memory of each op of a template, and of its params."""

    ops: Mapping[str, str]
    params: Mapping[str, str]


def _insert(template: Template, usual: _Homes, prompts: _Homes) -> tuple[Template, dict[str, Placement]]:
    """The template with transfers, and where each of these writes to; ``prompts``: where everything is in steps that
    stream weights."""
    values = template.value_map()
    home = {v.id: usual.params.get(v.id, CPU) for v in template.values}
    in_prompts = {v.id: prompts.params.get(v.id, CPU) for v in template.values}
    copies: dict[tuple[str, str], str] = {}
    new_values: list[Value] = []
    new_ops: list[Op] = []
    inserted: dict[str, str] = {}

    def move(name: str, target: str, reader: Op) -> str:
        if (name, target) not in copies:
            copy = replace(values[name], id=_copy_id(name, target), kind=ValueKind.ACT)
            op = Op(
                id=f"{copy.id}.transfer",
                attrs=ops.Transfer(home[name], target),
                inputs=(name,),
                outputs=(copy.id,),
                layer=reader.layer,
                role="transfer",
                origin=reader.origin,
            )
            new_values.append(copy)
            new_ops.append(op)
            inserted[op.id] = target
            copies[name, target] = copy.id
        return copies[name, target]

    for op in template.ops:
        target, prompt_target = usual.ops[op.id], prompts.ops[op.id]
        acts = [n for n in op.inputs if values[n].kind is ValueKind.ACT]
        for name in acts:
            if prompt_target not in (home[name], in_prompts[name]):
                move(name, prompt_target, op)
        inputs = tuple(move(n, target, op) if n in acts and home[n] != target else n for n in op.inputs)
        new_ops.append(replace(op, inputs=inputs))
        for name in op.outputs:
            home[name], in_prompts[name] = target, prompt_target
    for name in template.results:
        if home[name] != CPU and values[name].kind is ValueKind.OUTPUT:
            # The result is written by its transfer under the old name; the op writes to the device's copy.
            _return_result(name, home[name], template, new_ops, new_values, inserted)
    placed = {
        op.id: Placement("cpu:0" if inserted[op.id] == CPU else inserted[op.id], in_prompts=needless)
        for op in new_ops
        if op.id in inserted
        for needless in (_needless(op, new_ops, in_prompts, prompts),)
    }
    return replace(template, values=(*template.values, *new_values), ops=tuple(new_ops)), placed


def _needless(transfer: Op, all_ops: Sequence[Op], in_prompts: Mapping[str, str], prompts: _Homes) -> str:
    """The GPU that both has what is transferred and runs all that reads it, in steps that stream weights; empty:
    none."""
    assert isinstance(transfer.attrs, ops.Transfer)
    (name,), (copy,) = transfer.inputs, transfer.outputs
    source = in_prompts.get(name, transfer.attrs.source)
    readers = {prompts.ops[op.id] for op in all_ops if copy in op.inputs}
    if transfer.attrs.target != CPU:  # whoever reads it reads it there
        readers = {transfer.attrs.target}
    return source if source != CPU and readers == {source} else ""


def _return_result(
    name: str,
    device: str,
    template: Template,
    new_ops: list[Op],
    new_values: list[Value],
    inserted: dict[str, str],
) -> None:
    local = f"{name}.local"
    new_values.append(replace(template.value(name), id=local, kind=ValueKind.ACT))
    for i, op in enumerate(new_ops):
        rename = {name: local}
        new_ops[i] = replace(
            op,
            inputs=tuple(rename.get(n, n) for n in op.inputs),
            outputs=tuple(rename.get(n, n) for n in op.outputs),
        )
    op = Op(f"{name}.transfer", ops.Transfer(device, "cpu"), (local,), (name,), role="transfer")
    new_ops.append(op)
    inserted[op.id] = "cpu"


def _place_transfers(call: Call, inserted: Mapping[str, Placement]) -> Call:
    return replace(call, placements=(*call.placements, *inserted.items()))
