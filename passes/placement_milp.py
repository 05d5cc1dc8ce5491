"""The placement problem as a mixed-integer linear program."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from hetcomp.passes.linear_model import LinearModel, Solved
from hetcomp.passes.placement_problem import ExpertClass, ExpertSet, Problem


@dataclass(frozen=True)
class Assignment:
    """Device of every group (``cpu``, ``gpu:0``; streamed groups run on their GPU with weights in CPU memory), and
    for every expert set the number of each class's members by option: ``cpu``, ``cpu:1`` (whole, on that node),
    ``gpu:0``, ``stream:0`` (at home in CPU memory, computed on the GPU in prefill)."""

    groups: tuple[str, ...]
    streamed: frozenset[int]
    experts: tuple[tuple[dict[str, int], ...], ...]


class PlacementModel:
    """Columns and rows of a :class:`Problem`.

    Times of groups add up along the chain of the layers. Where a call has experts, the CPU's experts, each GPU's, the
    copies of streamed weights and the ops beside them run at the same time: the call takes the longest of them, in
    each phase. Expected values stand for the routing (the simulation samples it).
    """

    def __init__(self, problem: Problem, *, whole_nodes: bool = False) -> None:
        self.problem = problem
        self.model = LinearModel()
        self.gpus = range(len(problem.gpu_bytes))
        self.weights = [step.steps for step in problem.phases]
        self.whole_nodes = range(len(problem.node_share)) if whole_nodes else range(0)
        self._vram: list[dict[int, float]] = [defaultdict(float) for _ in self.gpus]
        self._dram: list[dict[int, float]] = [defaultdict(float) for _ in problem.node_share]
        self._dram_fixed = [0.0 for _ in problem.node_share]
        self._pinned: dict[int, float] = defaultdict(float)
        # A GPU column is 1 if anything of it is used: it then holds the workspace.
        self._used = [self.model.column(upper=1, integer=True) for _ in self.gpus]
        self.on_gpu = [[self._group_column(g, i) for i in self.gpus] for g in range(len(problem.groups))]
        self.streams = [[self._stream_column(g, i) for i in self.gpus] for g in range(len(problem.groups))]
        self._groups()
        self._edges()
        self.expert_columns = [self._expert_set(e) for e in problem.experts]
        self._limits()

    def solve(self) -> tuple[Assignment | None, Solved]:
        """The assignment and what HiGHS says of it; None if nothing fits."""
        solved = self.model.solve()
        if solved.values is None:
            return None, solved
        x = solved.values
        devices, streamed = [], set()
        for g in range(len(self.problem.groups)):
            device = "cpu"
            for i in self.gpus:
                if x[self.on_gpu[g][i]] > 0.5:
                    device = f"gpu:{i}"
                stream = self.streams[g][i]
                if stream is not None and x[stream] > 0.5:
                    device = f"gpu:{i}"
                    streamed.add(g)
            devices.append(device)
        experts = tuple(
            tuple({option: round(x[c]) for option, c in columns.items() if round(x[c])} for columns in classes)
            for classes in self.expert_columns
        )
        return Assignment(tuple(devices), frozenset(streamed), experts), solved

    def _group_column(self, group: int, gpu: int) -> int:
        g = self.problem.groups[group]
        # A group beside experts takes its time in the call's maximum, not in the chain.
        gain = sum(w * (g.gpu_us[gpu][p] - g.cpu_us[p]) for p, w in enumerate(self.weights))
        column = self.model.column(0.0 if g.beside else gain, 1, integer=True)
        self._vram[gpu][column] += g.bytes
        self._cpu_bytes(column, -g.sliced_bytes, -g.whole_bytes)
        self.model.row({column: 1, self._used[gpu]: -1}, high=0)
        if g.pin is not None:
            fixed = float(g.pin == f"gpu:{gpu}")
            self.model.lower[column], self.model.upper[column] = fixed, fixed
        return column

    def _stream_column(self, group: int, gpu: int) -> int | None:
        """Runs on the GPU, weights copied there in every step; worth a variable only for real weights."""
        g = self.problem.groups[group]
        weights = g.bytes - g.state_bytes
        if weights < 1 << 22 or g.beside or (g.pin is not None and g.pin != f"gpu:{gpu}"):
            return None
        us = [max(g.gpu_us[gpu][p], g.stream_us[gpu]) - g.cpu_us[p] for p in range(len(self.weights))]
        column = self.model.column(sum(w * t for w, t in zip(self.weights, us, strict=True)), 1, integer=True)
        # Two buffers: this group's weights and the next one's.
        self._vram[gpu][column] += g.state_bytes
        self._pinned[column] += weights
        self._cpu_bytes(column, 0, -g.state_bytes)
        self.model.row({column: 1, self._used[gpu]: -1}, high=0)
        return column

    def _groups(self) -> None:
        for index, g in enumerate(self.problem.groups):
            self.model.constant += 0.0 if g.beside else sum(w * t for w, t in zip(self.weights, g.cpu_us, strict=True))
            for node, share in enumerate(self.problem.node_share):
                whole = g.whole_bytes if node == self.problem.main else 0
                self._dram_fixed[node] += share * g.sliced_bytes + whole
            options = [*self.on_gpu[index], *(c for c in self.streams[index] if c is not None)]
            if options:
                pinned = g.pin is not None and g.pin.startswith("gpu")
                if pinned:
                    gpu = int(g.pin.partition(":")[2]) if g.pin else 0
                    stream = self.streams[index][gpu]
                    column = self.on_gpu[index][gpu]
                    if stream is not None:  # pinned to the GPU: at home there or streamed to it
                        self.model.lower[column] = 0.0
                self.model.row({c: 1.0 for c in options}, low=1.0 if pinned else 0.0, high=1)

    def _cpu_bytes(self, column: int, sliced: float, whole: float) -> None:
        for node, share in enumerate(self.problem.node_share):
            self._dram[node][column] += share * sliced + (whole if node == self.problem.main else 0.0)

    def _edges(self) -> None:
        for edge in self.problem.edges:
            for gpu in self.gpus:
                source = self._on(edge.source, gpu)
                cost = sum(w * t for w, t in zip(self.weights, edge.us[gpu], strict=True))
                crossing = self.model.column(cost, 1)
                for reader in edge.readers:
                    target = self._on(reader, gpu)
                    for sign in (1.0, -1.0):
                        row: dict[int, float] = defaultdict(float)
                        for c in target:
                            row[c] += sign
                        for c in source:
                            row[c] -= sign
                        row[crossing] -= 1.0
                        self.model.row(row, high=0)

    def _on(self, group: int, gpu: int) -> list[int]:
        stream = self.streams[group][gpu]
        return [self.on_gpu[group][gpu], *([stream] if stream is not None else [])]

    def _expert_set(self, e: ExpertSet) -> list[dict[str, int]]:
        longest = [self.model.column(w) for w in self.weights]
        columns: list[dict[str, int]] = []
        cpu_any = self.model.column(upper=1, integer=True) if self.gpus else None
        gpu_any = [self.model.column(upper=1, integer=True) for _ in self.gpus]
        count = sum(len(c.members) for c in e.classes)
        sliced: list[list[dict[int, float]]] = [[defaultdict(float) for _ in self.weights] for _ in self._nodes()]
        on_gpu: list[list[dict[int, float]]] = [[defaultdict(float) for _ in self.weights] for _ in self.gpus]
        link: list[list[dict[int, float]]] = [[defaultdict(float) for _ in self.weights] for _ in self.gpus]
        for cls in e.classes:
            options = self._class_options(e, cls)
            columns.append(options)
            self.model.row({c: 1.0 for c in options.values()}, low=len(cls.members), high=len(cls.members))
            for option, c in options.items():
                for p, step in enumerate(self.problem.phases):
                    streams = option.startswith("stream") and step.tokens > step.sequences
                    if option.startswith("gpu") or streams:
                        gpu = int(option.partition(":")[2])
                        on_gpu[gpu][p][c] += cls.gpu_us[gpu][p]
                        if streams:
                            link[gpu][p][c] += cls.stream_us[gpu][p]
                    else:
                        self._cpu_time(option, c, cls.cpu_us[p], [s[p] for s in sliced])
        self._any_rows(e, columns, cpu_any, gpu_any, count)
        self._longest_rows(e, longest, sliced, on_gpu, link, cpu_any, gpu_any)
        return columns

    def _nodes(self) -> range:
        return range(len(self.problem.node_share))

    def _class_options(self, e: ExpertSet, cls: ExpertClass) -> dict[str, int]:
        members = len(cls.members)
        # Cut or whole, but not both: the parts of an op on NUMA nodes are all of one kind.
        names = [f"cpu:{n}" for n in self.whole_nodes] or ["cpu"]
        names += [f"gpu:{i}" for i in self.gpus] + [f"stream:{i}" for i in self.gpus]
        if e.pin is not None:
            names = [n for n in names if n.partition(":")[0] == "cpu"] if e.pin == "cpu" else [e.pin]
        options = {}
        for name in names:
            c = options[name] = self.model.column(upper=members, integer=True)
            kind, _, number = name.partition(":")
            if kind == "gpu":
                self._vram[int(number)][c] += e.expert_bytes
                self.model.row({c: 1.0, self._used[int(number)]: -float(members)}, high=0)
            elif kind == "cpu" and number:
                self._dram[int(number)][c] += e.expert_bytes
            else:
                self._cpu_bytes(c, e.expert_bytes, 0)
                if kind == "stream":
                    self._pinned[c] += e.expert_bytes
                    self.model.row({c: 1.0, self._used[int(number)]: -float(members)}, high=0)
        return options

    def _cpu_time(self, option: str, column: int, us: float, nodes: list[dict[int, float]]) -> None:
        """Sliced experts occupy every node for their (already divided) time, whole ones only theirs, for longer."""
        number = option.partition(":")[2]
        for node in self._nodes():
            if not number:
                nodes[node][column] += us
            elif int(number) == node:
                nodes[node][column] += us / self.problem.node_share[node]

    def _any_rows(
        self, e: ExpertSet, columns: list[dict[str, int]], cpu_any: int | None, gpu_any: list[int], count: int
    ) -> None:
        if cpu_any is None:
            return
        on_cpu = {c: 1.0 for o in columns for n, c in o.items() if n.startswith(("cpu", "stream"))}
        self.model.row({**on_cpu, cpu_any: -float(count)}, high=0)
        for i in self.gpus:
            there = {c: 1.0 for o in columns for n, c in o.items() if n.endswith(f"u:{i}") and n.startswith("gpu")}
            if there:
                self.model.row({**there, gpu_any[i]: -float(count)}, high=0)

    def _longest_rows(
        self,
        e: ExpertSet,
        longest: list[int],
        sliced: list[list[dict[int, float]]],
        on_gpu: list[list[dict[int, float]]],
        link: list[list[dict[int, float]]],
        cpu_any: int | None,
        gpu_any: list[int],
    ) -> None:
        beside = [i for i, g in enumerate(self.problem.groups) if g.call == e.call and g.beside]
        for p in range(len(self.weights)):
            exchange = self._exchange(e, p, cpu_any, gpu_any)
            fixed = sum(self.problem.groups[b].cpu_us[p] for b in beside)
            for node in self._nodes():
                row = defaultdict(float, sliced[node][p])
                for b in beside:
                    for i in self.gpus:
                        row[self.on_gpu[b][i]] -= self.problem.groups[b].cpu_us[p]
                row[longest[p]] -= 1.0
                for c in exchange:
                    row[c] += 1.0
                self.model.row(row, high=-fixed)
            for i in self.gpus:
                row = defaultdict(float, on_gpu[i][p])
                for b in beside:
                    row[self.on_gpu[b][i]] += self.problem.groups[b].gpu_us[i][p]
                row[longest[p]] -= 1.0
                self.model.row(row, high=0)
                self.model.row({**link[i][p], longest[p]: -1.0}, high=0)
                self._joint_row(link[i][p], sliced, p, longest[p])

    def _joint_row(self, link: dict[int, float], sliced: list[list[dict[int, float]]], p: int, longest: int) -> None:
        """CPU cores and copies share the memory: in the worst case (the cores saturate it) their times add up in
        proportion to the link's part of it."""
        if not link or not self.problem.joint_share:
            return
        row = defaultdict(float, {c: us * self.problem.joint_share for c, us in link.items()})
        for c, us in sliced[self.problem.main][p].items():
            row[c] += us
        row[longest] -= 1.0
        self.model.row(row, high=0)

    def _exchange(self, e: ExpertSet, p: int, cpu_any: int | None, gpu_any: list[int]) -> list[int]:
        """Columns that cost what it takes to send the experts' input to the other side and their sum back: with the
        spine on a GPU and experts on the CPU, or the other way round."""
        found = []
        for i in self.gpus:
            c = self.model.column()
            us = e.exchange_us[i][p]
            spine = {s: us for s in self._on(e.spine, i)}
            assert cpu_any is not None
            self.model.row({**spine, cpu_any: us, c: -1.0}, high=us)
            self.model.row({**{s: -us for s in spine}, gpu_any[i]: us, c: -1.0}, high=0)
            found.append(c)
        return found

    def _limits(self) -> None:
        for i in self.gpus:
            terms = {**self._vram[i], self._used[i]: float(self.problem.workspace_bytes + self.problem.staging_bytes)}
            self.model.row(_scaled(terms), high=self.problem.gpu_bytes[i] / _SCALE)
        for node, free in enumerate(self.problem.node_bytes):
            workspace = self.problem.workspace_bytes if node == self.problem.main else 0
            fixed = self._dram_fixed[node] + workspace
            self.model.row(_scaled(self._dram[node]), high=(free - fixed) / _SCALE)
        if self._pinned:
            self.model.row(_scaled(self._pinned), high=self.problem.pinned_bytes / _SCALE)


# Bytes in the rows are given in MiB: HiGHS's feasibility tolerance of 1e-6 then means a byte or so.
_SCALE = float(1 << 20)


def _scaled(terms: dict[int, float]) -> dict[int, float]:
    return {c: v / _SCALE for c, v in terms.items() if v}
