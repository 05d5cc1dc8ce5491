"""Which ops of a run can share launches: found once, from who reads and writes what."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.backends import packing
from hetcomp.backends.gpu.gemv import GEMV_ROWS, MAX_ADDED, split_of
from hetcomp.backends.gpu.heads import HeadAttrs
from hetcomp.backends.gpu.mla import LatentOps, find_latent_ops
from hetcomp.backends.gpu.rounded_values import find_rounded
from hetcomp.ir.layouts import has_act_order
from hetcomp.ir.ops import STATE_WRITERS, Attention, Glu, KvAppend, Linear, RmsNorm, Rope
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import DType

# A GEMV of more panels takes longer by the norm's multiplications, done by every program, than a launch saved.
_FOLDED_PANELS = 2048


@dataclass(frozen=True)
class GluPair:
    """Numbers of two linears of the same input and of the glu that alone reads them."""

    gate: int
    up: int
    glu: int


@dataclass(frozen=True)
class HeadOps:
    """Numbers of the ops between the projections of one attention and itself; norms are None where it has none."""

    q_norm: int | None
    k_norm: int | None
    q_rope: int
    k_rope: int
    k_append: int
    v_append: int
    attrs: HeadAttrs

    def members(self) -> list[int]:
        """All of them, in order."""
        ops = (self.q_norm, self.k_norm, self.q_rope, self.k_rope, self.k_append, self.v_append)
        return sorted(i for i in ops if i is not None)


class Run:
    """The ops by number, who reads and writes each value, and the patterns among them."""

    def __init__(
        self, ops: Sequence[Op], values: Mapping[str, Value], wanted: Container[str], rows: int | None
    ) -> None:
        self.ops = ops
        self.values = values
        self.wanted = wanted
        self.rows = rows
        self.decode = rows is not None and rows <= GEMV_ROWS
        kept = [v for v in values.values() if v.kind in (ValueKind.WEIGHT, ValueKind.STATE)]
        self.f32 = all(v.format in (None, "f32") and v.type.dtype is DType.F32 for v in kept)
        self.writer: dict[str, int] = {v: i for i, op in enumerate(ops) for v in op.outputs}
        self.readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for v in dict.fromkeys(op.inputs):
                self.readers.setdefault(v, []).append(i)
        self.waits = self._state_order()
        self.glus: dict[int, GluPair] = {}
        self.adds: dict[int, list[int]] = {}  # by the linear or moe_experts whose launch does them
        self.heads: dict[int, HeadOps] = {}
        self.latents: dict[int, LatentOps] = {}
        self.routes: dict[int, int] = {}  # by the linear whose result only they read
        self.normed_adds: dict[int, int] = {}  # norms by the add whose result they read
        self.gated_norms: dict[int, int] = {}  # glus by the norm whose result they alone read, as ``up``
        self._find_heads()
        if self.decode:
            self._find_glus()
            self._find_adds()
            self._find_routes()
        self._find_normed_adds()
        self._find_gated_norms()
        self.rounded = find_rounded(self)

    def parts(self, i: int) -> list[int]:
        """The ops of the pattern that op ``i`` begins; itself if it begins none."""
        if i in self.heads:
            return self.heads[i].members()
        if i in self.latents:
            return self.latents[i].members()
        if i in self.glus:
            pair = self.glus[i]
            return [pair.gate, pair.up, pair.glu]
        if i in self.routes:
            return [i, self.routes[i]]
        if i in self.normed_adds:
            return [i, self.normed_adds[i]]
        if i in self.gated_norms:
            return [i, self.gated_norms[i]]
        return [i, *self.adds.get(i, [])]

    def sole_reader(self, value: str) -> int | None:
        """The only op that reads the value; None if there are several or it is read elsewhere too."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.wanted else None

    def weight_format(self, i: int) -> str:
        """Format of a linear's weight."""
        return str(self.values[self.ops[i].inputs[1]].format)

    def act_order(self, i: int) -> bool:
        """Whether the columns of a linear's weight have an order of their own."""
        return has_act_order(self.values[self.ops[i].inputs[1]].type.layout)

    def plain_linear(self, i: int) -> bool:
        """Whether the op is a linear that may share a launch with others of its input."""
        return self.ops[i].kind == "linear" and i not in {**self.glus, **self.adds, **self.routes}

    def alike(self, i: int, j: int) -> bool:
        """Whether two linears can be one launch."""
        a, b = self.ops[i], self.ops[j]
        return (
            a.inputs[0] == b.inputs[0]
            and len(a.inputs) == len(b.inputs)
            and self.weight_format(i) == self.weight_format(j)
            and self.act_order(i) == self.act_order(j)
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
        """For each op the ops that must have been run because of a state: writes before reads, and the reverse."""
        waits: list[set[int]] = []
        touched: dict[str, list[int]] = {}
        for i, op in enumerate(self.ops):
            before: set[int] = set()
            for v in op.inputs:
                if self.values[v].kind is ValueKind.STATE:
                    earlier = touched.setdefault(v, [])
                    writes = op.kind in STATE_WRITERS
                    before.update(j for j in earlier if writes or self.ops[j].kind in STATE_WRITERS)
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
            if self.alike(gate, up) and not self.act_order(gate) and all(self.sole_reader(v) == i for v in op.inputs):
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

    def _find_routes(self) -> None:
        """Routers that are split (gemv.split_of): each by itself, where nobody wants the logits or needs it to write
        its norm's result."""
        for i, op in enumerate(self.ops):
            if op.kind != "route":
                continue
            router = self.writer.get(op.inputs[0])
            if router is None or not self.plain_linear(router) or self.sole_reader(op.inputs[0]) != i:
                continue
            x, attrs = self.ops[router].inputs[0], self.ops[router].attrs
            norm = self.writer.get(x)
            others = [j for j in self.readers[x] if j != router and self.plain_linear(j)]
            alone = not any(self.alike(router, j) for j in others)
            owed = norm is not None and not others and self.foldable(norm) and self.must_be_written(norm)
            assert isinstance(attrs, Linear)
            if alone and not owed and split_of(attrs.out_features, attrs.in_features, self.weight_format(router)):
                self.routes[router] = i

    def _find_heads(self) -> None:
        for i, op in enumerate(self.ops):
            if not isinstance(op.attrs, Attention):
                continue
            if op.attrs.shared_kv:
                latent = find_latent_ops(self, i) if self.decode else None
                self.latents.update(dict.fromkeys(latent.members(), latent) if latent else {})
                continue
            k_append, v_append = (self.append_to(state, i) for state in op.inputs[1:3])
            if k_append is None or v_append is None:
                continue
            q_rope, q_norm = self._rotation(op.inputs[0], None)
            k_rope, k_norm = self._rotation(self.ops[k_append].inputs[0], k_append)
            if q_rope is None or k_rope is None:
                continue
            attrs = self._head_attrs(q_norm, k_norm, q_rope, k_rope, k_append, v_append)
            if attrs is not None:
                found = HeadOps(q_norm, k_norm, q_rope, k_rope, k_append, v_append, attrs)
                self.heads.update(dict.fromkeys(found.members(), found))

    def append_to(self, state: str, reader: int) -> int | None:
        """The only op before ``reader`` that touches a state, an append."""
        before = [j for j in self.readers[state] if j < reader]
        return before[0] if len(before) == 1 and self.ops[before[0]].kind == "kv_append" else None

    def _rotation(self, value: str, reader: int | None) -> tuple[int | None, int | None]:
        """The rope that writes ``value``, which only ``reader`` reads unless that is None, and the norm in front."""
        rope = self.writer.get(value)
        if rope is None or self.ops[rope].kind != "rope":
            return None, None
        if reader is not None and self.sole_reader(value) != reader:
            return None, None
        x = self.ops[rope].inputs[0]
        norm = self.writer.get(x)
        attrs = self.ops[rope].attrs
        if norm is None or self.sole_reader(x) != rope or not isinstance(attrs, Rope):
            return rope, None
        of_norm = self.ops[norm].attrs
        heads = attrs.heads * attrs.head_dim
        if not isinstance(of_norm, RmsNorm) or of_norm.width * of_norm.groups != heads:
            return rope, None
        return rope, norm if of_norm.groups in (1, attrs.heads) else None

    def _head_attrs(
        self, q_norm: int | None, k_norm: int | None, q_rope: int, k_rope: int, k_append: int, v_append: int
    ) -> HeadAttrs | None:
        """The ops' attributes, if q and k are normed and rotated alike, and k and v have equally many heads."""
        q, k, k_to, v_to = (self.ops[i].attrs for i in (q_rope, k_rope, k_append, v_append))
        of_q, of_k = (None if i is None else self.ops[i].attrs for i in (q_norm, k_norm))
        assert isinstance(q, Rope) and isinstance(k, Rope)
        assert isinstance(k_to, KvAppend) and isinstance(v_to, KvAppend)
        fit = (
            self.ops[q_rope].inputs[1:] == self.ops[k_rope].inputs[1:]
            and replace(q, heads=k.heads) == k
            and (k_to.heads, k_to.head_dim) == (k.heads, k.head_dim)
            and v_to.heads == k_to.heads
        )
        if not fit:
            return None
        if isinstance(of_q, RmsNorm) and isinstance(of_k, RmsNorm):
            return HeadAttrs(of_q, of_k, q, k, v_to) if (of_q.groups == 1) == (of_k.groups == 1) else None
        return HeadAttrs(None, None, q, k, v_to) if of_q is None and of_k is None else None

    def _find_normed_adds(self) -> None:
        hosted = {j for chain in self.adds.values() for j in chain}
        for i, op in enumerate(self.ops):
            if op.kind != "add" or i in hosted:
                continue
            for j in self.readers.get(op.outputs[0], []):
                attrs = self.ops[j].attrs
                free = j not in self.heads and j not in self.latents and not self.foldable(j)
                if isinstance(attrs, RmsNorm) and attrs.groups == 1 and free:
                    self.normed_adds[i] = j
                    break

    def _find_gated_norms(self) -> None:
        """Norms and the glu behind each (of linear attention's result): a gate that is made before the norm's input, or
        beside it, is there when the norm is."""
        taken = {*self.normed_adds.values(), *self.heads, *self.latents}
        for i, op in enumerate(self.ops):
            if not isinstance(op.attrs, RmsNorm) or i in taken or self.foldable(i):
                continue
            j = self.sole_reader(op.outputs[0])
            if j is None:
                continue
            glu = self.ops[j]
            if isinstance(glu.attrs, Glu) and glu.attrs.function != "swiglu_oai":
                if glu.inputs[1] == op.outputs[0] != glu.inputs[0]:
                    self.gated_norms[i] = j

    def dissolve(self, i: int) -> None:
        """Takes apart the pattern that op ``i`` begins: its parts are ops of their own."""
        self.adds.pop(i, None)
        self.routes.pop(i, None)
        self.gated_norms.pop(i, None)
        for found in (self.heads.get(i), self.latents.get(i)):
            for j in found.members() if found else ():
                self.heads.pop(j, None)
                self.latents.pop(j, None)
