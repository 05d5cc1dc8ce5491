"""Attention over a KV cache in float64, and the error that a kernel may make."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hetcomp.ir.ops import Attention
from tests.reference.kernel_harness import Step
from tests.reference.kernel_numbers import EPS, Doubles


def attention_reference(
    a: Attention, q: Doubles, k: Doubles, v: Doubles, sinks: Doubles, step: Step, rounding: float = 0.0
) -> tuple[Doubles, Doubles]:
    """Attention and the error it may have, [T, heads, v_head_dim]. rounding: relative error of a query's element and of
    a probability, where the kernel rounds these before it multiplies."""
    assert step.positions is not None
    assert step.slots is not None
    y = np.zeros((len(q), a.heads, a.v_head_dim))
    bound = np.zeros_like(y)
    for t, (position, slot) in enumerate(zip(step.positions, step.slots, strict=True)):
        first = max(0, position - a.window + 1) if a.window else 0
        for h in range(a.heads):
            g = h // (a.heads // a.kv_heads)
            keys, values = k[slot, g, first : position + 1], v[slot, g, first : position + 1]
            scores = keys @ q[t, h] * a.scale
            # A score's error is that of a sum of head_dim products (softcap does not steepen it) ...
            error = (rounding + EPS * (4 + np.sqrt(a.head_dim))) * (np.abs(keys) @ np.abs(q[t, h]) * a.scale)
            if a.softcap:
                scores = a.softcap * np.tanh(scores / a.softcap)
                error = error + 8 * EPS * np.abs(scores)
            top = max(scores.max(), sinks[h]) if a.sinks else scores.max()
            # ... plus the rounding of score - max; exp turns it into a relative error of the probability.
            error = error + EPS * (4 + np.abs(scores) + abs(top))
            p = np.exp(scores - top)
            total = p.sum() + (np.exp(sinks[h] - top) if a.sinks else 0)
            y[t, h] = p / total @ values
            spread = p / total @ (np.abs(values) * error[:, None]) + (p / total @ np.abs(values)) * (
                (p / total) @ error
            )
            bound[t, h] = spread + (rounding + EPS * (8 + np.sqrt(len(p)))) * (p / total @ np.abs(values))
    return y, bound


def poison_the_future(k: npt.NDArray[np.float32], v: npt.NDArray[np.float32], step: Step) -> None:
    """What no token of the step may see is NaN: a read of it would show."""
    assert step.positions is not None
    assert step.slots is not None
    for slot in range(len(k)):
        seen = step.positions[step.slots == slot].max(initial=-1) + 1
        k[slot, :, seen:] = np.nan
        v[slot, :, seen:] = np.nan
