"""Ops of a step on the GPU as groups that run one after the other, each with its launches."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hetcomp.backends.gpu.experts import fused_experts
from hetcomp.backends.gpu.gemv import MAX_MATRICES, Matrix, Norm, glu_gemv, linear_gemv, pairs_of_gemv, split_of
from hetcomp.backends.gpu.heads import HeadOperands, heads_to_cache
from hetcomp.backends.gpu.kernels import GpuCode, GpuRequest, Operand
from hetcomp.backends.gpu.low_rank import Pairs, PairTables
from hetcomp.backends.gpu.mla import LatentOperands, LatentOps, latents_to_cache
from hetcomp.backends.gpu.patterns import GluPair, HeadOps, Run
from hetcomp.backends.gpu.rounded_values import reads_bf16
from hetcomp.backends.gpu.rowwise import add_rms_norm, gated_rms_norm, rms_norm, route_parts
from hetcomp.backends.gpu.tile_choices import BY_TABLE, TileChoices
from hetcomp.backends.gpu.tiles import aligned
from hetcomp.backends.gpu.triton_backend import TritonBackend
from hetcomp.ir.adaptable import OPERANDS
from hetcomp.ir.ops import Glu, HeadLinear, Linear, RmsNorm, Rope
from hetcomp.ir.plan import Op, Value

_BACKEND = TritonBackend()


@dataclass(frozen=True)
class GpuGroup:
    """Ops with common launches. ``ops``: what is covered, in order; a norm that several groups do on the way is of the
    first. ``inputs``: ids of the values that ``Operand("input", i)`` stands for; a state that is appended to is one.
    ``outputs``: ids of the values that the launches write, ``Operand("output", i)``. ``own``: those of them that are
    values of the groups alone."""

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    code: GpuCode
    own: tuple[Value, ...] = ()


def group_ops(
    ops: Sequence[Op],
    values: Mapping[str, Value],
    wanted: Container[str],
    dims: Mapping[str, int],
    rows: int | None,
    tiles: TileChoices = BY_TABLE,
    pairs: PairTables | None = None,
) -> tuple[GpuGroup, ...]:
    """The ops in groups, in an order of execution.

    ops: a run of ops without branches, all on the GPU, ids of values unique; a ``moe_experts`` has all its experts
    here. wanted: ids of values that others read too. A value that is neither wanted nor read by another group need not
    be written. dims, rows, tiles: as ``GpuRequest``. pairs: of the weights that adapters may change. Raises
    HetcompError naming an op that there is no kernel for.
    """
    return tuple(_Grouping(Run(ops, values, wanted, rows), dims, rows, tiles, pairs).groups())


class _Operands:
    """A group's inputs and outputs in the order in which they are first named."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}

    def read(self, value: str) -> Operand:
        return Operand("input", self.inputs.setdefault(value, len(self.inputs)))

    def write(self, value: str) -> Operand:
        return Operand("output", self.outputs.setdefault(value, len(self.outputs)))


class _Grouping:
    """Walks over the ops: the first one whose pattern has all its operands is the next group's. If no pattern has, the
    first op that has its own operands goes alone; there always is one, as the ops' own order is an order of execution.
    """

    def __init__(
        self, run: Run, dims: Mapping[str, int], rows: int | None, tiles: TileChoices, pairs: PairTables | None
    ) -> None:
        self.run = run
        self.tiles = tiles
        self.pairs = pairs
        self.dims = dims
        self.rows = rows
        self.pending = list(range(len(run.ops)))
        self.done: set[int] = set()
        self.copies = {r.copy.id: r.copy for r in run.rounded.values()}
        self.written = {v for op in run.ops for v in op.inputs if v not in run.writer}
        # Norms done by their readers, by result; those among them that no group has among its ops so far.
        self.folded: dict[str, int] = {}
        self.uncovered: set[int] = set()

    def groups(self) -> list[GpuGroup]:
        made: list[GpuGroup] = []
        while self.pending:
            made.extend(self._next())
            self.pending = [i for i in self.pending if i not in self.done]
        return made

    def _next(self) -> list[GpuGroup]:
        first = None
        for i in self.pending:
            if not self._ready(i):
                continue
            if self.run.foldable(i):
                self.done.add(i)
                self.uncovered.add(i)
                self.folded[self.run.ops[i].outputs[0]] = i
                return []
            if self._whole(i):
                return [self._group(i)]
            first = i if first is None else first
        assert first is not None
        self.run.dissolve(first)
        return [self._group(first)]

    def _ready(self, i: int) -> bool:
        """Whether an op has its operands."""
        return self.run.waits[i] <= self.done and all(self._has(i, v) for v in self.run.ops[i].inputs)

    def _whole(self, i: int) -> bool:
        """Whether the op's pattern has what it does not make itself."""
        parts = self.run.parts(i)
        own = {v for j in parts for v in self.run.ops[j].outputs}
        return all(self.run.waits[j] <= self.done for j in parts) and all(
            v in own or self._has(j, v) for j in parts for v in self.run.ops[j].inputs
        )

    def _has(self, i: int, value: str) -> bool:
        """Whether an operand of op ``i`` is there; what a norm reads, if the op can do the norm, stands for it."""
        return value in self.written or (value in self.folded and self.run.folds(i, value))

    def _group(self, i: int) -> GpuGroup:
        run, kind = self.run, self.run.ops[i].kind
        if i in run.heads:
            return self._heads(run.heads[i])
        if i in run.latents:
            return self._latents(run.latents[i])
        if i in run.glus:
            return self._glu(run.glus[i])
        if i in run.routes:
            return self._router(i, run.routes[i])
        if i in run.normed_adds:
            return self._normed_add(i, run.normed_adds[i])
        if i in run.gated_norms:
            return self._gated_norm(i, run.gated_norms[i])
        if run.decode and kind == "linear":
            return self._linears(i)
        if run.decode and kind == "moe_experts":
            return self._experts(i)
        return self._single(i)

    def _single(self, i: int) -> GpuGroup:
        op, request = self.run.ops[i], self._request(i)
        inputs, outputs = (tuple(v.id for v in values) for values in (request.inputs, request.outputs))
        rounded = self.run.rounded.get(op.outputs[0]) if op.outputs else None
        self._finish([i], op.outputs)
        if rounded is None or rounded.alone:
            return GpuGroup((op,), inputs, outputs, _BACKEND.emit(request), self._own(outputs))
        _BACKEND.require(request)
        outputs = *outputs, rounded.copy.id
        code = rms_norm(request, Operand("output", 1))
        return GpuGroup((op,), inputs, outputs, code, self._own(outputs))

    def _own(self, outputs: Iterable[str]) -> tuple[Value, ...]:
        return tuple(self.copies[v] for v in outputs if v in self.copies)

    def _request(self, i: int) -> GpuRequest:
        """Of one op alone: where it reads or writes nothing but the bf16 copy of a value, the copy is its operand."""
        run, op = self.run, self.run.ops[i]
        inputs = [
            run.rounded[v].copy if v in run.rounded and reads_bf16(run, i, v) else run.values[v] for v in op.inputs
        ]
        outputs = [
            run.rounded[v].copy if v in run.rounded and run.rounded[v].alone else run.values[v] for v in op.outputs
        ]
        return GpuRequest(
            op,
            tuple(inputs),
            tuple(outputs),
            self.dims,
            self.rows,
            tiles=self.tiles,
            pairs=self._pairs(i),
            f32=run.f32,
        )

    def _pairs(self, *ops: int) -> Pairs | None:
        """Of the weights of ops that share a launch."""
        members = [self.run.ops[i] for i in ops]
        if self.pairs is None or not members[0].outputs:
            return None
        weights = [op.inputs[operand] for op in members for operand in OPERANDS.get(op.kind, ())]
        return self.pairs.of(self.run.values[members[0].outputs[0]].type.shape[0], *weights)

    def _linears(self, first: int) -> GpuGroup:
        """A linear with what is added to it, or those that read the same and can be multiplied by the same launch."""
        run = self.run
        chain = run.adds.get(first, [])
        members = [first]
        if not chain:
            others = run.readers[run.ops[first].inputs[0]]
            others = [j for j in others if j != first and j not in self.done and run.plain_linear(j)]
            members += [j for j in others if run.alike(first, j) and self._ready(j)][: MAX_MATRICES - 1]
        for j in members:
            _BACKEND.require(self._request(j))
        operands = _Operands()
        x, norm = self._source(first, operands)
        added, result = self._added(first, operands)
        results = [result] if chain else [run.ops[j].outputs[0] for j in members]
        matrices = [self._matrix(j, y, operands) for j, y in zip(members, results, strict=True)]
        source = run.ops[first].inputs[0]
        owed = norm is not None and not chain and run.must_be_written(self.folded[source])
        normed = operands.write(source) if owed else None
        attrs = run.ops[first].attrs
        assert isinstance(attrs, Linear)
        weight_format, rows = run.weight_format(first), self._rows()
        stem = f"linear_{weight_format}_n{'_'.join(str(m.rows) for m in matrices)}_k{attrs.in_features}"
        before, pairs, size = pairs_of_gemv(self._pairs(*members), x, attrs.in_features, rows, 0, norm=norm)
        made = linear_gemv(
            stem,
            x,
            matrices,
            attrs.in_features,
            weight_format,
            rows,
            norm=norm,
            added=added,
            normed=normed,
            tiles=self.tiles,
            pairs=pairs,
            act_order=run.act_order(first),
        )
        return self._made([*members, *chain], operands, GpuCode((*before, made), size))

    def _router(self, router: int, route: int) -> GpuGroup:
        """A router whose logits are sums of parts that only its route adds up."""
        run, operands = self.run, _Operands()
        for j in (router, route):
            _BACKEND.require(self._request(j))
        x, norm = self._source(router, operands)
        linear, choice = run.ops[router], run.ops[route]
        attrs, weight_format, rows = linear.attrs, run.weight_format(router), self._rows()
        assert isinstance(attrs, Linear)
        split = split_of(attrs.out_features, attrs.in_features, weight_format)
        assert split is not None
        bias = operands.read(linear.inputs[2]) if attrs.bias else None
        logits = Operand("workspace")
        matrix = Matrix(operands.read(linear.inputs[1]), bias, logits, attrs.out_features)
        stem = f"router_{weight_format}_n{attrs.out_features}_k{attrs.in_features}_parts{split.parts}"
        workspace = aligned(4 * split.parts * rows * attrs.out_features)
        before, pairs, workspace = pairs_of_gemv(self._pairs(router), x, attrs.in_features, rows, workspace, norm=norm)
        product = linear_gemv(
            stem,
            x,
            (matrix,),
            attrs.in_features,
            weight_format,
            rows,
            norm=norm,
            split=split,
            pairs=pairs,
            act_order=run.act_order(router),
        )
        selection_bias = operands.read(choice.inputs[1]) if len(choice.inputs) > 1 else None
        for v in choice.outputs:
            operands.write(v)
        chosen = route_parts(self._request(route), logits, selection_bias, split.parts)
        return self._made([router, route], operands, GpuCode((*before, product, chosen), workspace))

    def _glu(self, pair: GluPair) -> GpuGroup:
        run = self.run
        for j in (pair.gate, pair.up):
            _BACKEND.require(self._request(j))
        operands = _Operands()
        x, norm = self._source(pair.gate, operands)
        (result,) = run.ops[pair.glu].outputs
        gate, up = (self._matrix(j, result, operands) for j in (pair.gate, pair.up))
        linear, glu = run.ops[pair.gate].attrs, run.ops[pair.glu].attrs
        assert isinstance(linear, Linear) and isinstance(glu, Glu)
        weight_format = run.weight_format(pair.gate)
        columns, rows = linear.in_features, self._rows()
        before, pairs, size = pairs_of_gemv(self._pairs(pair.gate, pair.up), x, columns, rows, 0, norm=norm)
        made = glu_gemv(x, gate, up, columns, weight_format, rows, glu, norm, self.tiles, pairs)
        return self._made([pair.gate, pair.up, pair.glu], operands, GpuCode((*before, made), size))

    def _experts(self, i: int) -> GpuGroup:
        request = self._request(i)
        _BACKEND.require(request)
        operands = _Operands()
        _, *others = self.run.ops[i].inputs
        x, weight = self._norm_of(i)
        for v in (x, *others):  # in the order of the op's inputs
            operands.read(v)
        norm = None if weight is None else self._norm(weight, operands)
        added, result = self._added(i, operands)
        operands.write(result)
        code = fused_experts(request, self._rows(), norm, added)
        return self._made([i, *self.run.adds.get(i, [])], operands, code)

    def _heads(self, of: HeadOps) -> GpuGroup:
        run, operands = self.run, _Operands()
        for j in of.members():
            _BACKEND.require(self._request(j))
        q_rope, k_append, v_append = (run.ops[j] for j in (of.q_rope, of.k_append, of.v_append))

        def head(rope: int, norm: int | None) -> tuple[Operand, Operand | None]:
            if norm is None:
                return operands.read(run.ops[rope].inputs[0]), None
            return operands.read(run.ops[norm].inputs[0]), operands.read(run.ops[norm].inputs[1])

        q, q_norm = head(of.q_rope, of.q_norm)
        k, k_norm = head(of.k_rope, of.k_norm)
        v, cos, sin = (operands.read(v) for v in (v_append.inputs[0], *q_rope.inputs[1:]))
        k_cache, v_cache = (operands.read(op.inputs[1]) for op in (k_append, v_append))
        turned = self._request(of.q_rope).outputs[0]
        y = operands.write(turned.id)
        named = HeadOperands(q, k, v, q_norm, k_norm, cos, sin, y, turned.type.dtype, k_cache, v_cache)
        cached = run.values[k_append.inputs[1]].type.dtype
        block = self._request(of.k_append).block_elements(cached)
        return self._made(of.members(), operands, heads_to_cache(named, of.attrs, cached, block, self.rows))

    def _latents(self, of: LatentOps) -> GpuGroup:
        run, operands = self.run, _Operands()
        for j in of.members():
            _BACKEND.require(self._request(j))
        rope, norm, absorb, append = (run.ops[j] for j in (of.q_rope, of.norm, of.absorb, of.append))
        q, kv, weight, cos, sin, matrix = (
            operands.read(v)
            for v in (
                *(run.ops[j].inputs[0] for j in (of.q_slice, of.kv_slice)),
                *(norm.inputs[1], *rope.inputs[1:], absorb.inputs[1]),
            )
        )
        y, cache = operands.write(run.ops[of.q_concat].outputs[0]), operands.read(append.inputs[1])
        named = LatentOperands(q, kv, weight, cos, sin, matrix, y, cache)
        assert isinstance(norm.attrs, RmsNorm) and isinstance(rope.attrs, Rope) and isinstance(absorb.attrs, HeadLinear)
        cached = run.values[append.inputs[1]].type.dtype
        code = latents_to_cache(
            named,
            norm.attrs,
            rope.attrs,
            absorb.attrs,
            run.weight_format(of.absorb),
            cached,
            self._request(of.append).block_elements(cached),
            self._rows(),
            self._pairs(of.absorb),
        )
        return self._made(of.members(), operands, code)

    def _normed_add(self, add: int, norm: int) -> GpuGroup:
        run, operands = self.run, _Operands()
        a, b = (operands.read(v) for v in run.ops[add].inputs)
        weight, total = operands.read(run.ops[norm].inputs[1]), operands.write(run.ops[add].outputs[0])
        (result,) = run.ops[norm].outputs
        rounded = run.rounded.get(result)
        y = None if rounded and rounded.alone else operands.write(result)
        copy = operands.write(rounded.copy.id) if rounded else None
        code = add_rms_norm(self._request(norm), a, b, weight, total, y, copy)
        return self._made([add, norm], operands, code)

    def _gated_norm(self, norm: int, glu: int) -> GpuGroup:
        run, operands = self.run, _Operands()
        for j in (norm, glu):
            _BACKEND.require(self._request(j))
        for v in run.ops[norm].inputs:
            operands.read(v)
        gate, request = operands.read(run.ops[glu].inputs[0]), self._request(glu)
        operands.write(request.outputs[0].id)
        return self._made([norm, glu], operands, gated_rms_norm(self._request(norm), request, gate))

    def _matrix(self, i: int, result: str, operands: _Operands) -> Matrix:
        op = self.run.ops[i]
        assert isinstance(op.attrs, Linear)
        bias = operands.read(op.inputs[2]) if op.attrs.bias else None
        return Matrix(operands.read(op.inputs[1]), bias, operands.write(result), op.attrs.out_features)

    def _norm_of(self, i: int) -> tuple[str, int | None]:
        """What an op reads first, and the norm that it has to do with it."""
        x = self.run.ops[i].inputs[0]
        if x in self.written:
            return x, None
        return self.run.ops[self.folded[x]].inputs[0], self.folded[x]

    def _source(self, i: int, operands: _Operands) -> tuple[Operand, Norm | None]:
        x, norm = self._norm_of(i)
        return operands.read(x), None if norm is None else self._norm(norm, operands)

    def _norm(self, i: int, operands: _Operands) -> Norm:
        op = self.run.ops[i]
        assert isinstance(op.attrs, RmsNorm)
        return Norm(operands.read(op.inputs[1]), op.attrs.eps, op.attrs.weight_offset)

    def _added(self, i: int, operands: _Operands) -> tuple[list[Operand], str]:
        """What the launch of op ``i`` adds to its result, and the value that is then the result."""
        (result,) = self.run.ops[i].outputs
        added = []
        for j in self.run.adds.get(i, []):
            a, b = self.run.ops[j].inputs
            added.append(operands.read(b if a == result else a))
            (result,) = self.run.ops[j].outputs
        return added, result

    def _rows(self) -> int:
        assert self.rows is not None
        return self.rows

    def _made(self, members: Sequence[int], operands: _Operands, code: GpuCode) -> GpuGroup:
        norms = {self.folded[v] for j in members for v in self.run.ops[j].inputs if v in self.folded}
        covered = sorted({*members, *(norms & self.uncovered)})
        self.uncovered -= norms
        self._finish(members, operands.outputs)
        ops, inputs, outputs = (self.run.ops[j] for j in covered), operands.inputs, operands.outputs
        return GpuGroup(tuple(ops), tuple(inputs), tuple(outputs), code, self._own(outputs))

    def _finish(self, members: Sequence[int], written: Sequence[str] | Mapping[str, int]) -> None:
        self.done.update(members)
        self.written.update(written)
        self.written.update(v for v, r in self.run.rounded.items() if r.copy.id in written)
