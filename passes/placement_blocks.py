"""Equal layers joined into blocks that are placed alike: a smaller problem where the whole one has too many columns."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hetcomp.ir.homes import number
from hetcomp.passes.placement_assignment import Assignment, assignment_us
from hetcomp.passes.placement_problem import Edge, ExpertClass, ExpertSet, Group, Problem, Times

# Devices of groups to choose (groups x GPUs) above which layers are joined. Qwen3-30B-A3B has 292 groups, DeepSeek-V3
# 672: with one GPU joining makes HiGHS four times as fast, with two GPUs it spent 50 s on the first cuts of the whole
# problem and ended worse than greedy.
MAX_CHOICES = 200
# Blocks, shared among the GPUs. The joined optimum was 0.02 % above the whole one's with 12 (both models, one GPU) and
# 0.5 % above the bound with 6 (DeepSeek-V3, two GPUs).
BLOCKS = 12


@dataclass(frozen=True)
class Blocks:
    """A problem whose equal neighbouring layers are joined; ``groups`` and ``experts``: for those of the whole problem,
    the index of the joined one that stands for it."""

    problem: Problem
    groups: tuple[int, ...]
    experts: tuple[int, ...]

    def expand(self, assignment: Assignment) -> Assignment:
        """The assignment of the whole problem that the joined problem's means."""
        return Assignment(
            tuple(assignment.groups[b] for b in self.groups),
            frozenset(g for g, b in enumerate(self.groups) if b in assignment.streamed),
            tuple(assignment.experts[b] for b in self.experts),
        )


def _by_call(problem: Problem) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Indices of the groups and of the expert sets of each call."""
    groups: dict[int, list[int]] = defaultdict(list)
    experts: dict[int, list[int]] = defaultdict(list)
    for index, g in enumerate(problem.groups):
        groups[g.call].append(index)
    for index, e in enumerate(problem.experts):
        experts[e.call].append(index)
    return groups, experts


def join_layers(problem: Problem) -> Blocks:
    """The problem as it is where it is small, else with neighbours among equal layers joined into at most ``BLOCKS``
    blocks a run of them. Every time and size of a block is the sum of its layers': what a joined assignment is said to
    take is what its expansion takes."""
    if len(problem.groups) * len(problem.gpu_bytes) <= MAX_CHOICES:
        return Blocks(problem, tuple(range(len(problem.groups))), tuple(range(len(problem.experts))))
    groups, experts = _by_call(problem)
    block_groups: list[Group] = []
    block_experts: list[ExpertSet] = []
    group_of, expert_of = [0] * len(problem.groups), [0] * len(problem.experts)
    count = max(4, BLOCKS // len(problem.gpu_bytes))
    for calls in _blocks([_signature(problem, groups[c], experts[c]) for c in sorted(groups)], count):
        first, base = calls[0], len(block_groups)
        for call in calls:
            for place, index in enumerate(groups[call]):
                group_of[index] = base + place
            for place, index in enumerate(experts[call]):
                expert_of[index] = len(block_experts) + place
        block_groups += [_times_layers(problem.groups[i], len(calls)) for i in groups[first]]
        for index in experts[first]:
            e = problem.experts[index]
            block_experts.append(_times_experts(replace(e, spine=group_of[e.spine]), len(calls)))
    edges = _edges(problem, group_of)
    joined = replace(problem, groups=tuple(block_groups), edges=edges, experts=tuple(block_experts))
    return Blocks(joined, tuple(group_of), tuple(expert_of))


def in_order(problem: Problem, assignment: Assignment) -> Assignment:
    """The assignment with equal neighbouring layers exchanged: of the solver's many mirror images always the same one.
    Such as are placed alike stand together; or, where experts come to the GPU in steps of prompts, apart, so that those
    of one layer come while others are computed that have all of theirs. Unchanged where that would cost transfers."""
    before = assignment_us(problem, assignment) * (1 + 1e-9)
    for arrange in (_apart, sorted) if problem.spread else (sorted,):
        ordered = _exchanged(problem, assignment, arrange)
        if assignment_us(problem, ordered) <= before:
            return ordered
    return assignment


# What is decided of a layer: of its groups the device and whether it streams, of its experts how many have which.
_Fate = tuple[list[tuple[str, bool]], list[list[list[tuple[str, int]]]]]


def _apart(fates: Iterable[_Fate]) -> list[_Fate]:
    """Each kind at equal distances."""
    ordered = sorted(fates)
    kinds = [list(kind) for _, kind in itertools.groupby(ordered)]
    places = [((i + 0.5) / len(kind), n, fate) for n, kind in enumerate(kinds) for i, fate in enumerate(kind)]
    return [fate for _, _, fate in sorted(places, key=lambda place: place[:2])]


def _exchanged(
    problem: Problem, assignment: Assignment, arrange: Callable[[Iterable[_Fate]], list[_Fate]]
) -> Assignment:
    """The layers of every run of equal ones in another order."""
    groups, experts = _by_call(problem)
    devices, streamed, counts = list(assignment.groups), set(assignment.streamed), list(assignment.experts)
    for run in _blocks([_signature(problem, groups[c], experts[c]) for c in sorted(groups)], 1):
        fates = arrange(
            (
                [(assignment.groups[g], g in assignment.streamed) for g in groups[call]],
                [[sorted(options.items()) for options in assignment.experts[e]] for e in experts[call]],
            )
            for call in run
        )
        for call, (of_groups, of_experts) in zip(run, fates, strict=True):
            for group, (device, streams) in zip(groups[call], of_groups, strict=True):
                devices[group] = device
                (streamed.add if streams else streamed.discard)(group)
            for index, classes in zip(experts[call], of_experts, strict=True):
                counts[index] = tuple(dict(options) for options in classes)
    return Assignment(tuple(devices), frozenset(streamed), tuple(counts))


def gpus_in_order(problem: Problem, assignment: Assignment) -> Assignment:
    """The assignment with GPUs that are all alike renamed in the order of their use: of mirror images the one that
    begins on the first. Unchanged where they differ, or a pin names one."""
    count = len(problem.gpu_bytes)
    pins = {*(g.pin for g in problem.groups), *(e.pin for e in problem.experts)}
    alike = len(set(problem.gpu_bytes)) == 1 and all(len(set(g.gpu_us)) == 1 for g in problem.groups)
    if count < 2 or not alike or not pins <= {None, "cpu", "gpu"}:
        return assignment
    used = [number(device) for device in assignment.groups if device != "cpu"]
    new = {f"{i}": f"{place}" for place, i in enumerate(dict.fromkeys([*used, *range(count)]))}

    def renamed(option: str) -> str:
        kind, _, index = option.partition(":")
        return f"{kind}:{new[index]}" if kind in ("gpu", "stream") else option

    experts = tuple(tuple({renamed(o): n for o, n in c.items()} for c in classes) for classes in assignment.experts)
    return Assignment(tuple(map(renamed, assignment.groups)), assignment.streamed, experts)


def _signature(problem: Problem, groups: Sequence[int], experts: Sequence[int]) -> object:
    """What two calls have in common if they are equal: everything but their numbers."""
    first = groups[0]
    return (
        tuple(replace(problem.groups[i], call=0) for i in groups),
        tuple(replace(e, call=0, spine=e.spine - first) for e in (problem.experts[i] for i in experts)),
    )


def _blocks(signatures: Sequence[object], most: int) -> list[list[int]]:
    """Calls by block, at most ``most`` blocks a run of equal ones."""
    runs: list[list[int]] = []
    for call, signature in enumerate(signatures):
        if runs and signatures[runs[-1][0]] == signature:
            runs[-1].append(call)
        else:
            runs.append([call])
    found = []
    for run in runs:
        count = min(most, len(run))
        borders = [round(len(run) * b / count) for b in range(count + 1)]
        found += [run[start:stop] for start, stop in itertools.pairwise(borders)]
    return found


def _edges(problem: Problem, group_of: Sequence[int]) -> tuple[Edge, ...]:
    """Edges between joined groups; what stays within one of them crosses nothing."""
    sums: dict[tuple[int, tuple[int, ...]], tuple[Times, ...]] = {}
    for edge in problem.edges:
        source = group_of[edge.source]
        readers = tuple(sorted({group_of[r] for r in edge.readers} - {source}))
        if readers:
            before = sums.get((source, readers))
            sums[source, readers] = edge.us if before is None else _sum(before, edge.us)
    return tuple(Edge(source, readers, us) for (source, readers), us in sums.items())


def _sum(a: tuple[Times, ...], b: tuple[Times, ...]) -> tuple[Times, ...]:
    return tuple(tuple(x + y for x, y in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True))


def _times(us: Times, layers: int) -> Times:
    return tuple(t * layers for t in us)


def _each(us: tuple[Times, ...], layers: int) -> tuple[Times, ...]:
    return tuple(_times(t, layers) for t in us)


def _times_layers(g: Group, layers: int) -> Group:
    return replace(
        g,
        cpu_us=_times(g.cpu_us, layers),
        gpu_us=_each(g.gpu_us, layers),
        stream_us=_times(g.stream_us, layers),
        sliced_bytes=g.sliced_bytes * layers,
        whole_bytes=g.whole_bytes * layers,
        state_bytes=g.state_bytes * layers,
        layers=layers,
    )


def _times_experts(e: ExpertSet, layers: int) -> ExpertSet:
    def times_class(c: ExpertClass) -> ExpertClass:
        return replace(
            c,
            cpu_us=_times(c.cpu_us, layers),
            gpu_us=_each(c.gpu_us, layers),
            stream_us=_each(c.stream_us, layers),
        )

    return replace(
        e,
        expert_bytes=e.expert_bytes * layers,
        classes=tuple(map(times_class, e.classes)),
        exchange_us=_each(e.exchange_us, layers),
        layers=layers,
    )
