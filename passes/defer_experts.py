"""Leaves some of a generated token's experts to the next MoE layer, so that the CPU computes while the GPU does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from hetcomp.ir.annotations import DeferralQuality
from hetcomp.ir.deferral import LayerChoices, MoeLayer, may_defer, moe_layers
from hetcomp.ir.plan import Plan
from hetcomp.ir.target import DeferralMeasure
from hetcomp.passes.context import Context
from hetcomp.passes.idle_time import decode_us, gains_of_choices
from hetcomp.passes.registry import plan_pass

# A gain of less than this, of deferring at all or one choice more, is not worth its inaccuracy; nor are the samples of
# the simulation more exact.
_WORTH = 0.01
_LEAST_KL = 1e-9  # of what rounding hides
_NOT_FASTER = "deferral: none: a decode step would not be faster"


@plan_pass(requires=("scheduled",), establishes=("deferral_chosen",))
def defer_experts(plan: Plan, context: Context) -> Plan:
    """Sets ``deferred`` of MoE layers whose experts on the CPU are handed over by a GPU, if the user asked for it.

    A layer can defer where the next MoE layer has such a hand-over too, so the last one never does. Numbers that the
    user gave are taken (up to top-k). Else a layer defers as many choices as fill the time in which the CPU would wait
    for the next layer, up to a cap for all layers, the lowest that is about as fast as none; where accuracy is
    measured, only the choices that save most time for the KL divergence they cost, as many as are within the budget.
    Where nothing can be deferred, or nothing is gained, a note says so.
    """
    request = context.deferral
    if request is None or request.choices == 0:
        return plan
    layers = moe_layers(plan)
    possible = may_defer(layers)
    if not any(possible):
        return _noted(plan, "deferral: nothing to defer: no two MoE layers have experts on the CPU beside a GPU")
    if request.choices is not None:
        most = (request.choices,) * len(layers) if isinstance(request.choices, int) else request.choices
        counts = [min(n, layer.attrs.top_k) if can else 0 for n, layer, can in zip(most, layers, possible, strict=True)]
        return _noted(_with(plan, layers, counts), _summary(counts)) if any(counts) else plan
    gains = gains_of_choices(plan, layers, possible, context)
    wanted = _fast_enough(plan, layers, [len(of_layer) for of_layer in gains], context)
    if not any(wanted):
        return _noted(plan, _NOT_FASTER)
    if request.measure is None:
        return _noted(_with(plan, layers, wanted), f"{_summary(wanted)}; its accuracy was not measured")
    order = _by_worth(layers, wanted, gains, request.measure)
    found = request.measure.most_within([_choices(layers, counts) for counts in order], request.max_kl)
    if found is None:
        return _noted(plan, f"deferral: none: even one choice in one layer costs a KL of more than {request.max_kl:g}")
    counts, quality = order[found[0]], found[1]
    deferring = _with(plan, layers, counts)
    if decode_us(deferring, context) > decode_us(plan, context) * (1 - _WORTH):
        return _noted(plan, f"{_NOT_FASTER} with as few as keep the KL within {request.max_kl:g}")
    return _noted(replace(deferring, deferral=quality), f"{_summary(counts)}; {_cost(quality)}")


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


def _by_worth(
    layers: tuple[MoeLayer, ...], wanted: Sequence[int], gains: Sequence[Sequence[float]], measure: DeferralMeasure
) -> list[list[int]]:
    """What the layers defer with one choice, with two, .. and with all that are ``wanted``, in the order of
    microseconds saved (``gains``) for the KL divergence that the choice adds.

    That is taken to be what the layer's first choice costs alone, times what the d-th choice of all layers adds to
    what the first adds: divergences of several layers add up to 0.75 to 0.92 of their sum (docs/decisions/
    expert-deferral.md), and to measure every layer with every number would take too long.
    """
    deferring = [number for number, count in enumerate(wanted) if count]
    alone = [[int(number == one) for number in range(len(layers))] for one in deferring]
    capped = [[min(count, cap) for count in wanted] for cap in range(1, max(wanted) + 1)]
    kl = measure.rough_kl([_choices(layers, counts) for counts in (*alone, *capped)])
    adds = [max(_LEAST_KL, after - before) for before, after in itertools.pairwise((0.0, *kl[len(alone) :]))]
    rising = list(itertools.accumulate(adds, max))  # so that a layer's choices come in turn
    worth = {
        (number, d): gains[number][d] / (max(_LEAST_KL, cost) * rising[d])
        for number, cost in zip(deferring, kl[: len(alone)], strict=True)
        for d in range(wanted[number])
    }
    found, counts = [], [0] * len(layers)
    for number, _ in sorted(worth, key=lambda choice: (-worth[choice], choice[1])):
        counts[number] += 1
        found.append(list(counts))
    return found


def _choices(layers: tuple[MoeLayer, ...], counts: Sequence[int]) -> list[LayerChoices]:
    return [LayerChoices(n, layer.on_cpu) for n, layer in zip(counts, layers, strict=True)]


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
