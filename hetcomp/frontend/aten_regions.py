"""Unknown aten ops as regions: the escape hatch of the Plan, compiled by TVM."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from hetcomp.errors import HetcompError
from hetcomp.frontend import layout as lay
from hetcomp.frontend.layout import Layout, TorchShape
from hetcomp.frontend.traced_model import module_path
from hetcomp.ir.ops import Aten, AtenArg, AtenNode, AtenRef
from hetcomp.ir.types import DType

if TYPE_CHECKING:
    from hetcomp.frontend.lower import Lowering

_IGNORED_KWARGS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"})


@dataclass
class _Region:
    """A region under construction. ``refs`` says how later nodes name what is already there."""

    nodes: list[AtenNode] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    input_shapes: list[TorchShape] = field(default_factory=list)
    input_dtypes: list[str] = field(default_factory=list)
    refs: dict[fx.Node, AtenRef] = field(default_factory=dict)

    def add(
        self,
        target: str,
        args: tuple[AtenArg, ...],
        dtype: str,
        shape: TorchShape,
        kwargs: tuple[tuple[str, AtenArg], ...] = (),
    ) -> AtenRef:
        self.nodes.append(AtenNode(target, args, kwargs, dtype, shape))
        return AtenRef("node", len(self.nodes) - 1)

    def add_input(self, value: str, shape: TorchShape, dtype: str) -> AtenRef:
        self.inputs.append(value)
        self.input_shapes.append(shape)
        self.input_dtypes.append(dtype)
        return AtenRef("input", len(self.inputs) - 1)


def emit_region(low: Lowering, wanted: list[fx.Node], narrow_integers: bool = False) -> None:
    """Emits one aten op that computes ``wanted`` and every unknown node they depend on.

    ``narrow_integers``: int64 results are handed out as i32 (expert ids). Raises HetcompError naming the
    module of what cannot be expressed.
    """
    if not wanted:
        return
    members = _closure(low, wanted)
    region = _Region()
    for node in members:
        _add_node(low, region, node)
    from hetcomp.frontend.lower import Ref, dtype_of, memory_shape

    results, outputs = [], []
    for node in wanted:
        made, index = _result(low, region, node, narrow_integers)
        dtype = dtype_of(node, node.meta["val"].dtype)
        if narrow_integers and dtype is DType.I64:
            dtype = DType.I32
        value = low.builder.act(memory_shape(made), dtype)
        results.append(index)
        outputs.append(value)
        low.bound[node] = Ref(value, made)
        low.pending.discard(node)
    attrs = Aten(tuple(region.nodes), tuple(region.input_shapes), tuple(region.input_dtypes), tuple(results))
    low.builder.emit(attrs, region.inputs, outputs, module_path(wanted[0]))


def _closure(low: Lowering, wanted: list[fx.Node]) -> list[fx.Node]:
    members: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node in low.pending and node not in members:
            members.add(node)
            todo.extend(node.all_input_nodes)
    return [n for n in low.traced.graph.nodes if n in members]


def _add_node(low: Lowering, region: _Region, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if source not in region.refs and "sym_size" not in str(source.target):
            _add_source(low, region, source)
    args = tuple(_argument(low, region, node, a) for a in node.args)
    if node.target is operator.getitem:
        value = node.meta["val"]
        region.refs[node] = region.add("getitem", args, _name(value.dtype), low.dims(node))
        return
    kwargs = tuple((k, _argument(low, region, node, v)) for k, v in node.kwargs.items() if k not in _IGNORED_KWARGS)
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        region.refs[node] = region.add(str(node.target), args, "tuple", (), kwargs)
    else:
        region.refs[node] = region.add(str(node.target), args, _name(value.dtype), low.dims(node), kwargs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _add_source(low: Lowering, region: _Region, source: fx.Node) -> None:
    """Makes a known tensor or parameter an input; a permuted one is put in order by nodes of the region."""
    from hetcomp.frontend.lower import Ref, RowsOnly, TableRef

    value = source.meta["val"]
    if low.parameter(source) is not None:
        shape = tuple(int(d) for d in value.shape)
        region.refs[source] = region.add_input(low.weight(source), shape, "float32")
        return
    known = low.bound.get(source)
    if isinstance(known, RowsOnly) and low.dims(source) == (1, lay.ROWS):
        ref = region.add_input(known.value, (1, lay.ROWS), "int32")
        region.refs[source] = region.add(
            "aten._to_copy.default", (ref,), "int64", (1, lay.ROWS), (("dtype", "torch.int64"),)
        )
        return
    if isinstance(known, TableRef):
        ref = region.add_input(known.value, (1, lay.ROWS, known.half), "float32")
        if known.width != known.half:
            repeated = (ref,) * (known.width // known.half)
            ref = region.add("aten.cat.default", (repeated, -1), "float32", (1, lay.ROWS, known.width))
        region.refs[source] = ref
        return
    if not isinstance(known, Ref):
        raise HetcompError(
            f"{module_path(source)}: an op that hetcomp does not know reads the result of {source.target}, "
            "which the Plan does not hold as a tensor"
        )
    dtype = str(_name(value.dtype))
    if lay.is_row_major(known.layout):
        region.refs[source] = region.add_input(known.value, low.dims(source), dtype)
        return
    region.refs[source] = _ordered(region, known.value, known.layout, dtype)


def _ordered(region: _Region, value: str, layout: Layout, dtype: str) -> AtenRef:
    """Input in memory order, then permuted and viewed into the torch tensor."""
    axes = [i for i, a in enumerate(layout) if a.kind != "one"]
    in_memory = sorted(axes, key=lambda i: (layout[i].kind != "rows", -layout[i].stride))
    shape = tuple(lay.shape_of(layout)[i] for i in in_memory)
    ref = region.add_input(value, shape, dtype)
    order = tuple(in_memory.index(i) for i in axes)
    permuted = tuple(lay.shape_of(layout)[i] for i in axes)
    ref = region.add("aten.permute.default", (ref, order), dtype, permuted)
    full = lay.shape_of(layout)
    return region.add("aten.reshape.default", (ref, full), dtype, full)


def _result(low: Lowering, region: _Region, node: fx.Node, narrow_integers: bool) -> tuple[Layout, int]:
    """Layout and node index of a result, which must lie in memory rows first."""
    shape = low.dims(node)
    dtype = _name(node.meta["val"].dtype)
    ref = region.refs[node]
    made = lay.natural(shape)
    if made is None:
        raise HetcompError(
            f"{module_path(node)}: the result of {node.target} has shape {list(shape)}, which is not one row "
            "a token; hetcomp cannot compile it"
        )
    if not lay.is_row_major(made):
        at = shape.index(lay.ROWS)
        order = (at, *(i for i in range(len(shape)) if i != at))
        ref = region.add("aten.permute.default", (ref, order), dtype, tuple(shape[i] for i in order))
    if narrow_integers and dtype == "int64":
        last = region.nodes[ref.index].shape if ref.source == "node" else shape
        ref = region.add("aten._to_copy.default", (ref,), "int32", last, (("dtype", "torch.int32"),))
    if ref.source == "input":
        ref = region.add("aten.clone.default", (ref,), dtype, shape)
    return made, ref.index


def _argument(low: Lowering, region: _Region, node: fx.Node, value: object) -> AtenArg:
    if isinstance(value, fx.Node):
        if "sym_size" in str(value.target):
            return lay.ROWS
        return region.refs[value]
    if isinstance(value, (list, tuple)):
        return tuple(_argument(low, region, node, v) for v in value)  # type: ignore[misc]
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.SymInt) and str(value) == low.rows_symbol:
        return lay.ROWS
    raise HetcompError(f"{module_path(node)}: {node.target} has an argument of type {type(value).__name__}")
