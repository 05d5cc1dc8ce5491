"""An answer to the placement problem: what it takes of every memory, and its time in the linear model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetcomp.ir.homes import number
from hetcomp.passes.placement_groups import SMALL_BYTES
from hetcomp.passes.placement_problem import ExpertSet, Problem


@dataclass(frozen=True)
class Assignment:
    """Device of every group (``cpu``, ``gpu:0``; streamed groups run on their GPU with weights in CPU memory), and
    for every expert set the number of each class's members by option: ``cpu``, ``cpu:1`` (whole, on that node),
    ``gpu:0``, ``stream:0`` (at home in CPU memory, computed on the GPU in prefill)."""

    groups: tuple[str, ...]
    streamed: frozenset[int]
    experts: tuple[tuple[dict[str, int], ...], ...]


def gpu_of(option: str, streams: bool) -> str | None:
    """The GPU that computes experts of that option, in steps that stream or do not; None: the CPU does."""
    kind, _, number = option.partition(":")
    return f"gpu:{number}" if kind == "gpu" or (kind == "stream" and streams) else None


def gpu_used(problem: Problem, assignment: Assignment) -> list[int]:
    """Bytes of every GPU that the assignment takes, workspace and buffers for streams included; 0 where unused."""
    fixed, buffers = [0] * len(problem.gpu_bytes), [0] * len(problem.gpu_bytes)
    touched = set()
    for index, (g, device) in enumerate(zip(problem.groups, assignment.groups, strict=True)):
        if device == "cpu":
            continue
        touched.add(number(device))
        streams = index in assignment.streamed
        fixed[number(device)] += g.state_bytes if streams else g.bytes
        if streams:
            buffers[number(device)] = max(buffers[number(device)], g.buffer_bytes)
    ring = [0] * len(problem.gpu_bytes)
    for e, counts in zip(problem.experts, assignment.experts, strict=True):
        for option, n in ((o, n) for c in counts for o, n in c.items() if n and not o.startswith("cpu")):
            touched.add(number(option))
            if option.startswith("gpu"):
                fixed[number(option)] += n * e.expert_bytes
            else:
                ring[number(option)] = problem.staging_bytes
    return [
        fixed[i] + buffers[i] + ring[i] + (problem.workspace_bytes if i in touched else 0) for i in range(len(fixed))
    ]


def small_ones_at_neighbours(problem: Problem, assignment: Assignment) -> Assignment:
    """With groups that take next to no memory (norms, tables made of the positions) where most of the groups are that
    they read or that read them: every reader elsewhere moves their values once more."""
    neighbours: dict[int, list[int]] = defaultdict(list)
    for edge in problem.edges:
        for reader in edge.readers:
            neighbours[edge.source].append(reader)
            neighbours[reader].append(edge.source)
    devices = list(assignment.groups)
    for index, others in sorted(neighbours.items()):
        g = problem.groups[index]
        if g.bytes <= SMALL_BYTES and g.pin is None:
            counted = Counter(devices[other] for other in others)
            most = max(counted.values())
            if counted[devices[index]] < most:
                devices[index] = min(device for device, n in counted.items() if n == most)
    return replace(assignment, groups=tuple(devices))


def fits(problem: Problem, assignment: Assignment) -> bool:
    """Whether it keeps the limits of every GPU, every CPU node and pinned memory, and the pins."""
    if any(used > free for used, free in zip(gpu_used(problem, assignment), problem.gpu_bytes, strict=True)):
        return False
    nodes = [0.0] * len(problem.node_share)
    nodes[problem.main] += problem.workspace_bytes
    pinned = 0

    def cut(size: float) -> None:
        for node, share in enumerate(problem.node_share):
            nodes[node] += share * size

    for index, (g, device) in enumerate(zip(problem.groups, assignment.groups, strict=True)):
        if not g.may_be_on(device):
            return False
        streams = index in assignment.streamed
        pinned += g.weight_bytes if streams else 0
        if streams or device == "cpu":
            cut(g.sliced_bytes)
            nodes[problem.main] += g.whole_bytes - (g.state_bytes if streams else 0)
    for e, counts in zip(problem.experts, assignment.experts, strict=True):
        for option, n in ((o, n) for c in counts for o, n in c.items() if n):
            kind = option.partition(":")[0]
            if e.pin is not None and (kind != "cpu" if e.pin == "cpu" else option != e.pin):
                return False
            if not problem.streaming and kind != "cpu" and option != assignment.groups[e.spine]:
                return False
            pinned += n * e.expert_bytes if kind == "stream" else 0
            if kind == "cpu" and option != "cpu":
                nodes[number(option)] += n * e.expert_bytes
            elif kind != "gpu":
                cut(n * e.expert_bytes)
    return pinned <= problem.pinned_bytes and all(u <= f for u, f in zip(nodes, problem.node_bytes, strict=True))


def assignment_us(problem: Problem, assignment: Assignment) -> float:
    """What the solver's linear model says of an assignment: microseconds of the whole mix."""
    total = 0.0
    beside: dict[int, list[int]] = defaultdict(list)
    for index, g in enumerate(problem.groups):
        if g.beside:
            beside[g.call].append(index)
    for p, step in enumerate(problem.phases):
        chain = 0.0
        for index, (g, device) in enumerate(zip(problem.groups, assignment.groups, strict=True)):
            if not g.beside:
                chain += _group_us(problem, assignment, index, device, p)
        for edge in problem.edges:
            homes = {assignment.groups[edge.source], *(assignment.groups[r] for r in edge.readers)}
            chain += sum(edge.us[number(d)][p] for d in homes if d != "cpu" and len(homes) > 1)
        for e, counts in zip(problem.experts, assignment.experts, strict=True):
            chain += _experts_us(problem, e, counts, assignment, beside[e.call], p)
        total += step.steps * chain
    return total


def overrun_us(problem: Problem, e: ExpertSet, gpu: int, p: int, whole_gpu_us: float) -> list[float]:
    """By class, the least by which one of its experts on the CPU prolongs the layer in the mean, over all experts on
    GPU ``gpu`` (at most ``whole_gpu_us``), if the experts' input is made there.

    Of the tokens' experts n are on the CPU, which take the exchange and n times an expert's time c. Then the layer
    takes max(GPU, exchange + n c), and for n >= 1 that is at least GPU + n (exchange + c - GPU): its mean, other than
    the maximum of the means, has the term E[n] (exchange + c - GPU). Where the tokens of a step choose hardly any CPU
    expert this is what they cost.
    """
    found = []
    for c in e.classes:
        if not c.active[p]:
            found.append(0.0)
            continue
        once = c.cpu_us[p] / c.active[p] + e.exchange_us[gpu][p] + problem.barrier_us * e.layers
        found.append(c.active[p] * max(0.0, once - whole_gpu_us))
    return found


def whole_gpu_us(problem: Problem, e: ExpertSet, beside: Sequence[int], gpu: int, p: int) -> float:
    """All experts of the layer, and what runs beside them, on that GPU."""
    experts = sum(len(c.members) * c.gpu_us[gpu][p] for c in e.classes)
    return experts + problem.launch_us[gpu] * e.layers + sum(problem.groups[b].gpu_us[gpu][p] for b in beside)


def _group_us(problem: Problem, assignment: Assignment, index: int, device: str, p: int) -> float:
    g = problem.groups[index]
    if device == "cpu":
        return g.cpu_us[p]
    us = g.gpu_us[number(device)][p]
    return max(us, g.stream_us[number(device)]) if index in assignment.streamed else us


def _experts_us(
    problem: Problem,
    e: ExpertSet,
    counts: tuple[dict[str, int], ...],
    assignment: Assignment,
    beside: Sequence[int],
    p: int,
) -> float:
    gpus = range(len(problem.gpu_bytes))
    nodes = [0.0] * len(problem.node_share)
    on_gpu, link = [0.0 for _ in gpus], [0.0 for _ in gpus]
    cpu_any, gpu_any = False, [False for _ in gpus]
    streams = problem.phases[p].tokens > problem.phases[p].sequences
    for c, options in zip(e.classes, counts, strict=True):
        for option, n in ((o, n) for o, n in options.items() if n):
            gpu = gpu_of(option, streams)
            cpu_any = cpu_any or gpu is None
            if gpu is not None:
                i = number(gpu)
                gpu_any[i] = True
                on_gpu[i] += n * c.gpu_us[i][p]
                link[i] += n * c.stream_us[i][p] if gpu != option else 0.0
            elif option.startswith("cpu:"):
                nodes[number(option)] += n * c.cpu_us[p] / problem.node_share[number(option)]
            else:
                nodes = [us + n * c.cpu_us[p] for us in nodes]
    for b in beside:
        device = assignment.groups[b]
        if device == "cpu":
            nodes = [us + problem.groups[b].cpu_us[p] for us in nodes]
        else:
            on_gpu[number(device)] += problem.groups[b].gpu_us[number(device)][p]
    spine = assignment.groups[e.spine]
    start = problem.barrier_us * e.layers if cpu_any else 0.0
    if spine != "cpu" and cpu_any:
        start += e.exchange_us[number(spine)][p]
    times = [us + start for us in nodes]
    for i in gpus:
        us = on_gpu[i] + (problem.launch_us[i] * e.layers if gpu_any[i] else 0.0)
        us += e.exchange_us[i][p] if gpu_any[i] and spine != f"gpu:{i}" else 0.0
        times += [us, link[i], nodes[problem.main] + link[i] * problem.joint_share]
        if spine == f"gpu:{i}":
            extra = overrun_us(problem, e, i, p, whole_gpu_us(problem, e, beside, i, p))
            on_cpu = [sum(n for o, n in c.items() if gpu_of(o, streams) is None) for c in counts]
            times.append(us + sum(x * n for x, n in zip(extra, on_cpu, strict=True)))
    return max(times)
