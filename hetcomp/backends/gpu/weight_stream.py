"""Weights of linear layers that are copied from CPU memory to a GPU in long steps of a prompt.

What is copied is known when the model is compiled, unlike with experts. So is where it goes: to a ring, portion after
portion. The copy of a portion waits until the GPU has read those that had its place, the GPU's kernels wait for the
portion (runtime_lib/src/gpu/weight_stream.h). See docs/decisions/weight-streaming.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends.gpu.tiles import aligned
from hetcomp.errors import HetcompError

RING = "weight_ring"
_ALIGNMENT = 256  # of a weight in the ring: what cuMemAlloc gives
# Smaller ones are copied with those that follow: a copy is a call of the driver, a portion two nodes of the graph.
_LEAST_PORTION = 1 << 20


@dataclass(frozen=True)
class WeightRing:
    """``bytes`` of a GPU's memory that weights come to. ``first_flag``: of its portions, behind those of hand-overs, of
    experts' waves and of other GPUs' portions."""

    bytes: int
    first_flag: int


@dataclass(frozen=True)
class Arrival:
    """The CPU's weight ``weight`` (an id), ``bytes`` of it, comes to offset ``to`` of the ring, where ``value`` is."""

    value: str
    weight: str
    bytes: int
    to: int


@dataclass(frozen=True)
class Portion:
    """What is copied together. ``flag``: raised to the GPU when it is there, and by the GPU when it has been read;
    ``after``: of the portion that must have been read before, None: none. ``first``, ``last``: the users of it, by
    their place in the step."""

    flag: int
    after: int | None
    first: int
    last: int
    arrivals: tuple[Arrival, ...]


@dataclass(frozen=True)
class Wanted:
    """The user at ``place`` in the step needs ``weights``: by name of the value, the id of the weight and its bytes."""

    place: int
    weights: Mapping[str, tuple[str, int]]

    @property
    def bytes(self) -> int:
        """In the ring."""
        return sum(aligned(size, _ALIGNMENT) for _, size in self.weights.values())


def portions_of(wanted: Sequence[Wanted], ring: int, first_flag: int) -> tuple[Portion, ...]:
    """The portions of a step, in a ring of so many bytes. Raises HetcompError if a user needs more than that."""
    found: list[Portion] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for users in _together(wanted, ring):
        size = sum(user.bytes for user in users)
        if size > ring:
            raise HetcompError(f"{size:,} bytes of weights are wanted at once, the ring has {ring:,}.")
        at = at if at + size <= ring else 0
        overlapping = [i for i, (start, stop) in enumerate(spans) if start < at + size and at < stop]
        after = found[overlapping[-1]].flag if overlapping else None
        arrivals = tuple(_arrivals(users, at))
        flag = first_flag + len(found)
        found.append(Portion(flag, after, users[0].place, users[-1].place, arrivals))
        spans.append((at, at + size))
        at += size
    return tuple(found)


def _together(wanted: Sequence[Wanted], ring: int) -> Iterator[list[Wanted]]:
    """Users whose weights are copied together: up to the least portion, within half of the ring."""
    users: list[Wanted] = []
    size = 0
    for user in wanted:
        if users and (size >= _LEAST_PORTION or size + user.bytes > ring // 2):
            yield users
            users, size = [], 0
        users.append(user)
        size += user.bytes
    if users:
        yield users


def _arrivals(users: Sequence[Wanted], at: int) -> Iterator[Arrival]:
    for user in users:
        for value, (weight, size) in user.weights.items():
            yield Arrival(value, weight, size, at)
            at += aligned(size, _ALIGNMENT)
