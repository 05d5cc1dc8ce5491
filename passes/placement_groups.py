"""Which ops of a template belong on one device, and which can run beside its experts."""

from __future__ import annotations

from collections import defaultdict

import networkx as nx

from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Template, ValueKind
from hetcomp.passes.context import Context

# Weights below this are not worth a decision of their own (norms, biases): such ops go where their input is made.
SMALL_BYTES = 1 << 18


def op_groups(template: Template, context: Context) -> list[list[Op]]:
    """The template's ops, experts left out, in groups that belong on one device: ops that share a state or a weight,
    and ops without weights worth mentioning with the op that makes their input (or reads their output)."""
    values = template.value_map()
    members = [op for op in template.ops if not isinstance(op.attrs, ops.MoeExperts)]
    graph = nx.Graph()
    graph.add_nodes_from(op.id for op in members)
    maker = {name: op.id for op in members for name in op.outputs}
    users: dict[str, str] = {}
    for op in members:
        heavy = False
        for name in op.inputs:
            value = values[name]
            if value.kind is ValueKind.STATE or (value.kind is ValueKind.WEIGHT and name in users):
                if name in users:
                    graph.add_edge(op.id, users[name])
            if value.kind in (ValueKind.WEIGHT, ValueKind.STATE):
                users[name] = op.id
                heavy = heavy or value.kind is ValueKind.STATE or context.target.packed_bytes(value) > SMALL_BYTES
        made = [maker[name] for name in op.inputs if name in maker]
        if not heavy and made:
            graph.add_edge(op.id, made[-1])
        elif not heavy:
            reader = next((o.id for o in members if set(o.inputs) & set(op.outputs)), None)
            if reader is not None:
                graph.add_edge(op.id, reader)
    component = {node: i for i, nodes in enumerate(nx.connected_components(graph)) for node in nodes}
    parts: dict[int, list[Op]] = defaultdict(list)
    for op in members:
        parts[component[op.id]].append(op)
    return list(parts.values())


def beside_experts(template: Template) -> set[str]:
    """Ops that neither feed the experts nor read their sum: what another device can do meanwhile."""
    graph = nx.DiGraph()
    maker = {name: op.id for op in template.ops for name in op.outputs}
    for op in template.ops:
        graph.add_node(op.id)
        graph.add_edges_from((maker[name], op.id) for name in op.inputs if name in maker)
    beside: set[str] = set()
    for op in template.ops:
        if isinstance(op.attrs, ops.MoeExperts):
            beside |= set(graph) - nx.ancestors(graph, op.id) - nx.descendants(graph, op.id) - {op.id}
    # What only starts after the experts' input is made runs beside them; a rope table does not.
    return {name for name in beside if _reads_experts_input(template, name, graph)}


def _reads_experts_input(template: Template, name: str, graph: nx.DiGraph) -> bool:
    inputs = {op.inputs[0] for op in template.ops if isinstance(op.attrs, ops.MoeExperts)}
    by_id = {op.id: op for op in template.ops}
    return any(inputs & set(by_id[n].inputs) for n in (*nx.ancestors(graph, name), name))
