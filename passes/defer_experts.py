"""Leaves some of a generated token's experts to the next MoE layer, so that the CPU computes while the GPU does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices, MoeLayer, may_defer, moe_layers
from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context, DeferralRequest
from hetcomp.passes.idle_time import choices_to_fill, decode_us
from hetcomp.passes.registry import plan_pass

# A gain of less than this, of deferring at all or one choice more, is not worth its inaccuracy; nor are the samples of
# the simulation more exact.
_WORTH = 0.01


@plan_pass(requires=("scheduled",), establishes=("deferral_chosen",))
def defer_experts(plan: Plan, context: Context) -> Plan:
    """Sets ``deferred`` of MoE layers whose experts on the CPU are handed over by a GPU, if the user asked for it.

    A layer can defer where the next MoE layer has such a hand-over too, so the last one never does. A number that the
    user gave is taken everywhere (up to top-k). Else a layer defers as many choices as fill the time in which the CPU
    would wait for the next layer, up to a cap for all layers: the lowest that is about as fast as none, or the highest
    below it whose KL divergence on text is within the budget. Where nothing can be deferred, or nothing is gained, a
    note says so.
    """
    request = context.deferral
    if request is None or request.choices == 0:
        return plan
    layers = moe_layers(plan)
    possible = may_defer(layers)
    if not any(possible):
        return _noted(plan, "deferral: nothing to defer: no two MoE layers have experts on the CPU beside a GPU")
    if request.choices is not None:
        most = request.choices
        counts = [min(most, layer.attrs.top_k) if can else 0 for layer, can in zip(layers, possible, strict=True)]
        return _noted(_with(plan, layers, counts), _summary(counts))
    wanted = _fast_enough(plan, layers, choices_to_fill(plan, layers, possible, context), context)
    if not any(wanted):
        return _noted(plan, "deferral: none: a decode step would not be faster")
    return _within_budget(plan, layers, wanted, request)


def _fast_enough(plan: Plan, layers: tuple[MoeLayer, ...], wanted: Sequence[int], context: Context) -> list[int]:
    """``wanted`` with the lowest cap from which on one choice more gains too little."""
    counts = list(wanted)
    while any(counts):
        fewer = [min(count, max(counts) - 1) for count in counts]
        slower, faster = (decode_us(_with(plan, layers, some), context) for some in (fewer, counts))
        if faster < slower * (1 - _WORTH):
            break
        counts = fewer
    return counts


def _within_budget(plan: Plan, layers: tuple[MoeLayer, ...], wanted: Sequence[int], request: DeferralRequest) -> Plan:
    if request.measure is None:
        return _noted(_with(plan, layers, wanted), f"{_summary(wanted)}; its accuracy was not measured")
    capped = [tuple(min(count, cap) for count in wanted) for cap in range(max(wanted), 0, -1)]
    candidates = [[LayerChoices(n, layer.on_cpu) for n, layer in zip(counts, layers, strict=True)] for counts in capped]
    for counts, quality in zip(capped, request.measure(candidates), strict=True):
        if quality.kl <= request.max_kl:
            return _noted(
                replace(_with(plan, layers, counts), deferral=quality), f"{_summary(counts)}; {_cost(quality)}"
            )
    return _noted(plan, f"deferral: none: even one choice a layer costs a KL of more than {request.max_kl:g}")


def _with(plan: Plan, layers: tuple[MoeLayer, ...], counts: Sequence[int]) -> Plan:
    deferred = {(layer.call, layer.op.id): count for layer, count in zip(layers, counts, strict=True)}
    calls = []
    for index, call in enumerate(plan.calls):
        placements = ((op, replace(p, deferred=deferred.get((index, op), 0))) for op, p in call.placements)
        calls.append(replace(call, placements=tuple(placements)))
    return replace(plan, calls=tuple(calls))


def _summary(counts: Sequence[int]) -> str:
    some = [count for count in counts if count]
    spelled = f"{min(some)}" if min(some) == max(some) else f"{min(some)} to {max(some)}"
    return (
        f"deferral: of a generated token up to {spelled} choices of experts on the CPU are added one MoE layer later, "
        f"in {len(some)} of {len(counts)} MoE layers"
    )


def _cost(quality: DeferralQuality) -> str:
    return (
        f"on {quality.tokens} tokens of {quality.text} it costs a KL of {quality.kl:.3g} nats a token (perplexity "
        f"{quality.perplexity:.4g} instead of {quality.undeferred_perplexity:.4g})"
    )


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))
