"""A model as a clean fx graph, wherever it comes from: what is lowered to the Plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from hetcomp.frontend.recognise import RopeTableData

WRAPPER = "m."  # the module that a traced model is wrapped in, in front of its modules' paths


@dataclass(frozen=True)
class TracedModel:
    """A cleaned graph. ``fqns`` names the parameter or buffer behind a placeholder; tied parameters have the
    first of their names, ``aliases`` has the others. ``computed_buffers`` are not in checkpoints. ``inputs``
    are the placeholders of the step: ids, positions. ``notes``: what the user should know of what it computes."""

    graph: fx.Graph
    fqns: dict[str, str]
    inputs: tuple[str, str]
    rope_tables: tuple[RopeTableData, ...]
    context: int
    parameter_names: frozenset[str]
    parameter_shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, tuple[str, ...]]
    computed_buffers: frozenset[str]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The graph, one node a line, with shapes; for dumps and docs."""
        lines = []
        for node in self.graph.nodes:
            value = node.meta.get("val")
            shape = tuple(str(d) for d in value.shape) if isinstance(value, Tensor) else ""
            what = self.fqns.get(node.name, "") if node.op == "placeholder" else str(node.target)
            lines.append(f"%{node.name} = {what}{node.args if node.op != 'placeholder' else ''} : {shape}")
        return "\n".join(lines) + "\n"


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ``node`` was traced in, without the wrapper's prefix."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = str(entry[0])
    return path.removeprefix(WRAPPER).removeprefix("m") if path == "m" else path.removeprefix(WRAPPER)
