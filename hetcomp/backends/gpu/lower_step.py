"""Lowers what a GPU does in a step to launches and hand-overs with addresses: one graph a number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetcomp.backends import packing
from hetcomp.backends.exchange import EXPERT_INPUTS, EXPERT_SUM, VALUE, Exchange
from hetcomp.backends.gpu.argmax import argmax
from hetcomp.backends.gpu.candidates import CANDIDATES_FROM, candidates
from hetcomp.backends.gpu.expert_cache import CACHE_TABLE, CachedLayer, CacheLayout
from hetcomp.backends.gpu.expert_stream import TABLES, StreamedLayer, StreamLayout
from hetcomp.backends.gpu.experts import combined_experts, entries_type, rounded_rows, wave_of_experts
from hetcomp.backends.gpu.groups import GpuGroup, group_ops
from hetcomp.backends.gpu.hand_out import add_missing, add_parts, add_sums, ask, hand_out
from hetcomp.backends.gpu.kernels import GpuCode, GpuKernel, GpuRequest, Launch, Operand
from hetcomp.backends.gpu.low_rank import PairTables
from hetcomp.backends.gpu.step_events import (
    AskExperts,
    AwaitExperts,
    Event,
    GiveValue,
    Result,
    Run,
    SomeExperts,
    TakeValue,
    added_at_once,
    reads_of,
)
from hetcomp.backends.gpu.step_graph import Await, Place, Raise, Rows, StepGraph
from hetcomp.backends.gpu.tile_choices import BY_TABLE, TileChoices
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.backends.gpu.weight_stream import RING, Portion, Wanted, WeightRing, portions_of
from hetcomp.ir.hand_overs import HandOver
from hetcomp.ir.homes import CPU
from hetcomp.ir.lifetimes import Lifetime, place_lifetimes
from hetcomp.ir.node_parts import cut_value
from hetcomp.ir.ops import MoeExperts, RmsNorm
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType, TensorType

ARENA = "arena"
LOGITS, BEST, CANDIDATES = "logits", "best", "candidates"


def _flag(number: int, giver: str, taker: str) -> dict[str, Any]:
    return {"flag": number, "from": giver, "to": taker}


def named_by(group: GpuGroup) -> Op:
    """The op that a trace calls the group's launches by: the first that is no norm on the way to another."""
    return next((op for op in group.ops if not isinstance(op.attrs, RmsNorm)), group.ops[0])


@dataclass
class StepLowering:
    """Lowers the events of ``gpu`` for one number of rows.

    ``values`` by id, those of the step and of the plan; ``places``: of values outside of the arena (weights, states, a
    step's inputs). ``dims``: as of GpuRequest, and ``slot_blocks``. ``residents``: places of tables of resident
    experts, filled as they are needed (``constants``: their numbers). ``pairs``: of adapters that the graph adds.
    ``arriving``: as of PromptOps, ``ring``: for these. ``tables``: of the experts that are here, by the op's output."""

    gpu: str
    events: Sequence[Event]
    values: dict[str, Value]
    places: dict[str, Place]
    exchange: Exchange
    stream: StreamLayout | None
    expert_cache: CacheLayout | None
    dims: Mapping[str, int]
    rows: Rows
    constants: dict[tuple[int, ...], int]
    tiles: TileChoices = BY_TABLE
    pairs: PairTables | None = None
    arriving: Mapping[str, str] = field(default_factory=dict)
    ring: WeightRing | None = None
    tables: dict[str, Value] = field(default_factory=dict)
    steps: list[GpuGroup | Raise | Await] = field(default_factory=list)

    def lower(self) -> StepGraph:
        """The graph. Raises HetcompError naming an op that there is no kernel for."""
        if self.rows.exact:
            self.events = added_at_once(self.events, self.exchange.optional)
        self._place_results()
        for i, event in enumerate(self.events):
            self._lower_event(i, event)
        return self._graph(self._stream_weights())

    @property
    def _exact(self) -> int | None:
        return self.rows.count if self.rows.exact else None

    def _place_results(self) -> None:
        """Results, and values whose one reader is a transfer, are written where the other side reads them."""
        for event in self.events:
            if isinstance(event, Result):
                self.places[event.op.inputs[0]] = Place(LOGITS)
            elif isinstance(event, GiveValue) and self._readers(event.op.inputs[0]) == 1:
                buffer = self.exchange.buffer(event.hand_over, VALUE)
                self.places.setdefault(event.op.inputs[0], Place(buffer.name))

    def _readers(self, name: str) -> int:
        return sum(reads_of(event).count(name) for event in self.events)

    def _lower_event(self, index: int, event: Event) -> None:
        match event:
            case Run(ops):
                elsewhere = {n for i, e in enumerate(self.events) if i != index for n in reads_of(e)}
                dims = self.rows.dims(self.dims)
                groups = group_ops(ops, self.values, elsewhere, dims, self._exact, self.tiles, self.pairs)
                self.values |= {v.id: v for group in groups for v in group.own}
                self.steps += groups
            case SomeExperts(op, _):
                self._some_experts(event)
            case AskExperts(op, hand_over):
                self._ask_experts(op, hand_over)
                if self.expert_cache is not None:
                    self._cached_experts(op, self.expert_cache.layer(hand_over.flag))
            case AwaitExperts():
                self._await_experts(index, event)
            case GiveValue(op, hand_over):
                target = self._pinned(hand_over, VALUE)
                if self.places.get(op.inputs[0]) != self.places[target]:
                    self.steps.append(hand_out(op, (self.values[op.inputs[0]],), (target,), self.rows.exact))
                self.steps.append(Raise(hand_over.flag, hand_over.taker))
            case TakeValue(op, hand_over):
                source = self._pinned(hand_over, VALUE)
                self.values[source] = replace(self.values[op.outputs[0]], id=source)
                if hand_over.giver == CPU:  # which answers when it is asked
                    self.steps.append(Raise(hand_over.flag, CPU))
                self.steps.append(Await(hand_over.flag, hand_over.giver))
                self.steps.append(hand_out(op, (self.values[source],), op.outputs, self.rows.exact))
            case Result(op):
                self._find_best(op)

    def _find_best(self, op: Op) -> None:
        """The most likely token of each row, and of a decode step's rows the most likely ones, so that neither greedy
        decoding nor, mostly, sampling need fetch the logits."""
        vocab = self.values[op.inputs[0]].type.shape[-1]
        assert isinstance(vocab, int)
        for name in (BEST, CANDIDATES):
            self.values[name] = Value(name, TensorType(DType.I32, ("R",)), ValueKind.OUTPUT)
            self.places[name] = Place(name)
        if self.rows.exact and vocab >= CANDIDATES_FROM:
            code = candidates(vocab, self.rows.count)
            self.steps.append(GpuGroup((op,), op.inputs, (BEST, CANDIDATES), code))
        else:
            code = argmax(vocab, self.rows.logit_rows, self.rows.exact)
            self.steps.append(GpuGroup((op,), op.inputs, (BEST,), code))

    def _pinned(self, hand_over: HandOver, part: str) -> str:
        """A name for a pinned buffer among the values."""
        buffer = self.exchange.buffer(hand_over, part).name
        self.places[f"pinned {buffer}"] = Place(buffer)
        return f"pinned {buffer}"

    def _streamed(self, hand_over: HandOver) -> StreamedLayer | None:
        """What is streamed of the layer in this graph: in steps of a prompt alone."""
        if self.stream is None or self.rows.exact:
            return None
        return next((layer for layer in self.stream.layers if layer.hand_over == hand_over.flag), None)

    def _ask_experts(self, op: Op, hand_over: HandOver) -> None:
        outputs = tuple(self._pinned(hand_over, part) for part in EXPERT_INPUTS)
        inputs = tuple(self.values[name] for name in op.inputs[: len(EXPERT_INPUTS)])
        if self._exact is not None and self.exchange.optional:
            self.steps.append(ask(op, inputs, outputs, self._exact, hand_over.flag))
            return
        layer = self._streamed(hand_over)
        wanted = self._table_value("ask", TABLES, self.stream.ask(layer)) if self.stream and layer else None
        self.steps += [hand_out(op, inputs, outputs, self.rows.exact, wanted), Raise(hand_over.flag, CPU)]

    def _table_value(self, name: str, buffer: str, offset: int, numbers: int = 1) -> Value:
        """i32 numbers of the stream's or the cache's tables as a value."""
        value = Value(f"{name} {offset}", TensorType(DType.I32, (numbers,)), ValueKind.CONST)
        self.places[value.id] = Place(buffer, offset)
        self.values[value.id] = value
        return value

    def _some_experts(self, event: SomeExperts) -> None:
        op, part = event.op, event.part
        assert isinstance(op.attrs, MoeExperts)
        rows = part.places(op.attrs.experts)
        offset = self.constants.setdefault(rows, 64 * sum(-(-4 * len(r) // 64) for r in self.constants))
        table = Value(f"residents {offset}", TensorType(DType.I32, (op.attrs.experts,)), ValueKind.CONST)
        self.places[table.id] = Place("constants", offset)
        cuts = dict(part.cuts)
        weights = [
            cut_value(self.values[name], cuts[i], part.node) if i in cuts else self.values[name]
            for i, name in enumerate(op.inputs)
        ]
        self._experts_of(op, weights, table)

    def _cached_experts(self, op: Op, layer: CachedLayer) -> None:
        """Those that are in slots in this step."""
        assert self.expert_cache is not None
        slots = {operand.operand: operand for operand in layer.operands}
        weights = [slots[i].slots if i in slots else self.values[name] for i, name in enumerate(op.inputs)]
        for operand in layer.operands:
            self.places[operand.slots.id] = Place(operand.buffer, operand.offset)
        offset = layer.row * self.expert_cache.row_bytes
        table = self._table_value("cached", CACHE_TABLE, offset, layer.streamed.experts)
        self._experts_of(op, weights, table)

    def _streamed_experts(self, op: Op, layer: StreamedLayer) -> None:
        """Those that come to slots, wave after wave; the GPU says when a wave's may be overwritten. A choice's result
        has a place of its own, and a token's are added up when all are there: in the order of its choices, whatever
        wave each was in."""
        assert self.stream is not None and isinstance(op.attrs, MoeExperts)
        slots = {operand.operand: operand for operand in layer.operands}
        for operand in layer.operands:
            self.places[operand.slots.id] = Place(operand.buffer)
        form = str(slots[3].slots.format)
        x, ids, *others = self.values[op.inputs[0]], *(self.values[name] for name in op.inputs[1:])
        if form != "f32" and x.type.dtype is DType.F32:
            x = self._rounded(op, x)
        weights = [slots[i].slots if i in slots else v for i, v in enumerate((x, ids, *others)) if i >= 2]
        entries = Value(f"{op.outputs[0]} entries", entries_type(op.attrs, form), ValueKind.ACT)
        total = replace(self.values[op.outputs[0]], id=f"{op.outputs[0]} streamed")
        self.values |= {v.id: v for v in (*weights, entries, total)}
        for wave in range(layer.waves):
            if wave > 0:
                self.steps.append(Raise(layer.flag + wave - 1, CPU))
            self.steps.append(Await(layer.flag + wave, CPU))
            offset = self.stream.table(layer, wave)
            table = self._table_value("slots", TABLES, offset, layer.experts)
            self._add(wave_of_experts, op, (x, ids, *weights, table), entries)
        table = self._table_value("slots", TABLES, self.stream.table_of_all(layer), layer.experts)
        part_op = replace(op, outputs=(total.id,))
        code = combined_experts(op.attrs, form)
        self.steps.append(GpuGroup((part_op,), (entries.id, ids.id, table.id), (total.id,), code))
        self.steps.append(Raise(layer.flag + layer.waves - 1, CPU))

    def _rounded(self, op: Op, x: Value) -> Value:
        """What experts' products read of x, f32, written once for all waves."""
        rounded = replace(x, id=f"{op.outputs[0]} input", type=replace(x.type, dtype=DType.BF16), kind=ValueKind.ACT)
        self.values[rounded.id] = rounded
        self._add(rounded_rows, op, (x,), rounded)
        return rounded

    def _add(self, emit: Callable[[GpuRequest], GpuCode], op: Op, operands: Sequence[Value], result: Value) -> None:
        """Launches of a part of an op of experts."""
        part_op = replace(op, outputs=(result.id,))
        dims = self.rows.dims(self.dims)
        pairs = self.pairs.of("T", *op.inputs[3:5]) if self.pairs is not None else None
        request = GpuRequest(
            part_op, tuple(operands), (result,), dims, self._exact, resident=True, tiles=self.tiles, pairs=pairs
        )
        names = tuple(v.id for v in operands)
        self.steps.append(GpuGroup((part_op,), names, (result.id,), emit(request)))

    def _experts_of(self, op: Op, weights: Sequence[Value], table: Value) -> None:
        """The sum over those experts that ``table`` has a place of among ``weights``."""
        total = replace(self.values[op.outputs[0]], id=f"{op.outputs[0]} here")
        self.values |= {v.id: v for v in (*weights, table, total)}
        self.tables[op.outputs[0]] = table
        self._add(TritonBackend().emit, op, (*weights, table), total)

    def _await_experts(self, index: int, event: AwaitExperts) -> None:
        op = event.op
        total = self.values[op.outputs[0]]
        layer = self._streamed(event.hand_over)
        if layer is not None:
            self._streamed_experts(op, layer)
        there = self._pinned(event.hand_over, EXPERT_SUM)
        self.values[there] = replace(total, id=there)
        some = event.some or self.expert_cache is not None
        if self._exact is not None and event.hand_over.flag in self.exchange.optional:
            self._add_missing(event, self.values[there])
            return
        self.steps.append(Await(event.hand_over.flag, CPU))
        here = [self.values[f"{total.id} here"]] if some else []
        if layer is not None and self.stream is not None:
            here.append(self.values[f"{total.id} streamed"])
            part = self._table_value("part", TABLES, self.stream.part(layer))
            self.steps.append(add_parts(op, here, self.values[there], part, total))
        elif some:
            self.steps.append(add_sums(op, here[0], self.values[there], total, self._exact))
        elif self._read_before_next_sum(total.id, index):
            self.places[total.id] = self.places[there]
        else:
            self.steps.append(hand_out(op, (self.values[there],), (total.id,), self.rows.exact))

    def _add_missing(self, event: AwaitExperts, there: Value) -> None:
        op, total = event.op, self.values[event.op.outputs[0]]
        here, ids, table = self.values[f"{total.id} here"], self.values[op.inputs[1]], self.tables[total.id]
        onto = None
        if event.added is not None:
            total = self.values[event.added.outputs[0]]
            onto = next(self.values[name] for name in event.added.inputs if name != op.outputs[0])
        before = self.exchange.before(event.hand_over)
        self.steps.append(add_missing(op, here, there, ids, table, onto, total, event.hand_over.flag, before))

    def _read_before_next_sum(self, name: str, index: int) -> bool:
        """Whether the pinned sum may stand for the value: the CPU writes the next when it has that layer's input, which
        may be another GPU's if this one gives values away."""
        later = self.events[index + 1 :]
        end = next((i for i, e in enumerate(later) if isinstance(e, AskExperts | GiveValue)), len(later))
        return all(name not in reads_of(e) for e in later[end:])

    def _stream_weights(self) -> tuple[Portion, ...]:
        """Gives the arriving weights places, and the launches that read them waits and hand-overs around."""
        if self.ring is None:
            return ()
        wanted: list[Wanted] = []
        for i, step in enumerate(self.steps):
            names = [n for n in step.inputs if n in self.arriving] if isinstance(step, GpuGroup) else []
            sizes = {name: (self.arriving[name], packing.packed_bytes(self.values[name])) for name in names}
            wanted += [Wanted(i, sizes)] if sizes else []
        portions = portions_of(wanted, self.ring.bytes, self.ring.first_flag)
        before = {portion.first: Await(portion.flag, CPU) for portion in portions}
        behind = {portion.last: Raise(portion.flag, CPU) for portion in portions}
        steps: list[GpuGroup | Raise | Await] = []
        for i, step in enumerate(self.steps):
            steps += [*([before[i]] if i in before else []), step, *([behind[i]] if i in behind else [])]
        self.steps = steps
        self.places |= {a.value: Place(RING, a.to) for portion in portions for a in portion.arrivals}
        return portions

    def _graph(self, portions: tuple[Portion, ...]) -> StepGraph:
        slots, arena = self._arena()
        nodes: list[dict[str, Any]] = []
        kernels: dict[str, GpuKernel] = {}
        for i, step in enumerate(self.steps):
            if isinstance(step, GpuGroup):
                for launch in step.code.launches:
                    kernels[launch.kernel.name] = launch.kernel
                    nodes.append(self._node(step, launch, slots, i))
            elif isinstance(step, Raise):
                nodes.append({"hand_over": _flag(step.flag, self.gpu, step.to)})
            else:
                nodes.append({"hand_over": _flag(step.flag, step.source, self.gpu)})
        for i, node in enumerate(nodes):
            node["after"] = [i - 1] if i else []
        groups = tuple(step for step in self.steps if isinstance(step, GpuGroup))
        adapted = self.pairs is not None
        return StepGraph(self.rows, tuple(nodes), kernels, arena, groups, self.values, adapted, portions)

    def _arena(self) -> tuple[dict[str, int], int]:
        """Offsets of the values and workspaces, and the size: the steps run one after the other."""
        dims = self.rows.dims(self.dims)
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        lives: list[Lifetime] = []
        for i, step in enumerate(self.steps):
            if not isinstance(step, GpuGroup):
                continue
            for name in (*step.inputs, *step.outputs):
                if name not in self.places:
                    first.setdefault(name, i)
                    last[name] = i
            if step.code.workspace_bytes:
                lives.append(Lifetime(f"workspace {i}", step.code.workspace_bytes, i, i))
        lives += [Lifetime(n, self.values[n].type.bytes(dims), first[n], last[n]) for n in first]
        slots, end = place_lifetimes(lives, 0)
        return {slot.value: slot.offset for slot in slots}, end

    def _node(self, group: GpuGroup, launch: Launch, slots: Mapping[str, int], index: int) -> dict[str, Any]:
        shape = self.values[(group.ops[0].outputs or group.ops[0].inputs)[0]].type.shape
        rows = self.rows.logit_rows if shape[0] == "R" else self.rows.count
        op = named_by(group)
        layer = {} if op.layer is None else {"layer": op.layer}
        return {
            "kernel": launch.kernel.name,
            "role": op.role,
            **layer,
            "grid": [axis.programs(rows) for axis in launch.grid],
            "arguments": [self._argument(operand, group, slots, index) for operand in launch.operands],
        }

    def _argument(self, operand: Operand, group: GpuGroup, slots: Mapping[str, int], index: int) -> dict[str, Any]:
        if operand.source in ("raises", "awaits"):
            ends = (self.gpu, operand.name) if operand.source == "raises" else (operand.name, self.gpu)
            return _flag(operand.index, *ends)
        if operand.source == "slot_blocks":
            return {"i32": self.dims["slot_blocks"]}
        if operand.source == "step":
            return {"buffer": operand.name, "offset": 0}
        if operand.source == "adapters":
            return {"buffer": operand.name, "offset": operand.offset}
        if operand.source == "workspace":
            return {"buffer": ARENA, "offset": slots[f"workspace {index}"] + operand.offset}
        name = (group.inputs if operand.source == "input" else group.outputs)[operand.index]
        place = self.places.get(name) or Place(ARENA, slots[name])
        return {"buffer": place.buffer, "offset": place.offset + operand.offset}
