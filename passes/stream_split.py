"""Which of a layer's experts are streamed to the GPU in a step of a prompt, as the runtime decides it.

runtime_lib/src/gpu/stream_split.cpp is the same in C++; tests/data/stream_splits.json holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetcomp.ir.annotations import Curve, StreamRates


@dataclass(frozen=True)
class SplitInput:
    """``tokens`` of each expert that the GPU has not got, in the order to copy them; ``copied``: so many are, whatever
    is decided; ``most``: so many can be; ``slots``: more of them must wait until some are computed. ``resident_us``: of
    the experts that the GPU has; ``expert_bytes``: to copy one; ``activation_bytes``: of a row that CPU and GPU hand to
    each other."""

    tokens: Sequence[int]
    copied: int
    most: int
    slots: int
    step_tokens: int
    resident_us: float
    expert_bytes: float
    activation_bytes: float


def time_at(curve: Curve, tokens: float) -> float:
    """Microseconds: straight lines between the curve's points and beyond."""
    if len(curve) == 1:
        return curve[0][1]
    upper = next((i for i, (n, _) in enumerate(curve) if i > 0 and n >= tokens), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[upper - 1], curve[upper]
    return max(0.0, y0 + (y1 - y0) / (x1 - x0) * (tokens - x0))


def shared_memory_us(cpu_us: float, copied: float, read: float, rates: StreamRates) -> float:
    """The CPU's experts take so much longer beside copies: while both want more than the memory gives, each gets its
    part in proportion, as in the simulation (see lane_engine). copied, read: bytes of experts."""
    beside = min(copied, cpu_us * rates.link_gb_per_s * 1e3)
    return max(0.0, (read + beside) / (rates.joint_gb_per_s * 1e3) - cpu_us)


def split_experts(given: SplitInput, rates: StreamRates) -> int:
    """How many of the experts, from the first on, are copied: so many that a layer takes least in a prompt of many
    layers, where the copies of one layer run while the layer before is computed."""
    link = rates.link_gb_per_s * 1e3
    most = min(len(given.tokens), given.most)
    copy = given.expert_bytes / link
    spine = time_at(rates.spine_us, given.step_tokens)
    exchange = given.step_tokens * given.activation_bytes / link
    cpu_us, read = [0.0] * (len(given.tokens) + 1), [0.0] * (len(given.tokens) + 1)
    for i in range(len(given.tokens) - 1, -1, -1):
        n = given.tokens[i]
        cpu_us[i] = cpu_us[i + 1] + (time_at(rates.cpu_expert_us, n) if n > 0 else 0.0)
        read[i] = read[i + 1] + (given.expert_bytes if n > 0 else 0.0)
    gpu, best, best_us = given.resident_us, given.copied, float("inf")
    for count in range(most + 1):
        if count > 0 and given.tokens[count - 1] > 0:
            gpu += time_at(rates.gpu_expert_us, given.tokens[count - 1])
        if count < min(given.copied, most):
            continue
        shared = exchange if cpu_us[count] > 0 else 0.0
        # What has no slot is copied when the GPU has come to those that have: the layer's first slots are free.
        late = spine + given.resident_us + (count - given.slots) * copy if count > given.slots else 0.0
        slowed = shared_memory_us(cpu_us[count], count * given.expert_bytes, read[count], rates)
        link_us = count * copy + shared + (slowed if count > 0 else 0.0)
        us = max(link_us, late, spine + 2 * shared + max(gpu, cpu_us[count] + slowed))
        # Of equals the one that copies most: the CPU is free for others.
        if us <= best_us:
            best, best_us = count, us
    return best
