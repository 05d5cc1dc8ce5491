"""If nodes: replaced by the branch that a sequence takes. Merged decoders have one for steps with caches and one for
steps without; longrope has two tables of cosines and sines, for sequences of up to a length and for longer ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.evaluate import Evaluator
from hetcomp.frontend.onnx.graph import Branch, Graph, Node


@dataclass(frozen=True)
class Straight:
    """A graph without If. ``by_length``: the nodes whose branch depends on how long the sequence is."""

    graph: Graph
    by_length: tuple[str, ...]


def without_branches(graph: Graph, evaluator: Evaluator, positions: int, origin: str) -> Straight:
    """The graph with the branches that the last token of a sequence of ``positions`` takes. Raises HetcompError naming
    an If that asks for more than inputs say."""
    by_length = []
    while (node := next((n for n in graph.nodes if n.op == "If"), None)) is not None:
        taken = _condition(graph, node, evaluator, positions, origin)
        if taken != _condition(graph, node, evaluator, 1, origin):
            by_length.append(str(node))
        graph = graph.replaced(_inlined(node, taken, origin), graph.outputs)
    return Straight(graph, tuple(by_length))


def _condition(graph: Graph, node: Node, evaluator: Evaluator, positions: int, origin: str) -> bool:
    asked = node.inputs[0]
    before = graph.replaced({}, [asked])
    used = {v for n in before.nodes for v in n.inputs} | {asked}
    inputs = {name: given for name, given in graph.inputs.items() if name in used}
    part = Graph(before.nodes, inputs, (asked,), {n: t for n, t in graph.initialisers.items() if n in used})
    value = evaluator.run(part, 1, positions - 1).number(asked)
    if value is None:
        raise HetcompError(f"{origin}: {node} chooses by {asked}, which depends on more than the sequence's length")
    return bool(value)


def _inlined(node: Node, taken: bool, origin: str) -> Mapping[str, list[Node]]:
    """The nodes of a branch, behind the last of them what hands its results over."""
    branch = node.attributes["then_branch" if taken else "else_branch"]
    if not isinstance(branch, Branch):
        raise HetcompError(f"{origin}: {node} has a branch that is no graph")
    handed = [
        Node(f"{node.name}/{made}", "Identity", (value,), (made,), scope=node.scope)
        for value, made in zip(branch.outputs, node.outputs, strict=False)
    ]
    return {node.outputs[0]: [*branch.nodes, *handed]}
