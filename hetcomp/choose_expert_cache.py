"""``expert_cache="auto"``: replays a routing trace through static placement and the policies of the cache, and takes
what the plan's costs predict to be fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import CacheChoice, CacheFigures
from hetcomp.ir.deferral import MoeLayer, experts_on_cpu, moe_layers
from hetcomp.ir.plan import Plan
from hetcomp.passes.cache_policy import CachedShape, CacheRule
from hetcomp.passes.cache_replay import replay_cache
from hetcomp.passes.context import CachePolicy, Context
from hetcomp.passes.expert_statistics import ExpertStatistics
from hetcomp.passes.phases import mix_of, phases
from hetcomp.passes.routing import ReplayedStep
from hetcomp.passes.simulate import replayed_us
from hetcomp.passes.stream_experts import expert_bytes
from hetcomp.planned import Planned
from hetcomp.routing_trace import RoutingTrace

# Steps on which a policy can be judged at all: LFU forgets with a half-life of 256, and as many go before.
FEWEST_STEPS = 512
# Of the judged steps so many are simulated, evenly spread: their times differ by some percent.
_SIMULATED = 64
# Within half a percent are equal, as formats are (passes/format_search.py); the simpler one wins then.
_TIE = 1.005
_RULES: tuple[CacheRule, ...] = ("lru", "lfu")


@dataclass(frozen=True)
class _Trial:
    """``choices`` [steps, MoE layers, sequences, top_k] of the trace; from ``judged`` on they count; ``shown``: the
    steps that are simulated."""

    choices: NDArray[np.integer]
    judged: int
    shown: tuple[int, ...]

    def count(self, hits: NDArray[np.integer]) -> float:
        """Hit rate of the judged steps, from the hits of all."""
        return float(hits[self.judged :].sum()) / self.choices[self.judged :].size


def choose_expert_cache(trace: RoutingTrace, name: str, context: Context, run: Callable[[Context], Planned]) -> Planned:
    """The plan with the fastest of static, lru and lfu, which says how each of them did (``cache_choice``).

    The first half of the trace warms the caches, and gives static placement its statistics where ``context`` has none;
    the second half decides. run: plans with a context. name: of the trace, for messages. Raises HetcompError if the
    trace is of another model or too short, and what planning with static placement raises.
    """
    context = replace(context, expert_cache="static")
    planned = run(context)
    _check(trace, name, planned.plan)
    batch = mix_of(planned.plan).batch
    trial = _trial(trace, name, batch)
    if context.statistics is None:
        context = replace(context, statistics=_statistics(trial, trace, name))
        planned = run(context)
    tried = [(_static(planned, trial), planned)]
    refused = ""
    try:
        cached = run(replace(context, expert_cache="lru"))
    except HetcompError as error:
        refused = str(error)
    else:
        cache = cached.plan.expert_cache
        if cache is not None and len(cache.gpus) > 1:
            refused = "caches on several GPUs are not replayed"
        else:
            tried += [(_cached(cached, trial, rule), cached) for rule in _RULES]
    fastest = min(figures.step_us for figures, _ in tried)
    chosen, planned = next((f, p) for f, p in tried if f.step_us <= fastest * _TIE)
    if planned.plan.expert_cache is not None and planned.plan.expert_cache.policy != chosen.policy:
        planned = run(replace(context, expert_cache=_policy(chosen.policy)))
    steps = len(trial.choices) - trial.judged
    choice = CacheChoice(f"{name} ({trace.source})", steps, tuple(f for f, _ in tried), chosen.policy, refused)
    plan = replace(planned.plan, cache_choice=choice, notes=(*planned.plan.notes, _note(choice)))
    return replace(planned, plan=plan)


def _statistics(trial: _Trial, trace: RoutingTrace, name: str) -> ExpertStatistics:
    """How often experts are chosen before what is judged."""
    layers = np.moveaxis(trial.choices[: trial.judged], 1, 0).reshape(trace.layers, -1)
    counts = (np.bincount(layer, minlength=trace.n_experts) for layer in layers)
    shares = tuple(tuple((row / layers.shape[1]).tolist()) for row in counts)
    return ExpertStatistics(f"the first half of {name}", trace.top_k, shares)


def _policy(name: str) -> CachePolicy:
    return "lru" if name == "lru" else "lfu"


def _check(trace: RoutingTrace, name: str, plan: Plan) -> None:
    layers = moe_layers(plan)
    wanted = {(layer.attrs.experts, layer.attrs.top_k) for layer in layers}
    if len(layers) == trace.layers and wanted == {(trace.n_experts, trace.top_k)}:
        return
    kinds = ", ".join(f"{e} experts with top-{k}" for e, k in sorted(wanted))
    raise HetcompError(
        f"Routing trace {name} is of another model ({trace.model}): it has {trace.layers} MoE layers of "
        f"{trace.n_experts} experts with top-{trace.top_k}, {plan.model.name} has "
        + (f"{len(layers)} of {kinds}." if layers else "none.")
    )


def _trial(trace: RoutingTrace, name: str, batch: int) -> _Trial:
    """The trace as ``batch`` sequences that are decoded together, each a stretch of it."""
    steps = trace.tokens // batch
    if steps < FEWEST_STEPS:
        raise HetcompError(
            f"Routing trace {name} has {trace.tokens} tokens, which are {steps} steps of {batch} sequences; record at "
            f"least {FEWEST_STEPS * batch} to choose an expert cache by."
        )
    rows = trace.experts[: steps * batch].reshape(batch, steps, trace.layers, trace.top_k)
    judged = steps // 2
    shown = np.linspace(judged, steps - 1, min(_SIMULATED, steps - judged)).astype(int)
    return _Trial(rows.transpose(1, 2, 0, 3), judged, tuple(shown.tolist()))


def _static(planned: Planned, trial: _Trial) -> CacheFigures:
    layers = moe_layers(planned.plan)
    on_gpu = np.array([[not cpu for cpu in experts_on_cpu(layer.placement)] for layer in layers])
    hits = on_gpu[np.arange(len(layers))[:, None, None], trial.choices].sum(axis=(1, 2, 3))
    us = _mean_us(planned, [ReplayedStep(trial.choices[number]) for number in trial.shown])
    return CacheFigures("static", trial.count(hits), 0.0, us)


def _cached(planned: Planned, trial: _Trial, rule: CacheRule) -> CacheFigures:
    cache = planned.plan.expert_cache
    assert cache is not None
    layers = moe_layers(planned.plan)
    (slots,) = cache.gpus
    mine = [number for number, layer in enumerate(layers) if layer.hands_over]
    shapes = [_shape(layers[number], planned.context) for number in mine]
    found = replay_cache(rule, shapes, slots.slots, slots.bytes_per_step, cache.first, trial.choices, mine, trial.shown)
    copied = float(found.copied[trial.judged :].mean())
    return CacheFigures(rule, trial.count(found.hits), copied, _mean_us(planned, found.steps))


def _shape(layer: MoeLayer, context: Context) -> CachedShape:
    return CachedShape(layer.attrs.experts, expert_bytes(layer.op, layer.template, context))


def _mean_us(planned: Planned, steps: Sequence[ReplayedStep]) -> float:
    batch = mix_of(planned.plan).batch
    index, step = next(
        (i, step) for i, step in enumerate(phases(planned.plan)) if step.tokens == step.sequences == batch
    )
    return float(np.mean(replayed_us(planned.plan, index, step, planned.context, steps)))


def _note(choice: CacheChoice) -> str:
    parts = [
        f"{f.policy} {f.hit_rate:.0%} of hits, {f.step_us / 1e3:.3g} ms a step"
        + (f" ({f.bytes_per_step / 1e6:.2g} MB copied)" if f.bytes_per_step else "")
        for f in choice.figures
    ]
    why = f"; no cache is possible: {choice.refused}" if choice.refused else ""
    return (
        f"expert cache auto: {choice.chosen}, by {choice.steps} steps of routing trace {choice.trace}: "
        f"{'; '.join(parts)}{why}"
    )
