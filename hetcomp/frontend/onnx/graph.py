"""An ONNX graph as plain data: nodes in order, what each value is made by, and the weights beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.ir.plan import CheckpointTensor

# What torch.onnx.export writes beside a node: its module and those around it, the node itself last.
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUOTED = re.compile(r"'([^']*)'")


class Attributes(dict[str, Any]):
    """Attributes by name. One that is asked for and not there is NotComputable."""

    def __missing__(self, name: str) -> Any:  # noqa: ANN401 - as the file would have it
        raise NotComputable(f"has no attribute {name}")


@dataclass(frozen=True, eq=False)
class Node:
    """``op``: the type, with its domain in front unless that is ONNX's own (``com.microsoft.MoE``). ``scope``: path of
    the module that it was exported from, empty if nothing says. An absent optional input is an empty text."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=Attributes)
    scope: str = ""

    def get(self, attribute: str, default: Any) -> Any:  # noqa: ANN401 - as the file has it
        """An attribute, ``default`` if it is not there."""
        return self.attributes.get(attribute, default)

    def input(self, index: int) -> str:
        """An input, empty if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def __str__(self) -> str:
        return f"node {self.name or self.outputs[0]} ({self.op})"


@dataclass(frozen=True)
class Branch:
    """What an If computes in one case: nodes, which also read values of the graph around them, and what they give."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Input:
    """An input of the graph. ``shape``: a text for a dimension that is not fixed. ``dtype``: as in CheckpointTensor."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """``inputs`` without initialisers. ``initialisers`` are known by their headers."""

    nodes: tuple[Node, ...]
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    initialisers: Mapping[str, CheckpointTensor]

    def producers(self) -> dict[str, Node]:
        """The node that makes each value."""
        return {value: node for node in self.nodes for value in node.outputs if value}

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, in order."""
        out: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                out.setdefault(value, []).append(node)
        return out

    def replaced(self, new: Mapping[str, Sequence[Node]], wanted: Iterable[str]) -> Graph:
        """With other nodes for some values, each set standing where the node did that made the value; nodes that none
        of the values ``wanted`` needs are dropped."""
        nodes: list[Node] = []
        for node in self.nodes:
            made = [value for value in node.outputs if value in new]
            nodes.extend(n for value in made for n in new[value])
            if not made:
                nodes.append(node)
        needed, kept = set(wanted), []
        for node in reversed(nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        return replace(self, nodes=tuple(reversed(kept)))


def scope_of(name: str, metadata: Mapping[str, str]) -> str:
    """Path of the module that a node belongs to: from torch's metadata, else from the node's name, which the older
    exporter and onnxruntime-genai write as ``/model/layers.0/mlp/gate_proj/MatMul``."""
    scopes = _QUOTED.findall(metadata.get(_SCOPES, ""))
    if len(scopes) > 1:
        return str(scopes[-2])
    if name.startswith("/"):
        return ".".join(part for part in name.split("/")[1:-1])
    return ""
