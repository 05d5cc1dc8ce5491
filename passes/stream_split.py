"""Which of a layer's experts are streamed to the GPU in a step of a prompt, as the runtime decides it.

runtime_lib/src/gpu/stream_split.cpp is the same in C++; tests/data/stream_splits.json holds them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hetcomp.ir.annotations import Curve, StreamRates
from hetcomp.passes.memory_contention import copies_slowdown, reads_slowdown


@dataclass(frozen=True)
class SplitInput:
    """``tokens`` of each expert that the GPU has not got, in the order to copy them; ``copied``: so many are, whatever
    is decided; ``most``: so many can be; ``slots``: more of them must wait until some are computed. ``lead_us``: so
    long before the layer's routing is known its copies have begun. ``resident_us``: of the experts that the GPU has;
    ``expert_bytes``: to copy one; ``activation_bytes``: of a row that CPU and GPU hand to each other."""

    tokens: Sequence[int]
    copied: int
    most: int
    slots: int
    step_tokens: int
    lead_us: float
    resident_us: float
    expert_bytes: float
    activation_bytes: float


@dataclass(frozen=True)
class Split:
    """``copied``: experts, from the first on. ``link_free_us``: so long before the layer is done these copies are."""

    copied: int
    link_free_us: float


def time_at(curve: Curve, tokens: float) -> float:
    """Microseconds: straight lines between the curve's points and beyond."""
    if len(curve) == 1:
        return curve[0][1]
    upper = next((i for i, (n, _) in enumerate(curve) if i > 0 and n >= tokens), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[upper - 1], curve[upper]
    return max(0.0, y0 + (y1 - y0) / (x1 - x0) * (tokens - x0))


@dataclass(frozen=True)
class BothAtOnce:
    """How much longer the CPU's experts and the copies take for each other's sake, microseconds."""

    cpu_us: float
    copies_us: float


def beside_copies(cpu_us: float, copied: float, read: float, rates: StreamRates) -> BothAtOnce:
    """While the CPU computes experts that take it ``cpu_us`` alone, of ``read`` bytes, and ``copied`` bytes are copied
    beside them or behind: as in the simulation (memory_contention)."""
    if not cpu_us or not copied:
        return BothAtOnce(0.0, 0.0)
    link, joint, reads = rates.link_gb_per_s, rates.joint_gb_per_s, read / cpu_us / 1e3
    both_us = min(cpu_us, copied / (link * 1e3))
    cpu, copies = reads_slowdown(reads, link, joint), copies_slowdown(reads, link, joint)
    return BothAtOnce((cpu - 1.0) * both_us, (copies - 1.0) * both_us)


def split_experts(given: SplitInput, rates: StreamRates) -> Split:
    """The number of copies with which a layer is done first; the link is free for the next layer's before that."""
    link = rates.link_gb_per_s * 1e3
    most = min(len(given.tokens), given.most)
    copy = given.expert_bytes / link
    exchange = given.step_tokens * given.activation_bytes / link
    cpu_us, read = [0.0] * (len(given.tokens) + 1), [0.0] * (len(given.tokens) + 1)
    for i in range(len(given.tokens) - 1, -1, -1):
        n = given.tokens[i]
        cpu_us[i] = cpu_us[i + 1] + (time_at(rates.cpu_expert_us, n) if n > 0 else 0.0)
        read[i] = read[i + 1] + (given.expert_bytes if n > 0 else 0.0)
    gpu, best, best_us = given.resident_us, Split(given.copied, 0.0), float("inf")
    for count in range(most + 1):
        if count > 0 and given.tokens[count - 1] > 0:
            gpu += time_at(rates.gpu_expert_us, given.tokens[count - 1])
        if count < min(given.copied, most):
            continue
        shared = exchange if cpu_us[count] > 0 else 0.0
        beside = beside_copies(cpu_us[count], count * given.expert_bytes, read[count], rates)
        copies = max(0.0, count * copy - given.lead_us) + shared + beside.copies_us
        # What has no slot is copied when the GPU has come to those that have: the layer's first slots are free.
        late = given.resident_us + (count - given.slots) * copy if count > given.slots else 0.0
        link_us = max(copies, late)
        # The sum comes over half of the link where copies have the other.
        us = max(link_us, (3 if count > 0 else 2) * shared + max(gpu, cpu_us[count] + beside.cpu_us))
        # Of equals the one that copies most: the CPU is free for others.
        if us <= best_us:
            best, best_us = Split(count, us - link_us), us
    return best


def slots_left(wave: int, each: float, expert_bytes: float, rates: StreamRates) -> int:
    """Of a ring of two waves, how many slots copies leave free that are made before the layer's routing is known: what
    is decided then has to be copied while the GPU computes the first wave, each expert for ``each`` tokens."""
    computing = wave * time_at(rates.gpu_expert_us, each)
    # One more: the GPU has to hear of its first wave.
    return min(math.ceil(computing * rates.link_gb_per_s * 1e3 / expert_bytes) + 1, wave // 2)
