"""Gives the memory that is left of each GPU to slots for experts, which change between steps of decoding.

Which experts are in them is decided while decoding (runtime_lib/src/gpu/cache_policy.h): this pass says how many slots
there are, what they hold at load, and how much may be copied in a step. See docs/decisions/expert-cache.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import CacheSlots, ExpertCache, Placement
from hetcomp.ir.deferral import moe_layers
from hetcomp.ir.homes import number
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Op, Plan, Template
from hetcomp.passes.context import Context
from hetcomp.passes.device_time import link_gb_per_s
from hetcomp.passes.gpu_room import rooms_of_gpus, taken_on
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.mix_time import sliced_step_us
from hetcomp.passes.registry import plan_pass
from hetcomp.passes.stream_experts import expert_bytes, largest_expert, stream_bytes

# Of a predicted step of decoding the link may be busy with experts: its end waits for the copies, and a step with hits
# takes less than the prediction for the mean.
_LINK_SHARE = 0.6
_ALIGNMENT = 256  # of each layer's slots of an operand, of which there are up to four


@dataclass(frozen=True)
class _Cached:
    op: Op
    template: Template
    placement: Placement
    shares: tuple[float, ...]

    @property
    def gpu(self) -> str:
        """Makes the layer's input."""
        return self.placement.device

    @property
    def experts(self) -> int:
        """Of the layer."""
        assert isinstance(self.op.attrs, MoeExperts)
        return self.op.attrs.experts


@plan_pass(requires=("sliced",))
def cache_experts(plan: Plan, context: Context) -> Plan:
    """Sets ``expert_cache`` where the user wishes one: on each GPU as many slots in each of its layers as fit beside
    all else that it has.

    Raises HetcompError where no GPU makes the input of experts in CPU memory, where these cannot be copied, or where
    a GPU has no room for as many slots as a token chooses experts.
    """
    policy = context.expert_cache
    if policy == "static":
        return plan
    wish = f"--expert-cache {policy}"
    if plan.disk is not None:
        raise HetcompError(
            f"{wish} needs all experts in memory, but some are read from the disk: leave one of them out."
        )
    found = _cached(plan, context)
    if not found:
        raise HetcompError(
            f"{wish} needs a GPU that computes attention and routers beside experts in CPU memory, and the plan of "
            f"{plan.model.name} has none; leave it out, or pin the rest to the GPU (--pin *=gpu:0)."
        )
    if any(len(c.placement.slices) > 1 for c in found):
        raise HetcompError(f"{wish} needs experts in one piece, but each is cut over several NUMA nodes; leave it out.")
    if not context.planning and plan.stream is None:
        raise HetcompError(
            f"{wish} needs room on the GPU for experts that are streamed, and there is none: leave it out."
        )
    gpus = tuple(_slots(plan, context, gpu, found) for gpu in sorted({c.gpu for c in found}))
    slots = {on.gpu: on.slots for on in gpus}
    first = tuple(_hottest(c.shares, slots[c.gpu]) for c in found)
    made = replace(plan, expert_cache=ExpertCache(policy, gpus, first))
    us = _LINK_SHARE * sliced_step_us(made, context, "decode")
    gpus = tuple(
        replace(on, bytes_per_step=int(us * link_gb_per_s(context.profile.gpus[number(on.gpu)]) * 1e3)) for on in gpus
    )
    cache = ExpertCache(policy, gpus, first)
    return replace(plan, expert_cache=cache, notes=(*plan.notes, _note(cache, found, context)))


def _slots(plan: Plan, context: Context, gpu: str, found: Sequence[_Cached]) -> CacheSlots:
    """What the GPU has room for. Raises HetcompError where that is too little."""
    layers = [c for c in found if c.gpu == gpu]
    size = sum(expert_bytes(c.op, c.template, context) for c in layers)
    room = _room(plan, context, gpu) - 4 * _ALIGNMENT * len(layers)
    slots = min(room // size, *(c.experts for c in layers))
    needed = max(c.op.attrs.top_k for c in layers if isinstance(c.op.attrs, MoeExperts))
    if slots < needed:
        raise HetcompError(
            f"--expert-cache {context.expert_cache} needs at least {needed} slots in each of {len(layers)} MoE layers "
            f"(a token's experts), which are {needed * size / 1e9:.2f} GB of {gpu}; {max(0, room) / 1e9:.2f} GB are "
            "left. Leave it out, or give a shorter --context or smaller --formats."
        )
    return CacheSlots(gpu, slots, slots * size, 0)


def _cached(plan: Plan, context: Context) -> list[_Cached]:
    """The MoE layers whose input is made on a GPU beside experts on the CPU."""
    layers = enumerate(moe_layers(plan))
    return [
        _Cached(layer.op, layer.template, layer.placement, context.expert_shares(n, layer.attrs.experts))
        for n, layer in layers
        if layer.hands_over
    ]


def _room(plan: Plan, context: Context, gpu: str) -> int:
    """Bytes of the GPU that nothing else takes."""
    whole = rooms_of_gpus(context)[number(gpu)]
    streams = stream_bytes(plan, context, whole)
    if plan.stream is not None:  # fewer where another GPU has less room
        streams = 2 * plan.stream.slots * largest_expert(plan, context)
    return whole - streams - taken_on(plan, context, gpu)


def _hottest(shares: Sequence[float], slots: int) -> tuple[int, ...]:
    order = sorted(range(len(shares)), key=lambda e: (-shares[e], e))
    return tuple(sorted(order[:slots]))


def _note(cache: ExpertCache, found: Sequence[_Cached], context: Context) -> str:
    rate = sum(sum(c.shares[e] for e in first) for c, first in zip(found, cache.first, strict=True)) / len(found)
    source = context.statistics.name if context.statistics is not None else "uniform routing"
    held = (
        f"{on.slots} experts of each of {sum(c.gpu == on.gpu for c in found)} layers are in {on.gpu} "
        f"({on.bytes / 1e9:.2f} GB; up to {on.bytes_per_step / 1e6:.0f} MB a step may be copied)"
        for on in cache.gpus
    )
    rooms = enumerate(rooms_of_gpus(context))
    idle = [f"gpu:{i}" for i, room in rooms if room > GPU_RESERVE and cache.on(f"gpu:{i}") is None]
    unused = f"; {', '.join(idle)} without a layer: no slots, pin some there for more hits" if idle else ""
    return (
        f"expert cache {cache.policy}: {', '.join(held)}{unused}; decode is predicted for {rate:.0%} of hits ({source})"
    )
