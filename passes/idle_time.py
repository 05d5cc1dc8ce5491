"""How long the CPU waits between MoE layers in a decode step, and what choices that are deferred save of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hetcomp.ir.deferral import MoeLayer
from hetcomp.ir.plan import Plan
from hetcomp.passes.context import Context
from hetcomp.passes.phases import Phase, phases
from hetcomp.passes.simulate import SampledStep, sampled_steps, timeline


@dataclass
class _Layer:
    """Of one MoE layer by sample: microseconds that its experts take the CPU, and that it waits for the next one's."""

    busy: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)


def gains_of_choices(
    plan: Plan, layers: Sequence[MoeLayer], possible: Sequence[bool], context: Context
) -> tuple[tuple[float, ...], ...]:
    """By MoE layer the microseconds that deferring a first, a second, .. choice of a token saves, as many as save
    something: the CPU is busy then until the next layer's input is there. None where the layer cannot defer. The plan
    defers nothing yet.

    With d of a layer's k choices on the CPU deferred, each of which takes c, and G between its answer and the next
    layer's input, a layer takes (k - d) c + max(d c, G): least from d c = G on.
    """
    phase, step = _decode(plan)
    found = [_Layer() for _ in layers]
    for sample in sampled_steps(plan, phase, step, context):
        _add_sample(found, sample)
    gains = []
    for number, (layer, times, can) in enumerate(zip(layers, found, possible, strict=True)):
        shares = context.expert_shares(number, layer.attrs.experts)
        chosen = layer.attrs.top_k * sum(s for s, here in zip(shares, layer.on_cpu, strict=True) if here)
        each, idle = _mean(times.busy) / chosen if chosen else 0.0, _mean(times.idle)
        fill = math.ceil(idle / each) if can and each > 0 else 0
        gains.append(tuple(min(each, idle - d * each) for d in range(min(layer.attrs.top_k, fill))))
    return tuple(gains)


def decode_us(plan: Plan, context: Context) -> float:
    """Simulated time of the decode step that the plan's mix consists of."""
    phase, step = _decode(plan)
    return timeline(plan, phase, step, context).total_us


def _decode(plan: Plan) -> tuple[int, Phase]:
    steps = [(i, step) for i, step in enumerate(phases(plan)) if step.tokens == step.sequences]
    return next((found for found in steps if found[1].steps > 0), steps[0])


def _add_sample(found: Sequence[_Layer], sample: SampledStep) -> None:
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    others: list[tuple[float, float]] = []
    for i, task in enumerate(sample.tasks):
        if task.lane.startswith("cpu:"):
            span = (sample.run.start[i], sample.run.end[i])
            if task.moe_layer is None:
                others.append(span)
            else:
                spans[task.moe_layer].append(span)
    ends = {layer: max(end for _, end in own) for layer, own in spans.items()}
    starts = {layer: min(start for start, _ in own) for layer, own in spans.items()}
    for number, layer in enumerate(found):
        layer.busy.append(ends[number] - starts[number] if number in spans else 0.0)
        if number in spans and number + 1 in spans:
            begin, end = ends[number], starts[number + 1]
            between = sum(stop - start for start, stop in others if begin <= start and stop <= end)
            layer.idle.append(max(0.0, end - begin - between))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
