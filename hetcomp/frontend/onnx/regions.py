"""Parts of a graph between values: what a recogniser tries, and replaces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from hetcomp.frontend.onnx.evaluate import Run
from hetcomp.frontend.onnx.graph import Graph, Node


@dataclass(frozen=True)
class Region:
    """``nodes`` in order, which make ``result`` of the activations ``sources`` and of what has numbers."""

    nodes: tuple[Node, ...]
    sources: tuple[str, ...]
    result: str


class Regions:
    """Finds regions in one graph."""

    def __init__(self, graph: Graph, run: Run) -> None:
        self.run = run
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self._at = {node: i for i, node in enumerate(graph.nodes)}

    def between(self, sources: Collection[str], result: str) -> Region | None:
        """The region that makes ``result`` of ``sources``; None if it needs other activations or weights too."""
        members: set[Node] = set()
        found: set[str] = set()
        todo = [result]
        while todo:
            value = todo.pop()
            if value in sources:
                found.add(value)
                continue
            node = self.producers.get(value)
            if node is None:
                return None
            if node not in members:
                members.add(node)
                todo.extend(self.unknown(node))
        return Region(self._ordered(members), tuple(v for v in sources if v in found), result)

    def unknown(self, node: Node) -> list[str]:
        """The operands of ``node`` that are activations or weights; a single number is neither."""
        return [v for v in node.inputs if v and self._is_unknown(v)]

    def _is_unknown(self, value: str) -> bool:
        found = self.run.values.get(value)
        if found is None or found.is_meta:
            return True
        return value in self.run.weights and found.is_floating_point() and found.numel() > 1

    def to_single_source(self, result: str, limit: int = 60) -> Region | None:
        """The smallest region behind ``result`` that one activation alone goes into; None if a weight or an input of
        the graph goes into it, or it has more than ``limit`` nodes."""
        members: set[Node] = set()
        frontier = {result}
        while len(members) < limit:
            made = [(self._at[self.producers[v]], v) for v in frontier if v in self.producers]
            if len(made) < len(frontier):
                return None
            node = self.producers[max(made)[1]]
            members.add(node)
            frontier.difference_update(node.outputs)
            frontier.update(self.unknown(node))
            if len(frontier) == 1:
                return Region(self._ordered(members), tuple(frontier), result)
            if not frontier or any(v in self.run.weights for v in frontier):
                return None
        return None

    def behind(self, results: Iterable[str], opened: Callable[[str], bool], limit: int = 60) -> Iterator[Region]:
        """Regions that make the first of ``results``, and all others, larger and larger: each has one node more than
        the one before, at most ``limit``. opened: values that nodes are asked for although they are known numbers."""
        first, *others = results
        members: set[Node] = set()
        frontier = {first, *others}
        while len(members) < limit:
            made = [(self._at[self.producers[v]], v) for v in frontier if v in self.producers]
            if not made:
                return
            node = self.producers[max(made)[1]]
            members.add(node)
            frontier.difference_update(node.outputs)
            frontier.update(v for v in node.inputs if v and (self._is_unknown(v) or opened(v)))
            yield Region(self._ordered(members), tuple(sorted(frontier)), first)

    def _ordered(self, members: set[Node]) -> tuple[Node, ...]:
        return tuple(sorted(members, key=lambda n: self._at[n]))
