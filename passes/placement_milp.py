"""The placement problem as a mixed-integer linear program."""

from __future__ import annotations

from collections import defaultdict

from hetcomp.passes.linear_model import RELATIVE_GAP, LinearModel, Solved
from hetcomp.passes.placement_assignment import Assignment, gpu_of, overrun_us, whole_gpu_us
from hetcomp.passes.placement_problem import ExpertClass, ExpertSet, Problem

# Equal GPUs make the last half percent a long search among mirror images.
GAP_OF_SEVERAL_GPUS = 5e-3


class PlacementModel:
    """Columns and rows of a :class:`Problem`.

    Times of groups add up along the chain of the layers. Where a call has experts, the CPU's experts, each GPU's, the
    copies of streamed weights and the ops beside them run at the same time: the call takes the longest of them, in
    each phase. Expected values stand for the routing (the simulation samples it), but for what single experts on the
    CPU cost where few are (see overrun_us).
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
        # A GPU column is 1 if anything of it is used: it then holds the workspace; if experts are streamed to it, the
        # ring too; and the buffers of the largest group that is.
        self._used = [self.model.column(upper=1, integer=True) for _ in self.gpus]
        self._rings = [self.model.column(upper=1, integer=True) for _ in self.gpus]
        self._buffers = [self.model.column() for _ in self.gpus]
        self.on_gpu = [[self._group_column(g, i) for i in self.gpus] for g in range(len(problem.groups))]
        self.streams = [[self._stream_column(g, i) for i in self.gpus] for g in range(len(problem.groups))]
        self._groups()
        self._edges()
        self.expert_columns = [self._expert_set(e) for e in problem.experts]
        self._limits()

    def solve(self) -> tuple[Assignment | None, Solved]:
        """The assignment and what HiGHS says of it; None if it found nothing that fits."""
        solved = self.model.solve(RELATIVE_GAP if len(self.gpus) < 2 else GAP_OF_SEVERAL_GPUS)
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
        if g.pin not in (None, "gpu"):
            fixed = float(g.pin == f"gpu:{gpu}")
            self.model.lower[column], self.model.upper[column] = fixed, fixed
        return column

    def _stream_column(self, group: int, gpu: int) -> int | None:
        """Runs on the GPU, weights copied there in every step; worth a variable only for real weights."""
        g = self.problem.groups[group]
        weights = g.weight_bytes
        if not self.problem.streaming or weights < (1 << 22) * g.layers or g.beside:
            return None
        if not g.may_be_on(f"gpu:{gpu}"):
            return None
        us = [max(g.gpu_us[gpu][p], g.stream_us[gpu]) - g.cpu_us[p] for p in range(len(self.weights))]
        column = self.model.column(sum(w * t for w, t in zip(self.weights, us, strict=True)), 1, integer=True)
        self._vram[gpu][column] += g.state_bytes
        self.model.row({column: g.buffer_bytes / _SCALE, self._buffers[gpu]: -1.0}, high=0)
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
                if pinned and g.pin != "gpu":
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
        columns = [self._class_options(e, cls) for cls in e.classes]
        for cls, options in zip(e.classes, columns, strict=True):
            self.model.row({c: 1.0 for c in options.values()}, low=len(cls.members), high=len(cls.members))
        # Which devices compute experts, in steps that stream and in those that do not.
        anywhere = {streams: self._any_columns(e, columns, streams) for streams in (False, True)}
        for p, step in enumerate(self.problem.phases):
            streams = step.tokens > step.sequences
            self._longest_rows(e, columns, longest[p], p, streams, *anywhere[streams])
        return columns

    def _any_columns(self, e: ExpertSet, columns: list[dict[str, int]], streams: bool) -> tuple[int, list[int]]:
        """Columns that are 1 where experts are computed on the CPU, and on each GPU, in such steps."""
        count = float(sum(len(c.members) for c in e.classes))
        cpu = self.model.column(upper=1, integer=True)
        self.model.row(
            {**{c: 1.0 for o in columns for n, c in o.items() if not gpu_of(n, streams)}, cpu: -count}, high=0
        )
        gpus = []
        for i in self.gpus:
            gpus.append(self.model.column(upper=1, integer=True))
            there = {c: 1.0 for o in columns for n, c in o.items() if gpu_of(n, streams) == f"gpu:{i}"}
            self.model.row({**there, gpus[i]: -count}, high=0)
        return cpu, gpus

    def _nodes(self) -> range:
        return range(len(self.problem.node_share))

    def _class_options(self, e: ExpertSet, cls: ExpertClass) -> dict[str, int]:
        members = len(cls.members)
        # Cut or whole, but not both: the parts of an op on NUMA nodes are all of one kind.
        names = [f"cpu:{n}" for n in self.whole_nodes] or ["cpu"]
        names += [f"gpu:{i}" for i in self.gpus]
        names += [f"stream:{i}" for i in self.gpus if self.problem.streaming]
        if e.pin is not None:
            names = [n for n in names if n.partition(":")[0] == "cpu"] if e.pin == "cpu" else [e.pin]
        options = {}
        for name in names:
            c = options[name] = self.model.column(upper=members, integer=True)
            kind, _, number = name.partition(":")
            if kind == "gpu":
                self._vram[int(number)][c] += e.expert_bytes
                self.model.row({c: 1.0, self._used[int(number)]: -float(members)}, high=0)
                if not self.problem.streaming:
                    self.model.row({c: 1.0, self.on_gpu[e.spine][int(number)]: -float(members)}, high=0)
            elif kind == "cpu" and number:
                self._dram[int(number)][c] += e.expert_bytes
            else:
                self._cpu_bytes(c, e.expert_bytes, 0)
                if kind == "stream":
                    self._pinned[c] += e.expert_bytes
                    for needed in (self._used[int(number)], self._rings[int(number)]):
                        self.model.row({c: 1.0, needed: -float(members)}, high=0)
        return options

    def _cpu_terms(
        self, e: ExpertSet, columns: list[dict[str, int]], node: int, p: int, streams: bool
    ) -> dict[int, float]:
        """Time of the node's lane: sliced experts occupy every node for their (already divided) time, whole ones only
        theirs, for longer."""
        terms: dict[int, float] = {}
        for cls, options in zip(e.classes, columns, strict=True):
            for option, c in options.items():
                kind, _, number = option.partition(":")
                if gpu_of(option, streams):
                    continue
                if kind == "stream" or not number:
                    terms[c] = cls.cpu_us[p]
                elif int(number) == node:
                    terms[c] = cls.cpu_us[p] / self.problem.node_share[node]
        return terms

    def _longest_rows(
        self,
        e: ExpertSet,
        columns: list[dict[str, int]],
        longest: int,
        p: int,
        streams: bool,
        cpu_any: int,
        gpu_any: list[int],
    ) -> None:
        problem = self.problem
        beside = [i for i, g in enumerate(problem.groups) if g.call == e.call and g.beside]
        fixed = sum(problem.groups[b].cpu_us[p] for b in beside)
        sent = self._sent(e, p, cpu_any)
        for node in self._nodes():
            row = defaultdict(float, self._cpu_terms(e, columns, node, p, streams))
            for b in beside:
                for i in self.gpus:
                    row[self.on_gpu[b][i]] -= problem.groups[b].cpu_us[p]
            row[cpu_any] += problem.barrier_us * e.layers
            for c in sent:
                row[c] += 1.0
            self.model.row({**row, longest: -1.0}, high=-fixed)
        for i in self.gpus:
            row = defaultdict(float, {gpu_any[i]: problem.launch_us[i] * e.layers, longest: -1.0})
            link: dict[int, float] = {}
            for cls, options in zip(e.classes, columns, strict=True):
                for option in (o for o in options if gpu_of(o, streams) == f"gpu:{i}"):
                    row[options[option]] += cls.gpu_us[i][p]
                    if option.startswith("stream"):
                        link[options[option]] = cls.stream_us[i][p]
            for b in beside:
                row[self.on_gpu[b][i]] += problem.groups[b].gpu_us[i][p]
            self.model.row({**row, self._received(e, i, p, gpu_any[i]): 1.0}, high=0)
            self._overrun_row(e, columns, i, p, streams, row, beside)
            if link:
                self.model.row({**link, longest: -1.0}, high=0)
                self._joint_row(link, self._cpu_terms(e, columns, problem.main, p, streams), longest)

    def _overrun_row(
        self,
        e: ExpertSet,
        columns: list[dict[str, int]],
        gpu: int,
        p: int,
        streams: bool,
        on_gpu: dict[int, float],
        beside: list[int],
    ) -> None:
        extra = overrun_us(self.problem, e, gpu, p, whole_gpu_us(self.problem, e, beside, gpu, p))
        by_class = zip(columns, extra, strict=True)
        terms = {c: us for o, us in by_class for name, c in o.items() if us > 0 and gpu_of(name, streams) is None}
        if terms:
            most = sum(us * len(c.members) for us, c in zip(extra, e.classes, strict=True))
            spine = {c: most for c in self._on(e.spine, gpu)}
            self.model.row({**on_gpu, **terms, **spine}, high=most)

    def _joint_row(self, link: dict[int, float], cpu: dict[int, float], longest: int) -> None:
        """CPU cores and copies share the memory: in the worst case (the cores saturate it) their times add up in
        proportion to the link's part of it."""
        if self.problem.joint_share:
            shared = {c: us * self.problem.joint_share for c, us in link.items()}
            self.model.row({**cpu, **shared, longest: -1.0}, high=0)

    def _sent(self, e: ExpertSet, p: int, cpu_any: int) -> list[int]:
        """Columns that cost what it takes to send the experts' input from each GPU to the CPU and the sum back."""
        found = []
        for i in self.gpus:
            us = e.exchange_us[i][p]
            found.append(self.model.column())
            self.model.row({**{s: us for s in self._on(e.spine, i)}, cpu_any: us, found[i]: -1.0}, high=us)
        return found

    def _received(self, e: ExpertSet, gpu: int, p: int, gpu_any: int) -> int:
        """A column that costs the same where GPU ``gpu`` computes experts whose input is made elsewhere."""
        us, column = e.exchange_us[gpu][p], self.model.column()
        self.model.row({**{s: -us for s in self._on(e.spine, gpu)}, gpu_any: us, column: -1.0}, high=0)
        return column

    def _limits(self) -> None:
        for i in self.gpus:
            terms = {
                **self._vram[i],
                self._used[i]: float(self.problem.workspace_bytes),
                self._rings[i]: float(self.problem.staging_bytes),
                self._buffers[i]: _SCALE,
            }
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
