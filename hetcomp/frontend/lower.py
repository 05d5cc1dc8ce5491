"""From the cleaned fx graph to the Plan: one walk over the nodes, one handler an op.

What has no handler waits until something known needs it, and then becomes one aten region together with
everything unknown that it depends on (aten_regions.py). A recognised router's region is never asked for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hetcomp.errors import HetcompError
from hetcomp.frontend import layout as lay
from hetcomp.frontend.aten_regions import emit_region
from hetcomp.frontend.layout import Layout, TorchShape
from hetcomp.frontend.plan_builder import PlanBuilder, assemble
from hetcomp.frontend.rewrites import finish
from hetcomp.frontend.routing import Router, find_routers
from hetcomp.frontend.traced_model import TracedModel, module_path
from hetcomp.ir.plan import ModelInfo, Op, Plan, Value, ValueKind, WeightSource
from hetcomp.ir.types import Dim, DType, Shape, TensorType

IDS, POSITIONS, LOGITS = "ids", "positions", "logits"


@dataclass(frozen=True)
class Ref:
    """A torch tensor of the graph: a Plan value and how the tensor lies in it."""

    value: str
    layout: Layout


@dataclass(frozen=True)
class RowsOnly:
    """The step's ids or positions, int64[.., T] in torch, where every row has the same, and i32[T] in the Plan."""

    value: str


@dataclass(frozen=True)
class TableRef:
    """cos or sin: f32[T, half] in the Plan, [1, T, width] in torch, where the numbers come twice if width is
    2 * half."""

    value: str
    half: int
    width: int


@dataclass(frozen=True)
class Caches:
    """What kv_append returned: the states of one layer (two, or one shared by keys and values)."""

    states: tuple[str, ...]


@dataclass(frozen=True)
class Several:
    """A node with several results; getitem takes them."""

    parts: tuple[Any, ...]


class Lowering:
    """State of one walk. ``bound`` says what each node became; ``pending`` are nodes without a handler."""

    def __init__(self, traced: TracedModel, config: object) -> None:
        """config: has the numbers of routers as attributes, if it says any."""
        self.traced = traced
        self.builder = PlanBuilder()
        self.bound: dict[fx.Node, Any] = {}
        self.pending: set[fx.Node] = set()
        self.routers: dict[fx.Node, Router] = find_routers(traced.graph, config)
        self.rows_symbol = self._rows_symbol()

    def _rows_symbol(self) -> str:
        for node in self.traced.graph.nodes:
            if node.name == self.traced.inputs[0]:
                return str(node.meta["val"].shape[1])
        raise HetcompError("the traced graph has no input called " + self.traced.inputs[0])

    # ------------------------------------------------ reading nodes

    def dims(self, node: fx.Node) -> TorchShape:
        """Shape of a node's tensor with ``T`` for the number of tokens."""
        value = node.meta["val"]
        out: list[int | str] = []
        for d in value.shape:
            if isinstance(d, int):
                out.append(d)
            elif str(d) == self.rows_symbol:
                out.append(lay.ROWS)
            else:
                raise HetcompError(
                    f"{module_path(node)}: {node.target} has a dimension {d}, which is not the number of "
                    "tokens; hetcomp cannot compile it"
                )
        return tuple(out)

    def parameter(self, node: object) -> str | None:
        """Name of the parameter behind a placeholder, else None."""
        return self.traced.fqns.get(node.name) if isinstance(node, fx.Node) else None

    def ref(self, node: object) -> Ref | None:
        """The tensor behind ``node`` in the Plan; an unknown node becomes an aten region now."""
        if not isinstance(node, fx.Node):
            return None
        if node in self.pending:
            emit_region(self, [node])
        found = self.bound.get(node)
        return found if isinstance(found, Ref) else None

    def weight(
        self, node: object, shape: Shape | None = None, view: WeightSource | None = None, suffix: str = ""
    ) -> str:
        """The Plan value of a parameter. ``suffix`` tells apart several views of one parameter."""
        fqn = self.parameter(node)
        if fqn is None or not isinstance(node, fx.Node):
            raise HetcompError(
                f"{module_path(node) if isinstance(node, fx.Node) else node}: a weight is computed, not a "
                "parameter of the model; hetcomp cannot compile it"
            )
        if fqn in self.traced.computed_buffers:
            raise HetcompError(
                f"{fqn} is computed when the model is built and used in a way that hetcomp does not know, so the model "
                "cannot be compiled"
            )
        dims = tuple(int(d) for d in node.meta["val"].shape) if shape is None else shape
        value = Value(fqn + suffix, TensorType(DType.F32, dims), ValueKind.WEIGHT, fqn=fqn, view=view)
        return self.builder.add_value(value)

    # ------------------------------------------------ writing ops

    def result(self, node: fx.Node, shape: TorchShape | None = None) -> Ref:
        """A new activation for ``node``, lying in memory in the order of its torch axes."""
        shape = self.dims(node) if shape is None else shape
        made = lay.natural(shape)
        assert made is not None, f"{node} has no rows"
        return Ref(self.builder.act(memory_shape(made)), made)

    def run(self) -> None:
        """Lowers all nodes."""
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_function":
                self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.traced.inputs:
            name = IDS if node.name == self.traced.inputs[0] else POSITIONS
            self.builder.add_value(Value(name, TensorType(DType.I32, (lay.ROWS,)), ValueKind.INPUT, fqn=name))
            self.bound[node] = RowsOnly(name)

    def _call(self, node: fx.Node) -> None:
        from hetcomp.frontend.lower_ops import ANCHORS, HANDLERS

        if node.target is operator.getitem:
            several = self.bound.get(node.args[0])  # type: ignore[arg-type]
            if isinstance(several, Several):
                self.bound[node] = several.parts[node.args[1]]  # type: ignore[index]
                return
        elif "sym_size" in str(node.target):
            return
        handler = HANDLERS.get(".".join(str(node.target).split(".")[:2]))
        # Views of and arithmetic with something unknown belong to its region.
        waits = handler not in ANCHORS and any(n in self.pending for n in node.all_input_nodes)
        made = handler(self, node) if handler is not None and not waits else None
        if made is None:
            if str(node.target).startswith("hetcomp."):
                raise HetcompError(
                    f"{module_path(node)}: {node.target} got operands in a form that hetcomp cannot lower"
                )
            self.pending.add(node)
        else:
            self.bound[node] = made

    def _output(self, node: fx.Node) -> None:
        logits = node.args[0][0]  # type: ignore[index]
        ref = self.ref(logits)
        if ref is None or not lay.is_row_major(ref.layout):
            raise HetcompError("the model's logits are not one row a token; hetcomp cannot compile it")
        old = self.builder.values.pop(ref.value)
        new = Value(LOGITS, old.type, ValueKind.OUTPUT, fqn=LOGITS)
        self.builder.values[LOGITS] = new
        self.builder.ops = [_rename(op, ref.value, LOGITS) for op in self.builder.ops]


def _rename(op: Op, old: str, new: str) -> Op:
    swap = {old: new}
    return replace(
        op,
        inputs=tuple(swap.get(v, v) for v in op.inputs),
        outputs=tuple(swap.get(v, v) for v in op.outputs),
    )


def memory_shape(layout: Layout) -> Shape:
    """Shape of the value behind a natural layout: the rows, then the features; (T, 1) for no features."""
    sizes = tuple(a.size for a in lay.features(layout))
    return (lay.ROWS, *(sizes or (1,)))


def lower_to_plan(
    traced: TracedModel,
    config: object,
    model: ModelInfo,
    *,
    max_tokens: int,
    max_batch: int,
    context_length: int,
    max_logit_rows: int,
) -> Plan:
    """The Plan of ``traced`` with one template ``model`` and one call of it.

    Raises HetcompError naming the module path of what cannot be compiled.
    """
    lowering = Lowering(traced, config)
    lowering.run()
    ops, values = finish(lowering.builder.ops, lowering.builder.values, LOGITS)
    dims = (
        Dim("T", 1, max_tokens),
        Dim("R", 1, max_logit_rows),
        Dim("slots", max_batch, max_batch),
        Dim("context", context_length, context_length),
    )
    return assemble(ops, values, model, dims)


def dtype_of(node: fx.Node, dtype: torch.dtype) -> DType:
    """The Plan's element type for a torch type. Raises HetcompError naming the module."""
    known = {
        torch.float32: DType.F32,
        torch.float16: DType.F16,
        torch.bfloat16: DType.BF16,
        torch.int32: DType.I32,
        torch.int64: DType.I64,
        torch.bool: DType.BOOL,
        torch.uint8: DType.U8,
    }
    if dtype not in known:
        raise HetcompError(f"{module_path(node)}: {node.target} computes in {dtype}, which hetcomp has not")
    return known[dtype]
