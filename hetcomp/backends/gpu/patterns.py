"""Which ops of a run can share launches: found once, from who reads and writes what."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends import packing
from hetcomp.backends.gpu.gemv import GEMV_ROWS, MAX_ADDED
from hetcomp.ir.ops import Linear, RmsNorm
from hetcomp.ir.plan import Op, Value, ValueKind

# A GEMV of more panels takes longer by the norm's multiplications, done by every program, than a launch saved.
_FOLDED_PANELS = 2048


@dataclass(frozen=True)
class GluPair:
    """Numbers of two linears of the same input and of the glu that alone reads them."""

    gate: int
    up: int
    glu: int


class Run:
    """The ops by number, who reads and writes each value, and the patterns among them."""

    def __init__(
        self, ops: Sequence[Op], values: Mapping[str, Value], wanted: Container[str], rows: int | None
    ) -> None:
        self.ops = ops
        self.values = values
        self.wanted = wanted
        self.decode = rows is not None and rows <= GEMV_ROWS
        self.writer: dict[str, int] = {v: i for i, op in enumerate(ops) for v in op.outputs}
        self.readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for v in dict.fromkeys(op.inputs):
                self.readers.setdefault(v, []).append(i)
        self.waits = self._state_order()
        self.glus: dict[int, GluPair] = {}
        self.adds: dict[int, list[int]] = {}  # by the linear or moe_experts whose launch does them
        if self.decode:
            self._find_glus()
            self._find_adds()

    def sole_reader(self, value: str) -> int | None:
        """The only op that reads the value; None if there are several or it is read elsewhere too."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.wanted else None

    def weight_format(self, i: int) -> str:
        """Format of a linear's weight."""
        return str(self.values[self.ops[i].inputs[1]].format)

    def plain_linear(self, i: int) -> bool:
        """Whether the op is a linear that may share a launch with others of its input."""
        return self.ops[i].kind == "linear" and i not in self.glus and i not in self.adds

    def alike(self, i: int, j: int) -> bool:
        """Whether two linears can be one launch."""
        a, b = self.ops[i], self.ops[j]
        return (
            a.inputs[0] == b.inputs[0]
            and len(a.inputs) == len(b.inputs)
            and self.weight_format(i) == self.weight_format(j)
        )

    def folds(self, i: int, value: str) -> bool:
        """Whether op ``i`` can work on what the norm that writes ``value`` reads."""
        op = self.ops[i]
        if value not in op.inputs[:1] or value in op.inputs[1:] or not self.decode:
            return False
        if isinstance(op.attrs, Linear):
            return -(-op.attrs.out_features // packing.PANEL) <= _FOLDED_PANELS
        return op.kind == "moe_experts"

    def foldable(self, i: int) -> bool:
        """Whether a norm needs no launch of its own: its readers do it on the way, and if its result is read otherwise
        too, one of them can write that."""
        op = self.ops[i]
        if not self.decode or not isinstance(op.attrs, RmsNorm) or op.attrs.groups != 1:
            return False
        (result,) = op.outputs
        folding = [j for j in self.readers.get(result, []) if self.folds(j, result)]
        return bool(folding) and (not self.must_be_written(i) or any(map(self.plain_linear, folding)))

    def must_be_written(self, i: int) -> bool:
        """Whether somebody reads a norm's result who cannot do the norm."""
        (result,) = self.ops[i].outputs
        return result in self.wanted or not all(self.folds(j, result) for j in self.readers.get(result, []))

    def _state_order(self) -> list[set[int]]:
        """For each op the ops that must have been run because of a state: appends before reads, and the reverse."""
        waits: list[set[int]] = []
        touched: dict[str, list[int]] = {}
        for i, op in enumerate(self.ops):
            before: set[int] = set()
            for v in op.inputs:
                if self.values[v].kind is ValueKind.STATE:
                    earlier = touched.setdefault(v, [])
                    append = op.kind == "kv_append"
                    before.update(j for j in earlier if append or self.ops[j].kind == "kv_append")
                    earlier.append(i)
            waits.append(before)
        return waits

    def _find_glus(self) -> None:
        for i, op in enumerate(self.ops):
            if op.kind != "glu":
                continue
            gate, up = (self.writer.get(v, -1) for v in op.inputs)
            if min(gate, up) < 0 or gate == up or {self.ops[gate].kind, self.ops[up].kind} != {"linear"}:
                continue
            if self.alike(gate, up) and all(self.sole_reader(v) == i for v in op.inputs):
                self.glus.update(dict.fromkeys((gate, up, i), GluPair(gate, up, i)))

    def _find_adds(self) -> None:
        """Gives each add to the launch that makes one of its operands for it alone: to that of experts rather than to a
        linear's, to a later one rather than to an earlier one."""
        hosts = {
            op.outputs[0]: i
            for i, op in enumerate(self.ops)
            if op.kind == "moe_experts" or (op.kind == "linear" and i not in self.glus)
        }
        for i, op in enumerate(self.ops):
            if op.kind != "add" or op.inputs[0] == op.inputs[1]:
                continue
            able = [hosts[v] for v in op.inputs if v in hosts and self.sole_reader(v) == i]
            able = [host for host in able if len(self.adds.get(host, [])) < MAX_ADDED]
            if able:
                host = max(able, key=lambda h: (self.ops[h].kind == "moe_experts", h))
                self.adds.setdefault(host, []).append(i)
                hosts[op.outputs[0]] = host

    def dissolve(self, i: int) -> None:
        """Takes apart the patterns that op ``i`` begins: its parts are ops of their own."""
        self.adds.pop(i, None)
