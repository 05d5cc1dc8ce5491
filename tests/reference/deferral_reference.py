"""Expert deferral by its definition, token by token: experts that a transformers model runs one choice at a time."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from hetcomp.ir.plan import Plan
from tests.parity.test_families import reference_logits

ALL = range(sys.maxsize)  # places of tokens


def split_choices(
    ids: Sequence[int], weights: Sequence[float], on_cpu: Sequence[bool], deferred: int
) -> tuple[list[int], list[int]]:
    """Places of a token's choices that are computed at once, and of those that are deferred: of the CPU's the
    ``deferred`` of the smallest weights, of equal weights the later choice first."""
    mine = [i for i, expert in enumerate(ids) if on_cpu[expert]]
    later = sorted(mine, key=lambda i: (weights[i], -i))[:deferred]
    return [i for i in range(len(ids)) if i not in later], sorted(later)


def cpu_tier(plan: Plan) -> list[tuple[int, list[bool]]]:
    """Of every MoE layer what the plan says: how many choices are deferred, and which experts the CPU has."""
    found = []
    for call in plan.calls:
        for op, placement in call.placements:
            if placement.experts and any(o.id == op for o in plan.template(call.template).ops):
                runs = [
                    run.device.startswith("cpu") for run in placement.experts for _ in range(run.first, run.last + 1)
                ]
                found.append((placement.deferred, runs))
    return found


@contextmanager
def deferred_experts(
    model: nn.Module, layers: Sequence[tuple[int, Sequence[bool]]], places: Container[int] = ALL
) -> Iterator[None]:
    """Within, of the tokens at ``places`` every MoE layer adds what the MoE layer before left of a token, and leaves
    what the definition says."""
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    assert len(experts) == len(layers)
    left: dict[int, Tensor] = {}  # by token: what the MoE layer before has left

    def forward_of(module: nn.Module, deferred: int, on_cpu: Sequence[bool]):
        whole = module.forward

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            rows = []
            for t in range(len(hidden)):

                def one(i: int, t: int = t) -> Tensor:
                    return whole(hidden[t : t + 1], ids[t : t + 1, i : i + 1], weights[t : t + 1, i : i + 1])[0]

                count = deferred if t in places else 0
                now, later = split_choices(ids[t].tolist(), weights[t].tolist(), on_cpu, count)
                nothing = torch.zeros_like(hidden[t])
                rows.append(sum((one(i) for i in now), nothing) + left.pop(t, nothing))
                if later:
                    left[t] = sum((one(i) for i in later), nothing)
            return torch.stack(rows)

        return forward

    for module, (deferred, on_cpu) in zip(experts, layers, strict=True):
        module.forward = forward_of(module, deferred, on_cpu)
    try:
        yield
        assert not left, "the last MoE layer has left something"
    finally:
        for module in experts:
            del module.forward


def deferred_logits(model: nn.Module, ids: Tensor, plan: Plan, places: Container[int] = ALL) -> np.ndarray:
    """Logits float32 [T, vocab] where the tokens at ``places`` defer as ``plan`` says."""
    with torch.no_grad(), deferred_experts(model, cpu_tier(plan), places):
        return reference_logits(model, ids)
