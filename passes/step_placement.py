"""Where a placed op, and each expert of a layer, is computed in one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from hetcomp.ir.annotations import ExpertPlacement, Placement
from hetcomp.ir.plan import Plan
from hetcomp.passes.phases import Phase


def lane_shares(placement: Placement) -> dict[str, float]:
    """CPU lanes that the op occupies and their share of its work: by slices of the weights, by whole experts, or all
    of it."""
    if len(placement.slices) > 1:
        parts = [(f"cpu:{piece.node}", piece.stop - piece.start) for piece in placement.slices]
    else:
        parts = [(run.device, run.last - run.first + 1) for run in placement.experts if run.device.startswith("cpu")]
    sums: dict[str, int] = defaultdict(int)
    for lane, extent in parts:
        sums[lane] += extent
    total = sum(sums.values())
    return {lane: extent / total for lane, extent in sums.items()} if total else {placement.device: 1.0}


def moved_to(plan: Plan, placement: Placement, step: Phase) -> str:
    """The GPU that runs an op of the CPU in this step, with weights that are copied to it; empty: none."""
    stream = plan.weight_stream
    if stream is None or step.tokens == step.sequences or step.tokens < stream.tokens:
        return ""
    return placement.in_prompts


def by_device(placement: Placement, step: Phase) -> dict[str, list[ExpertPlacement]]:
    """Where each run of experts is computed in this step: streamed ones on their GPU in prefill."""
    found: dict[str, list[ExpertPlacement]] = defaultdict(list)
    for run in placement.experts:
        streams = run.streamed_to is not None and step.tokens > step.sequences
        found[run.streamed_to if streams and run.streamed_to else run.device].append(run)
    return found


def with_cached(placement: Placement, held: Iterable[int]) -> Placement:
    """The placement with the experts ``held`` in slots of its GPU."""
    cached = set(held)
    runs = [
        replace(run, first=e, last=e, device=placement.device if e in cached else run.device)
        for run in placement.experts
        for e in range(run.first, run.last + 1)
    ]
    return replace(placement, experts=tuple(runs))


def kinds_of_devices(placement: Placement) -> set[str]:
    """``cpu`` and ``gpu``, of those that an op of experts runs on."""
    kinds = {run.device.partition(":")[0] for run in placement.experts} | {placement.device.partition(":")[0]}
    return kinds | {"gpu" for run in placement.experts if run.streamed_to is not None}
