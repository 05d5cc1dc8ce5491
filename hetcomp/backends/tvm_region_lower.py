"""An exported aten region as a sequence of TVM functions over buffers: no allocation, no packed call is left.

Relax legalises each op to TIR; temporaries inside a function become parameters, so that the program can give
them memory from the plan's workspace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax, s_tir, tirx
from tvm.relax.frontend.torch import from_exported_program
from tvm_ffi import structural_map

from hetcomp.backends.tvm_region_ops import LEGALISE
from hetcomp.errors import HetcompError

Expr = Any


@dataclass(frozen=True)
class Size:
    """A size that may depend on the number of rows: as C++ over ``args.rows``, and as a function of it."""

    cpp: str
    at: Callable[[int], int]


@dataclass(frozen=True)
class Buffer:
    """A tensor of the region. ``home`` is ``in``, ``out``, ``const`` or ``temp``, ``index`` its number
    there."""

    home: str
    index: int
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One call of a PrimFunc with its arguments in order."""

    function: Any
    arguments: tuple[Buffer | Size, ...]


@dataclass
class LoweredRegion:
    """``calls`` run in order; then each of ``copies`` (source, output) is copied. ``constants`` are numpy
    arrays, ``temps`` the buffers of home ``temp``."""

    calls: list[Call] = field(default_factory=list)
    copies: list[tuple[Buffer, Buffer]] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    temps: list[Buffer] = field(default_factory=list)


def lower_region(exported: Any) -> LoweredRegion:  # noqa: ANN401
    """Imports, legalises, fuses and takes apart. Raises HetcompError or TVM's own errors on what it
    cannot do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns about its own pytree code
        module = from_exported_program(exported)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(LEGALISE),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    return _Sequence(ir.transform.Sequential(passes)(module)).lowered


class _Sequence:
    """Walks the bindings of ``main`` and collects calls."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401
        self.module = module
        self.lowered = LoweredRegion()
        self.rows: dict[Any, Size] = {}
        # Buffer of every relax variable; a list of them for a tuple.
        self.homes: dict[Any, Any] = {}
        main = module["main"]
        for i, param in enumerate(main.params):
            self.homes[param] = self._buffer("in", i, param.ty)
        bindings = [b for block in main.body.blocks for b in block.bindings]
        values = {b.var: b.value for b in bindings}
        results = _results(main.body.body, values)
        for j, var in enumerate(results):
            # A result computed by a call is written where it belongs; what is not is copied at the end.
            if isinstance(values.get(var), ir.Call) and var not in self.homes:
                self.homes[var] = self._buffer("out", j, var.ty)
        for binding in bindings:
            self._bind(binding.var, binding.value)
        for j, var in enumerate(results):
            source = self._find(var)
            if (source.home, source.index) != ("out", j):
                self.lowered.copies.append((source, Buffer("out", j, source.shape, source.dtype)))

    def _bind(self, var: Any, value: Any) -> None:  # noqa: ANN401
        if isinstance(value, ir.Call):
            self._call(var, value)
        elif isinstance(value, ir.Tuple):
            self.homes[var] = [self._find(f) for f in value.fields]
        else:
            self.homes[var] = self._find(value)

    def _call(self, var: Any, call: Any) -> None:  # noqa: ANN401
        if isinstance(call.op, relax.ExternFunc) and call.op.global_symbol == "relax.run.assert_op":
            return  # a check of values (one_hot); a program has no way to raise
        if call.op != ir.Op.get("relax.call_tir"):
            raise HetcompError(f"the step {getattr(call.op, 'name', call.op)} has no TIR")
        arguments: list[Buffer | Size] = [self._find(a) for a in call.args[1].fields]
        if isinstance(var.ty, relax.TupleType):
            outputs = [self._temp(self._shape(t.shape.values), str(t.dtype)) for t in var.ty.fields]
            self.homes[var] = outputs
        else:
            if var not in self.homes:
                self.homes[var] = self._temp(self._shape(var.ty.shape.values), str(var.ty.dtype))
            outputs = [self.homes[var]]
        arguments += outputs
        if len(call.args) > 2:
            arguments += self._shape(call.args[2].values)
        function = _inline(_serial(self.module[call.args[0]]))
        known = _match(function, arguments)
        function, hoisted = _hoist(function)
        for inner in hoisted:
            shape = tuple(size(d, known) for d in inner.shape)
            arguments.append(self._temp(shape, str(inner.dtype)))
        self.lowered.calls.append(Call(function, tuple(arguments)))

    def _find(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, ir.GenericConst):
            array = value.value.numpy()
            self.lowered.constants.append(array)
            shape = tuple(size(int(d), {}) for d in array.shape)
            return Buffer("const", len(self.lowered.constants) - 1, shape, str(array.dtype))
        if isinstance(value, ir.TupleGetItem):
            return self._find(value.tuple_value)[value.index]
        if value in self.homes:
            return self.homes[value]
        return self._size(value)

    def _shape(self, values: Any) -> tuple[Size, ...]:  # noqa: ANN401
        return tuple(self._size(v) for v in values)

    def _size(self, expr: Expr) -> Size:
        return size(expr, self.rows)

    def _buffer(self, home: str, index: int, type: Any) -> Buffer:  # noqa: ANN401
        for dim in type.shape.values:
            if isinstance(dim, tirx.Var) and dim not in self.rows:
                if self.rows:
                    raise HetcompError("it depends on two different numbers of rows")
                self.rows[dim] = Size("args.rows", lambda n: n)
        return Buffer(home, index, self._shape(type.shape.values), str(type.dtype))

    def _temp(self, shape: tuple[Size, ...], dtype: str) -> Buffer:
        buffer = Buffer("temp", len(self.lowered.temps), shape, dtype)
        self.lowered.temps.append(buffer)
        return buffer


def _results(value: Any, values: dict[Any, Any]) -> list[Any]:  # noqa: ANN401
    """The variables or constants that ``main`` returns, plain renamings looked through."""

    def origin(v: Any) -> Any:  # noqa: ANN401
        while isinstance(values.get(v) if isinstance(v, relax.Var) else None, relax.Var):
            v = values[v]
        return v

    value = origin(value)
    whole = values.get(value, value) if isinstance(value, relax.Var) else value
    if isinstance(whole, ir.Tuple):
        return [origin(f) for f in whole.fields]
    return [value]


_BINARY: dict[Any, tuple[str, Callable[[int, int], int]]] = {
    tirx.Add: ("({} + {})", lambda a, b: a + b),
    tirx.Sub: ("({} - {})", lambda a, b: a - b),
    tirx.Mul: ("({} * {})", lambda a, b: a * b),
    # Sizes are not negative, so C++'s truncating division is the floor.
    tirx.FloorDiv: ("({} / {})", lambda a, b: a // b),
    tirx.FloorMod: ("({} % {})", lambda a, b: a % b),
    tirx.Min: ("std::min<std::int64_t>({}, {})", min),
    tirx.Max: ("std::max<std::int64_t>({}, {})", max),
}


def size(expr: Expr, known: dict[Any, Size]) -> Size:
    """``expr`` as a Size; ``known`` gives the variables. Raises HetcompError on anything but simple
    arithmetic."""
    if isinstance(expr, (int, tirx.IntImm)):
        value = int(expr)
        return Size(str(value), lambda n: value)
    if isinstance(expr, tirx.Var) and expr in known:
        return known[expr]
    if isinstance(expr, tirx.Cast):
        return size(expr.value, known)
    if type(expr) in _BINARY:
        text, compute = _BINARY[type(expr)]
        a, b = size(expr.a, known), size(expr.b, known)
        return Size(text.format(a.cpp, b.cpp), lambda n: compute(a.at(n), b.at(n)))
    raise HetcompError(f"the size {expr} is not a function of the number of rows")


def _match(function: Any, arguments: list[Buffer | Size]) -> dict[Any, Size]:  # noqa: ANN401
    """What the function's own size variables stand for, read off the shapes of its arguments."""
    known: dict[Any, Size] = {}
    for param, argument in zip(function.params, arguments, strict=True):
        if isinstance(argument, Size):
            known[param] = argument
            continue
        for dim, given in zip(param.shape, argument.shape, strict=True):
            if isinstance(dim, tirx.Var):
                known.setdefault(dim, given)
    return known


def _serial(function: Any) -> Any:  # noqa: ANN401
    """The function with its parallel loops made serial: threads belong to the lanes."""

    def serial(loop: Any) -> Any:  # noqa: ANN401
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return function.with_body(structural_map(function.body, (tirx.For, serial)))


def _inline(function: Any) -> Any:  # noqa: ANN401
    """The function with every intermediate that is computed elementwise put where it is read."""
    if not isinstance(function.body, s_tir.SBlockRealize) or function.body.block.name_hint != "root":
        return function  # an opaque loop nest (scans)
    schedule = s_tir.Schedule(ir.IRModule({"main": function}))
    root = schedule.get_sblock("root")
    outputs = {schedule.get(b).name_hint for b in schedule.get_output_blocks(root)}
    for block in schedule.get_child_blocks(root):
        if schedule.get(block).name_hint in outputs:
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue
    return schedule.mod["main"]


def _hoist(function: Any) -> tuple[Any, list[Any]]:  # noqa: ANN401
    """Makes the buffers that the root block allocates parameters; returns them too."""
    realize = function.body
    if not isinstance(realize, s_tir.SBlockRealize) or not realize.block.alloc_buffers:
        return function, []
    root = realize.block
    inner = list(root.alloc_buffers)
    block = s_tir.SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        root.body,
        root.init,
        [],
        root.match_buffers,
        root.annotations,
    )
    body = s_tir.SBlockRealize(realize.iter_values, realize.predicate, block)
    params = [*function.params, *inner]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs), inner
