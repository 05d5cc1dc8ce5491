"""Expert deferral in a plan: which MoE layers leave some of a token's experts to the next one, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import Placement
from hetcomp.ir.cpu_side import CpuRole, cpu_role
from hetcomp.ir.homes import CPU, memory_of
from hetcomp.ir.lifetimes import Lifetime
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template

# Buffers in the CPU's arena: the choices that are computed at once, those that are deferred, and the latter's sum.
# Layers take the two for deferred choices in turns: one thread divides a layer's choices while others may still compute
# what the layer before deferred.
CHOICES_NOW, CHOICES_LATER, DEFERRED_SUM = "deferral:now", ("deferral:later 0", "deferral:later 1"), "deferral:sum"
_DEFERRED = " deferred"


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The experts of one MoE layer. ``hands_over``: a GPU hands their input to the CPU, which answers with the sum of
    those that live there; only such layers can defer and add what was deferred."""

    call: int
    template: Template
    op: Op
    attrs: MoeExperts
    placement: Placement
    hands_over: bool

    @property
    def on_cpu(self) -> tuple[bool, ...]:
        """By expert, whether the plan's static tier has it on the CPU."""
        return experts_on_cpu(self.placement)


@dataclass(frozen=True, slots=True)
class Deferral:
    """What the experts of a call do in a step that defers: of each token ``choices`` are deferred at most, and the sum
    of what the MoE layer before deferred is added if ``adds``. ``turn`` is 0 and 1 alternately."""

    choices: int
    adds: bool
    turn: int


@dataclass(frozen=True, slots=True)
class LayerChoices:
    """Of each token the ``deferred`` choices of smallest weight among those of experts ``on_cpu`` are deferred."""

    deferred: int
    on_cpu: tuple[bool, ...]


def experts_on_cpu(placement: Placement) -> tuple[bool, ...]:
    """By expert, whether it lives on the CPU."""
    runs = placement.experts
    return tuple(memory_of(run.device) == CPU for run in runs for _ in range(run.first, run.last + 1))


def moe_layers(plan: Plan) -> tuple[MoeLayer, ...]:
    """The MoE layers of a placed plan in the order of the step."""
    found: list[MoeLayer] = []
    for index, call in enumerate(plan.calls):
        template, placements = plan.template(call.template), dict(call.placements)
        for op in template.ops:
            if isinstance(op.attrs, MoeExperts) and (placement := placements.get(op.id)) is not None:
                hands_over = cpu_role(op, placement, template) is CpuRole.EXPERTS
                found.append(MoeLayer(index, template, op, op.attrs, placement, hands_over))
    return tuple(found)


def may_defer(layers: tuple[MoeLayer, ...]) -> tuple[bool, ...]:
    """Which of the layers may defer: the next one must have a hand-over too, or nobody would add the sum."""
    return tuple(
        layer.hands_over and n + 1 < len(layers) and layers[n + 1].hands_over for n, layer in enumerate(layers)
    )


def deferrals(plan: Plan) -> dict[tuple[int, str], Deferral]:
    """By call and op, of all MoE layers that hand over; empty where no layer of the plan defers."""
    layers = moe_layers(plan)
    if not any(layer.placement.deferred for layer in layers):
        return {}
    before = (0, *(layer.placement.deferred for layer in layers))
    return {
        (layer.call, layer.op.id): Deferral(layer.placement.deferred, before[i] > 0, i % 2)
        for i, layer in enumerate(layers)
        if layer.hands_over
    }


def check_deferral(plan: Plan) -> None:
    """Raises HetcompError naming the layer if one defers that cannot."""
    layers = moe_layers(plan)
    experts = {(layer.call, layer.op.id) for layer in layers}
    for layer, possible in zip(layers, may_defer(layers), strict=True):
        deferred, where = layer.placement.deferred, f"Op %{layer.op.id} of layer {plan.calls[layer.call].layer}"
        if not 0 <= deferred <= layer.attrs.top_k:
            raise HetcompError(f"{where} defers {deferred} of a token's {layer.attrs.top_k} choices.")
        if deferred and not possible:
            why = "its experts" if not layer.hands_over else "those of the next MoE layer"
            raise HetcompError(f"{where} defers experts, but {why} are not handed from a GPU to the CPU.")
    for index, call in enumerate(plan.calls):
        for op, placement in call.placements:
            if placement.deferred and (index, op) not in experts:
                raise HetcompError(f"Op %{op} of layer {call.layer} defers experts, but has none.")


def deferral_buffers(plan: Plan) -> tuple[Lifetime, ...]:
    """The buffers that deferral takes, with the calls between which they must last; the sum is handed on from layer to
    layer within one step."""
    wanted = deferrals(plan)
    if not wanted:
        return ()
    layers = [layer for layer in moe_layers(plan) if (layer.call, layer.op.id) in wanted]
    first = min(layer.call for layer in layers if layer.placement.deferred)
    last = max(call for (call, _), deferral in wanted.items() if deferral.adds)
    dims = plan.max_dims()

    def size(layer: MoeLayer, name: str) -> int:
        return layer.template.value(name).type.bytes(dims)

    choices = max(size(layer, layer.op.inputs[1]) for layer in layers)
    total = max(size(layer, layer.op.outputs[0]) for layer in layers)
    return tuple(
        Lifetime(name, bytes, first, last)
        for name, bytes in (*((name, choices) for name in (CHOICES_NOW, *CHOICES_LATER)), (DEFERRED_SUM, total))
    )


def deferred_role(role: str) -> str:
    """Name of the part of an op's work that is deferred, in timers and predictions."""
    return role + _DEFERRED


def whole_role(role: str) -> str:
    """The role whose work, at once or deferred, ``role`` names."""
    return role.removesuffix(_DEFERRED)
