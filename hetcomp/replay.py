"""Compiles from a stored plan instead of deciding anew: ``hetcomp compile --plan plan.json``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import Placement
from hetcomp.ir.cpu_side import CpuRole, cpu_templates
from hetcomp.ir.node_parts import plan_parts
from hetcomp.ir.plan import Call, Op, Plan, Template, ValueKind
from hetcomp.ir.serialise import read_plan
from hetcomp.ir.verifier import verify
from hetcomp.passes.attach_lora import attach_lora
from hetcomp.passes.bind_weights import bind_weights
from hetcomp.passes.context import FORMATS, KV_FORMATS, Context
from hetcomp.passes.memory_table import refuse_if_too_large
from hetcomp.passes.plan_memory import op_workspace


def replay(path: Path, imported: Plan, context: Context) -> Plan:
    """The plan in ``path`` with its weights bound to the checkpoint: every decision in it (formats, placements, slices,
    order, memory) is kept as it stands, edited by hand or not.

    imported: the same model as traced now. Raises HetcompError, naming the place, if the file is not a finished plan of
    this model, breaks an invariant, or asks for what cannot be generated.
    """
    plan = read_plan(path)
    if "simulated" not in plan.established:
        last = plan.established[-1] if plan.established else "nothing"
        raise HetcompError(f"{path} is no finished plan (it ends at {last}); write one with hetcomp plan --plan-out.")
    _same_model(path, plan, imported)
    _can_be_generated(path, plan, context)
    try:
        verify(plan)
    except HetcompError as error:
        raise HetcompError(f"{path}: {error}") from None
    if plan.adapters != context.adapters:
        names = " and ".join(", ".join(a.name for a in p.adapters) or "none" for p in (plan, context))
        raise HetcompError(f"{path} is a plan with other adapters than those given ({names}); plan the model again.")
    if context.adapter_room is not None:
        raise HetcompError(
            f"{path} says what room there is for adapters; leave --adapters out, or plan the model again."
        )
    context = replace(context, adapter_room=plan.adapter_room)
    bound = attach_lora(bind_weights(_unbound(plan), context), context)
    refuse_if_too_large(bound, context)
    return bound


def _unbound(plan: Plan) -> Plan:
    notes = tuple(n for n in plan.notes if not n.startswith("no checkpoint"))
    return replace(plan, values=tuple(replace(v, source=None) for v in plan.values), notes=notes)


def _same_model(path: Path, plan: Plan, imported: Plan) -> None:
    if plan.model.config_sha256 != imported.model.config_sha256:
        raise HetcompError(
            f"{path} is a plan of {plan.model.name} ({plan.model.architecture}), not of {imported.model.name} "
            f"({imported.model.architecture}) with this config; plan the model again."
        )
    mine = imported.value_map()
    # Other activations than the model's are copies of them on GPUs (insert_transfers).
    theirs = {v.id: v for v in plan.values if v.id in mine or v.kind is not ValueKind.ACT}
    if missing := sorted(set(mine) ^ set(theirs)):
        raise HetcompError(f"{path}: values.{missing[0]} is not in both the plan and the model.")
    for name, value in theirs.items():
        if value.kind is not mine[name].kind or value.type.shape != mine[name].type.shape:
            raise HetcompError(
                f"{path}: values.{name} is {value.kind} {list(value.type.shape)}, the model's is {mine[name].kind} "
                f"{list(mine[name].type.shape)}."
            )
    if len(plan.calls) != len(imported.calls):
        raise HetcompError(f"{path}: calls has {len(plan.calls)} entries, the model needs {len(imported.calls)}.")
    for index, (call, own) in enumerate(zip(plan.calls, imported.calls, strict=True)):
        _same_ops(path, f"calls.{index}", plan, call, imported.template(own.template))


def _same_ops(path: Path, where: str, plan: Plan, call: Call, own: Template) -> None:
    try:
        template = plan.template(call.template)
    except KeyError:
        raise HetcompError(f"{path}: {where}.template {call.template} is not among the templates.") from None
    wanted = {op.id: op for op in own.ops}
    for op in template.ops:
        if op.kind == "transfer":
            continue
        twin = wanted.pop(op.id, None)
        # The copy of a result that a transfer then hands out (insert_transfers).
        outputs = tuple(name.removesuffix(".local") for name in op.outputs)
        if twin is None or twin.attrs != op.attrs or twin.outputs != outputs:
            raise HetcompError(f"{path}: op {op.id} of template {template.name} ({where}) is not the model's.")
    if wanted:
        raise HetcompError(f"{path}: template {template.name} ({where}) lacks the model's op {next(iter(wanted))}.")


def _can_be_generated(path: Path, plan: Plan, context: Context) -> None:
    devices = [p.device for call in plan.calls for _, p in call.placements]
    main = next((device for device in devices if device.startswith("cpu:")), "cpu:0")
    for index, call in enumerate(plan.calls):
        template = plan.template(call.template)
        for op, placement in call.placements:
            where = f"{path}: calls.{index}.placements.{op}"
            node = next(o for o in template.ops if o.id == op)
            _placement_can_be_generated(where, node, template, placement, main, context)
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT and value.format not in FORMATS:
            raise HetcompError(
                f"{path}: values.{value.id} has format {value.format}; there are kernels for {', '.join(FORMATS)}."
            )
        cache = value.kind is ValueKind.STATE and value.type.is_cache
        if cache and value.type.dtype not in KV_FORMATS:
            raise HetcompError(
                f"{path}: values.{value.id} is a KV cache in {value.type.dtype}; there are kernels for "
                f"{', '.join(KV_FORMATS)}."
            )
    dims, parts = plan.max_dims(), plan_parts(plan)
    for side in cpu_templates(plan).values():
        template = side.template
        slots = {slot.value: slot.bytes for slot in plan.template(template.name).arena}
        for node in template.ops:
            if side.roles[node.id] not in (CpuRole.COMPUTE, CpuRole.EXPERTS):
                continue
            needed = op_workspace(node, template, parts.get((template.name, node.id), ()), dims, context.target)
            if needed > slots.get(f"workspace:{node.id}", 0):
                raise HetcompError(
                    f"{path}: templates.{template.name}.arena gives op {node.id} "
                    f"{slots.get(f'workspace:{node.id}', 0)} bytes of workspace, its kernel needs {needed}; plan again "
                    "for these instruction sets."
                )


def _placement_can_be_generated(
    where: str, op: Op, template: Template, placement: Placement, main: str, context: Context
) -> None:
    nodes = {f"cpu:{node.id}" for node in context.profile.compute_nodes}
    gpus = {f"gpu:{i}" for i in range(len(context.profile.gpus))} if context.use_gpus else set()
    devices = {placement.device, *(run.device for run in placement.experts)}
    devices |= {f"cpu:{piece.node}" for piece in placement.slices}
    for device in sorted(devices - nodes - gpus):
        have = "" if device.startswith("cpu:") else f" in profile {context.profile.name}; plan with --vram 0, or for it"
        raise HetcompError(f"{where} is on {device}, which does not exist{have}.")
    if placement.streamed or any(run.streamed_to for run in placement.experts):
        raise HetcompError(f"{where} streams weights to a GPU, for which no code is generated; place them for good.")
    if placement.device.startswith("cpu:") and placement.device != main:
        raise HetcompError(
            f"{where} is on {placement.device}, other ops on {main}: only slices and experts can be on nodes of their "
            "own."
        )
    away = sorted({r.device for r in placement.experts if r.device.startswith("gpu:")} - {placement.device})
    if away:
        raise HetcompError(f"{where} has experts on {away[0]}, but its input on {placement.device}; put both there.")
    refusal = context.target.gpu_refusal(op, template) if placement.device in gpus else None
    if refusal is not None:
        raise HetcompError(f"{where} is on {placement.device}, but {refusal}")
