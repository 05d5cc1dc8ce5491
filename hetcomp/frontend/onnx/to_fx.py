"""From an ONNX graph to what trace.py makes of a torch module: a graph of aten and ``hetcomp::`` ops."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from hetcomp.errors import HetcompError
from hetcomp.frontend import custom_ops  # noqa: F401  (defines torch.ops.hetcomp)
from hetcomp.frontend.onnx.evaluate import Run, Weight
from hetcomp.frontend.onnx.graph import Graph, Node
from hetcomp.frontend.onnx.linear_attention_op import CAUSAL_CONV
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.parameters import Parameter, Parameters
from hetcomp.frontend.onnx.rope_frequencies import RopeFrequencies
from hetcomp.frontend.plan_builder import layer_of
from hetcomp.frontend.recognise import RopeTableData
from hetcomp.frontend.traced_model import TracedModel

# Ops whose other outputs are caches.
ATTENTION = frozenset({"hetcomp.Attention", "hetcomp.MlaAttention", "com.microsoft.GroupQueryAttention"})
# Ops of which a layer has one, and those that have to do with tokens before in any way.
_LAYERS = ATTENTION | {"hetcomp.GatedDelta"}
_MIXERS = _LAYERS | {"hetcomp.CausalConv"} | CAUSAL_CONV
_IDS, _POSITIONS = "input_ids", "position_ids"


def to_fx(
    graph: Graph, run: Run, parameters: Parameters, ids: str, context: int, origin: str, provider: str = ""
) -> TracedModel:
    """ids: name of the graph's input of tokens. The first output is the logits. provider: the processor that the file
    was written for, if its weights may be in an order of that one's own. Raises HetcompError naming a node that
    cannot be expressed."""
    writer = Writer(graph, run, parameters, ids, context, provider)
    for node in graph.nodes:
        if node in writer.needed:
            try:
                writer.write(node)
            except NotComputable as error:
                raise HetcompError(f"{origin}: {node} {error}") from error
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                text = " ".join(str(error).split())[:200]
                raise HetcompError(f"{origin}: {node} cannot be expressed in torch: {text}") from error
    return writer.finish(graph.outputs[0])


def count_layers(graph: Graph) -> int:
    """Layers that have to do with tokens before: by their numbers, where modules around nodes say them."""
    scopes = [node.scope for node in graph.nodes if node.op in _MIXERS]
    numbers = [number for number in map(layer_of, scopes) if number is not None]
    return max(numbers) + 1 if numbers else sum(node.op in _LAYERS for node in graph.nodes)


class Writer:
    """A torch graph under construction. ``nodes``: what each activation became; ``embedding``: that of the tokens,
    once it is there."""

    def __init__(
        self, graph: Graph, run: Run, parameters: Parameters, ids: str, context: int, prepacked_for: str
    ) -> None:
        self.graph, self.run, self.parameters, self.context = graph, run, parameters, context
        self.prepacked_for = prepacked_for
        self.fx = fx.Graph()
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        symbolic: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC], constraint_sizes=[None, None]
        )
        example = torch.empty((1, run.tokens), dtype=torch.int64, device="meta")
        self._ids = self.fx.placeholder(_IDS)
        self._ids.meta["val"] = self._mode.from_tensor(example, symbolic_context=symbolic)
        self._positions = self.fx.placeholder(_POSITIONS)
        self._positions.meta["val"] = self._ids.meta["val"]
        self._last = self._positions
        self.rows = self._ids.meta["val"].shape[1]
        self.size = self.fx.call_function(torch.ops.aten.sym_size.int, (self._ids, 1))
        self.size.meta["val"] = self.rows
        self.embedding: fx.Node | None = None
        self.nodes: dict[str, fx.Node] = {ids: self._ids}
        self.caches: dict[str, fx.Node] = {}
        # By the result of a product the vector that it has as its bias, and that its only reader adds.
        self.absorbed: dict[str, str] = {}
        self._placeholders: dict[str, fx.Node] = {}
        self._fqns: dict[str, str] = {}
        # Frequencies by the names of tables of cosines and sines.
        self.fitted: dict[tuple[str, str], RopeFrequencies] = {}
        self._tables: list[RopeTableData] = []
        self._table_nodes: dict[int, tuple[fx.Node, fx.Node]] = {}
        self.consumers, self.producers = graph.consumers(), graph.producers()
        self.needed = self._needed()
        self.layers = count_layers(graph)
        self.layers_done = 0
        self.scope = ""

    def _needed(self) -> set[Node]:
        """The nodes that the logits depend on, but for those that only sizes come from."""
        out: set[Node] = set()
        todo = [self.graph.outputs[0]]
        while todo:
            node = self.producers.get(todo.pop())
            if node is not None and node not in out:
                out.add(node)
                todo.extend(v for v in node.inputs if v not in self.run.values or self.run.is_activation(v))
        return out

    # ------------------------------------------------ what handlers use

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401 - an overload and what it takes
        """A node that calls an aten or hetcomp overload, with the shape of its result."""
        plain = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self._mode:
            value = target(*plain, **kwargs)
        made = self.fx.call_function(target, args, kwargs)
        made.meta = {"val": value, "nn_module_stack": {"": (self.scope, None)}}
        return made

    def take(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        made = self.fx.call_function(operator.getitem, (node, index))
        made.meta = {**node.meta, "val": node.meta["val"][index]}
        return made

    def activation(self, value: str) -> fx.Node:
        """The node that an activation became. Raises NotComputable if it became none."""
        found = self.nodes.get(value)
        if found is None:
            raise NotComputable(f"reads {value}, which is neither an activation nor a weight that hetcomp knows there")
        return found

    def parameter(self, value: str, transposed: bool = False) -> fx.Node:
        """The placeholder of a weight; see known_parameter."""
        return self.placeholder(self.known_parameter(value, transposed))

    def known_parameter(self, value: str, transposed: bool = False, log_of: int = 0) -> Parameter:
        """The parameter that a weight is; transposed: of what the file has, its last two axes swapped; log_of: the
        logarithm of what the file has, times this. Raises NotComputable if ``value`` is no weight."""
        weight = self.run.weights.get(value)
        if weight is None:
            raise NotComputable(f"takes {value} for a weight, which is computed")
        shape = self.run.shape(value)
        if transposed:
            weight, shape = Weight(weight.name, not weight.transposed), (*shape[:-2], shape[-1], shape[-2])
        dequantised = self.run.dequantised.get(weight.name)
        if dequantised is None:
            return self.parameters.of(weight, shape, self.scope, log_of=log_of)
        stored = dequantised.in_order(weight.transposed)
        stored.described("", self.graph.initialisers)
        return self.parameters.of(Weight(stored.codes, weight.transposed), shape, self.scope, stored)

    def placeholder(self, parameter: Parameter) -> fx.Node:
        """The placeholder of a parameter, made when it is first used."""
        if parameter.fqn not in self._placeholders:
            with self.fx.inserting_after(self._last):
                self._last = self.fx.placeholder(f"p_{len(self._placeholders)}")
            with self._mode:
                self._last.meta["val"] = torch.empty(parameter.shape, device="meta")
            self._placeholders[parameter.fqn] = self._last
            self._fqns[self._last.name] = parameter.fqn
        return self._placeholders[parameter.fqn]

    def view(self, node: fx.Node, shape: Iterable[int]) -> fx.Node:
        """``node`` in another shape, given for the run's number of tokens."""
        wanted = [self.rows if d == self.run.tokens else d for d in self._with_tokens_apart(tuple(shape))]
        if list(node.meta["val"].shape) == wanted:
            return node
        plain = [self.size if d is self.rows else d for d in wanted]
        apart = not node.meta["val"].is_contiguous()  # as parts of a row are
        return self.call((torch.ops.aten.reshape if apart else torch.ops.aten.view).default, node, plain)

    def _with_tokens_apart(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape`` with tokens and heads as two axes where a norm of heads has them as one."""
        tokens = self.run.tokens
        joined = [i for i, d in enumerate(shape) if d % tokens == 0]
        if tokens in shape or len(joined) != 1:
            return shape
        at = joined[0]
        return (*shape[:at], tokens, shape[at] // tokens, *shape[at + 1 :])

    def rope_table(
        self, inv_freq: Iterable[float], scaling: float, width: int = 0, scope: str = ""
    ) -> tuple[fx.Node, fx.Node]:
        """The nodes of cosines and sines, of one table for all that are equal. width: of each (0: a number a
        frequency). scope: path of the module that has the table."""
        frequencies = tuple(float(f) for f in inv_freq)
        data = RopeTableData(frequencies, scaling, width or len(frequencies))
        if data not in self._tables:
            self._tables.append(data)
        index = self._tables.index(data)
        if index not in self._table_nodes:
            before, self.scope = self.scope, scope
            # Before all layers, as transformers has it.
            with self.fx.inserting_after(self.embedding or self.size):
                table = self.call(torch.ops.hetcomp.rope_table.default, self._positions, index, data.width)
            with self.fx.inserting_after(table):
                self._table_nodes[index] = self.take(table, 0), self.take(table, 1)
            self.scope = before
        return self._table_nodes[index]

    def layer(self) -> int:
        """Number of the layer whose attention comes next."""
        return self.layers_done

    # ------------------------------------------------ the graph

    def write(self, node: Node) -> None:
        """Adds what ``node`` becomes. Raises NotComputable."""
        from hetcomp.frontend.onnx import (
            contrib_handlers,
            handlers,
            linear_attention_handlers,
            moe_handlers,
            own_handlers,
        )

        self._check_sizes(node)
        modules = handlers, contrib_handlers, linear_attention_handlers, moe_handlers, own_handlers
        handler = next((m.HANDLERS[node.op] for m in modules if node.op in m.HANDLERS), None)
        if handler is None:
            raise NotComputable("is of a kind that hetcomp cannot compile")
        self.scope = node.scope
        made = handler(self, node)
        for value, result in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            if result is not None:
                self.nodes[value] = result

    def _check_sizes(self, node: Node) -> None:
        run = self.run
        # Attention's other outputs are its caches.
        results = node.outputs[:1] if node.op in ATTENTION else node.outputs
        for value in (v for v in results if v in run.values):
            shape = run.shape(value)
            if run.past and (run.past in shape or run.seen in shape):
                raise NotComputable(
                    "has as many elements as the sequence has positions, but is part of no attention that hetcomp knows"
                )

    def finish(self, logits: str) -> TracedModel:
        """The whole graph."""
        result = self.activation(logits)
        self.fx.output((result,))
        self.fx.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        shapes = {name: p.shape for name, p in self.parameters.all.items()}
        return TracedModel(
            graph=self.fx,
            fqns=self._fqns,
            inputs=(_IDS, _POSITIONS),
            rope_tables=tuple(self._tables),
            context=self.context,
            parameter_names=frozenset(shapes),
            parameter_shapes=shapes,
            aliases={},
            computed_buffers=frozenset(),
        )


Handler = Callable[[Writer, Node], fx.Node | tuple[fx.Node | None, ...]]
