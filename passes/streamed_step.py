"""Experts of the CPU that come to a GPU in a step of a prompt, layer by layer, as the runtime chooses them
(runtime_lib/src/gpu/expert_stream.cpp)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetcomp.ir.annotations import Curve, ExpertStream, Placement
from hetcomp.ir.ops import MoeExperts
from hetcomp.passes.stream_split import Split, SplitInput, slots_left, split_experts, time_at

# An expert that is needed with less than this probability is not copied before it is known to be.
_LIKELY = 0.5


class StreamedLayer(NamedTuple):
    """``placement``: with ``streamed_to`` of those that come. ``ahead``: so many of them are on their way before the
    layer's routing is known."""

    placement: Placement
    ahead: int


class StreamedStep:
    """The layers of one GPU, in the order of their execution."""

    def __init__(self, stream: ExpertStream, step_tokens: int) -> None:
        self._stream, self._tokens = stream, step_tokens
        self._link_free_us = 0.0  # before the layer before was done

    def layer(
        self, placement: Placement, attrs: MoeExperts, tokens: NDArray[np.int64], expert_bytes: float, spine_us: Curve
    ) -> StreamedLayer:
        """The next one, whose experts get ``tokens``, i64[experts]; ``spine_us``: see ExpertStream."""
        gpu, rates, slots = placement.device, self._stream.rates, self._stream.ring
        at = {e: run.device for run in placement.experts for e in range(run.first, run.last + 1)}
        order = sorted(e for e, device in at.items() if device != gpu)
        here = (int(tokens[e]) for e, device in at.items() if device == gpu and tokens[e])
        resident_us = sum(time_at(rates.gpu_expert_us, n) for n in here)
        if not order:
            self._link_free_us = resident_us
            return StreamedLayer(placement, 0)
        lead = self._link_free_us + time_at(spine_us, self._tokens)
        share = min(1.0, attrs.top_k / attrs.experts)
        each = max(1.0, self._tokens * share)
        most_ahead = slots - slots_left(self._stream.slots, each, expert_bytes, rates)

        def split(wanted: list[int], copied: int, ahead: int, resident_us: float) -> Split:
            lead_us = min(lead, ahead * expert_bytes / (rates.link_gb_per_s * 1e3))
            activations = 4.0 * attrs.hidden
            given = SplitInput(
                wanted, copied, len(wanted), slots, self._tokens, lead_us, resident_us, expert_bytes, activations
            )
            return split_experts(given, rates)

        wanted = 0
        if 1.0 - (1.0 - share) ** self._tokens > _LIKELY:
            expected_us = (attrs.experts - len(order)) * time_at(rates.gpu_expert_us, each)
            wanted = split([int(each)] * len(order), 0, most_ahead, expected_us).copied
        asked, ahead = wanted < len(order), min(wanted, most_ahead)
        chosen = sorted((e for e in order[ahead:] if tokens[e]), key=lambda e: (-int(tokens[e]), e))
        order = [*order[:ahead], *chosen]
        found = split([int(tokens[e]) for e in order], ahead if asked else len(order), ahead, resident_us)
        self._link_free_us = found.link_free_us
        streamed = set(order[: found.copied])
        runs = [
            replace(run, first=e, last=e, streamed_to=gpu if e in streamed else None)
            for run in placement.experts
            for e in range(run.first, run.last + 1)
        ]
        return StreamedLayer(replace(placement, experts=tuple(runs)), ahead)
