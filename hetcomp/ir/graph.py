"""The Plan as a networkx graph, layers spelled out: for critical paths, drawing and questions about dependence."""

from __future__ import annotations

import networkx as nx

from hetcomp.ir.ops import STATE_WRITERS
from hetcomp.ir.plan import Call, Op, Plan, Template, ValueKind


def plan_graph(plan: Plan, phase: str | None = None) -> nx.DiGraph:
    """One node an op of every call, named ``<index of the call>.<op id>``.

    Node attributes: call, template, layer, op, kind, role, device ("" before place) and us (predicted time in
    ``phase``, 0.0 without). Edges run from the writer of a value to its readers, with the value's name there as
    ``value``; an op that writes a state is its writer within a call. Weights and inputs have no node.
    """
    graph = nx.DiGraph(phase=phase)
    writers: dict[str, str] = {}
    for index, call in enumerate(plan.calls):
        _add_call(graph, plan.template(call.template), call, index, phase, writers)
    return graph


def critical_path(graph: nx.DiGraph) -> tuple[list[str], float]:
    """Nodes of the longest chain by ``us`` in a graph of :func:`plan_graph`, in order, and its length in
    microseconds: no number of lanes makes a step shorter."""
    longest: dict[str, tuple[float, str | None]] = {}
    for node in nx.topological_sort(graph):
        before = max(((longest[p][0], p) for p in graph.predecessors(node)), default=(0.0, None))
        longest[node] = (before[0] + graph.nodes[node]["us"], before[1])
    if not longest:
        return [], 0.0
    at: str | None = max(longest, key=lambda n: longest[n][0])
    assert at is not None
    total = longest[at][0]
    path = []
    while at is not None:
        path.append(at)
        at = longest[at][1]
    return path[::-1], total


def _add_call(
    graph: nx.DiGraph, template: Template, call: Call, index: int, phase: str | None, writers: dict[str, str]
) -> None:
    values = template.value_map()
    devices = {op: placement.device for op, placement in call.placements}
    arguments = dict(zip(template.params, call.args, strict=True))
    results = dict(zip(template.results, call.results, strict=True))
    local: dict[str, str] = {}
    for op in template.ops:
        node = f"{index}.{op.id}"
        graph.add_node(
            node,
            call=index,
            template=template.name,
            layer=call.layer,
            op=op.id,
            kind=op.kind,
            role=op.role,
            device=devices.get(op.id, ""),
            us=_us(op, phase),
        )
        for name in op.inputs:
            writer = local.get(name) or writers.get(arguments.get(name, ""))
            if writer is not None:
                graph.add_edge(writer, node, value=name)
            if op.kind in STATE_WRITERS and values[name].kind is ValueKind.STATE:
                local[name] = node
        local.update(dict.fromkeys(op.outputs, node))
    # Only now: a call may read and write the same value of the plan.
    writers.update({actual: local[formal] for formal, actual in results.items() if formal in local})
    # A result that is an argument handed through keeps its writer.
    for formal, actual in results.items():
        if formal not in local and arguments.get(formal) in writers:
            writers[actual] = writers[arguments[formal]]


def _us(op: Op, phase: str | None) -> float:
    if phase is None or op.cost is None:
        return 0.0
    return op.cost.phase(phase).us
