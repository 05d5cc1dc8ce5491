"""Decides for every op, and for every single expert, the device it lives and runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hetcomp.ir import ops
from hetcomp.ir.annotations import ExpertPlacement, Placement
from hetcomp.ir.plan import Call, Op, Plan, ValueKind
from hetcomp.passes.context import Context
from hetcomp.passes.memory_table import refuse_if_too_large
from hetcomp.passes.registry import plan_pass


@dataclass
class Device:
    """A candidate: its memory left for weights and states, and its speed relative to the profile's CPU."""

    name: str
    free_bytes: float
    speed: float


@plan_pass(requires=("costed",), establishes=("placed",))
def place(plan: Plan, context: Context) -> Plan:
    """Sets ``placements`` of every call.

    Every op goes to the device that finishes it first among those with room for its weights and states; experts
    are split over the devices by the same rule, one by one. Candidates are the profile's NUMA nodes. GPUs of the
    profile are named in a note: code for them cannot be generated yet.
    Raises HetcompError with a byte table if the plan does not fit into the memory of all devices together.
    """
    refuse_if_too_large(plan, context)
    devices = [
        Device(f"cpu:{node.id}", float(node.available_bytes), context.profile.bandwidth(node.id))
        for node in context.profile.compute_nodes
    ]
    notes = tuple(
        f"GPU {gpu.name} is not used: this version generates code for CPUs only" for gpu in context.profile.gpus
    )
    resident: set[str] = set()
    calls = tuple(_place_call(plan, call, devices, resident, context) for call in plan.calls)
    return replace(plan, calls=calls, notes=(*plan.notes, *notes))


def _place_call(plan: Plan, call: Call, devices: list[Device], resident: set[str], context: Context) -> Call:
    template = plan.template(call.template)
    placements = []
    for op in template.ops:
        need = _new_bytes(plan, call, op, resident, context)
        if isinstance(op.attrs, ops.MoeExperts) and len(devices) > 1:
            experts = _place_experts(op.attrs.experts, need, devices)
            placements.append((op.id, Placement(experts[0].device, experts)))
            continue
        device = _fastest(devices, need, op)
        device.free_bytes -= need
        experts = ()
        if isinstance(op.attrs, ops.MoeExperts):
            experts = (ExpertPlacement(0, op.attrs.experts - 1, device.name),)
        placements.append((op.id, Placement(device.name, experts)))
    return replace(call, placements=tuple(placements))


def _fastest(devices: list[Device], need: float, op: Op) -> Device:
    """The device with room that finishes the op first; if none has room, the one with most (the sum fits, and the
    OS lets an allocation spill over to other nodes)."""
    assert op.cost is not None
    decode = op.cost.phases[0].us
    with_room = [d for d in devices if d.free_bytes >= need]
    if not with_room:
        return max(devices, key=lambda d: d.free_bytes)
    return min(with_room, key=lambda d: (decode / d.speed, -d.free_bytes))


def _place_experts(experts: int, need: float, devices: list[Device]) -> tuple[ExpertPlacement, ...]:
    """Runs of experts in proportion to the devices' bandwidths, cut where a device is full."""
    each = need / experts
    total = sum(d.speed for d in devices)
    runs, first = [], 0
    for i, device in enumerate(devices):
        left = experts - first
        want = left if i == len(devices) - 1 else round(experts * device.speed / total)
        count = max(0, min(left, want, int(device.free_bytes // each) if i < len(devices) - 1 else left))
        if count:
            device.free_bytes -= count * each
            runs.append(ExpertPlacement(first, first + count - 1, device.name))
            first += count
    return tuple(runs)


def _new_bytes(plan: Plan, call: Call, op: Op, resident: set[str], context: Context) -> float:
    """Bytes of the op's weights and states that no op before it has brought in; they are added to ``resident``
    (tied embeddings count once)."""
    template = plan.template(call.template)
    actual = dict(zip(template.params, call.args, strict=True))
    values = plan.value_map()
    dims = plan.max_dims()
    need = 0.0
    for name in op.inputs:
        value = values.get(actual.get(name, ""))
        if value is None or value.id in resident:
            continue
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
            need += context.target.packed_bytes(value)
        elif value.kind is ValueKind.STATE:
            need += value.type.bytes(dims)
        else:
            continue
        resident.add(value.id)
    return need
