"""From a trace to an ONNX graph: the way back of import_model.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.decimals import decimal
from hetcomp.frontend.onnx.export_nodes import handler_of
from hetcomp.frontend.routing import Router, find_routers
from hetcomp.frontend.traced_model import TracedModel, module_path

DOMAIN = "hetcomp"
_OPSETS = {"": 20, DOMAIN: 1}  # 20: the first that has Gelu
_IR_VERSION = 10


class GraphExport:
    """A graph under construction. ``weights``: names of the parameters that its nodes read."""

    def __init__(self, traced: TracedModel, config: object) -> None:
        self.traced = traced
        self.routers: dict[fx.Node, Router] = find_routers(traced.graph, config)
        self.results: dict[fx.Node, list[str]] = {}
        self.weights: dict[str, tuple[int, ...]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._counts: dict[str, int] = {}
        # What is asked for from the output on: the ops of a router that is one op are not.
        self._wanted = self._needed()

    def build(self) -> onnx.GraphProto:
        """The graph, its weights left out. Raises HetcompError naming what cannot be exported."""
        ids, positions = self.traced.inputs
        logits = None
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.results[node] = [self._placeholder(node, ids, positions)]
            elif node.op == "output":
                logits = node.args[0][0]
            elif node in self._wanted:
                self._call(node)
        assert isinstance(logits, fx.Node)
        self._nodes.append(helper.make_node("Identity", [self.value(logits)], ["logits"], name="/logits/Identity"))
        axes = ["batch", "sequence"]
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, axes) for n in ("input_ids", "position_ids")]
        vocab = int(logits.meta["val"].shape[-1])
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*axes, vocab])]
        return helper.make_graph(self._nodes, "step", inputs, outputs, list(self._constants.values()))

    def _needed(self) -> set[fx.Node]:
        out: set[fx.Node] = set()
        todo = [n for n in self.traced.graph.nodes if n.op == "output"]
        while todo:
            node = todo.pop()
            if node in out:
                continue
            out.add(node)
            router = self.routers.get(node)
            if router is None:
                todo.extend(node.all_input_nodes)
            else:
                todo.extend(n for n in node.all_input_nodes if n not in node.args[1:3])
                todo.append(router.logits)
        return out

    def _placeholder(self, node: fx.Node, ids: str, positions: str) -> str:
        if node.name in (ids, positions):
            return "input_ids" if node.name == ids else "position_ids"
        return self.traced.fqns.get(node.name, node.name)

    def _call(self, node: fx.Node) -> None:
        if "sym_size" in str(node.target):
            return
        handler = handler_of(node)
        if handler is None:
            raise HetcompError(f"{module_path(node)}: {node.target} is not exported to ONNX")
        made = handler(self, node)
        self.results[node] = [made] if isinstance(made, str) else made

    # ------------------------------------------------ what handlers use

    def value(self, node: object) -> str:
        """The name of the value that ``node`` became."""
        if not isinstance(node, fx.Node) or node not in self.results:
            raise HetcompError(f"an operand {node} of the trace is not exported to ONNX")
        name = self.results[node][0]
        if node.op == "placeholder" and name not in ("input_ids", "position_ids"):
            if name in self.traced.computed_buffers:
                raise HetcompError(f"{name} is computed when the model is built; it is not exported to ONNX")
            self.weights[name] = tuple(int(d) for d in node.meta["val"].shape)
        return name

    def add(self, node: fx.Node, op: str, inputs: Iterable[str], **attributes: object) -> str:
        """A node of the graph, under the path of the module that ``node`` was traced in; its result."""
        return self.add_several(node, op, inputs, 1, **attributes)[0]

    def add_several(self, node: fx.Node, op: str, inputs: Iterable[str], count: int, **attributes: object) -> list[str]:
        """As :meth:`add`, for a node with several results."""
        domain, _, kind = op.rpartition(".")
        path = module_path(node)
        base = "/".join(["", *path.split("."), kind]) if path else f"/{kind}"
        number = self._counts[base] = self._counts.get(base, 0) + 1
        name = base if number == 1 else f"{base}_{number}"
        results = [f"{name}/output_{i}" for i in range(count)]
        made = helper.make_node(kind, list(inputs), results, name=name, domain=domain)
        made.attribute.extend(_attribute(k, v) for k, v in attributes.items())
        # As torch.onnx.export writes the modules around a node.
        entry = made.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", str(["", path, name])
        self._nodes.append(made)
        return results

    def integers(self, numbers: list[int]) -> str:
        """A constant vector."""
        return self._constant(f"/constants/{numbers}", np.array(numbers, np.int64))

    def number(self, number: Any) -> str:  # noqa: ANN401 - torch's scalars
        """A constant number. Raises HetcompError if f32 does not hold it as it was written."""
        if _single(float(number)) is None:
            raise HetcompError(f"the factor {number} has more digits than float32 holds; it is not exported to ONNX")
        return self._constant(f"/constants/{float(number)}", np.array(float(number), np.float32))

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name


def model_of(graph: onnx.GraphProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """The model of a graph of ours."""
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="hetcomp")
    helper.set_model_props(made, metadata)
    return made


def _single(number: float) -> float | None:
    """``number`` if it is the shortest decimal of its float32."""
    return number if math.isfinite(number) and decimal(number) == number else None


def _attribute(name: str, value: Any) -> onnx.AttributeProto:  # noqa: ANN401 - all that attributes may be
    """ONNX's floats are single; a number that these do not hold as it was written is a tensor of one double."""
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and _single(value) is None:
        value = numpy_helper.from_array(np.array(value, np.float64))
    return helper.make_attribute(name, value)
