"""The networkx view of a plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import networkx as nx
import pytest

from hetcomp.ir.graph import critical_path, plan_graph
from hetcomp.ir.plan import Plan
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import context, tiny_plan


@pytest.fixture(scope="module")
def planned() -> Plan:
    return run_pipeline(tiny_plan(), context())


def test_one_node_an_op_and_no_cycle(planned: Plan):
    graph = plan_graph(planned, "decode")
    assert len(graph) == sum(len(planned.template(c.template).ops) for c in planned.calls)
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.is_weakly_connected(graph)


def test_edges_within_and_between_layers(planned: Plan):
    graph = plan_graph(planned)
    layers = [i for i, c in enumerate(planned.calls) if c.layer is not None]
    first, second = layers[:2]
    attention = next(n for n, d in graph.nodes(data=True) if d["call"] == first and d["kind"] == "attention")
    append = f"{first}.append_k"
    assert graph.has_edge(append, attention)  # through the cache
    assert not nx.has_path(graph, f"{first}.q", append)  # independent projections
    last_op = planned.template(planned.calls[first].template).ops[-1].id
    assert nx.has_path(graph, f"{first}.{last_op}", f"{second}.norm")
    # The caches of two layers are different states.
    assert not graph.has_edge(append, attention.replace(f"{first}.", f"{second}.", 1))


def test_attributes(planned: Plan):
    graph = plan_graph(planned, "decode")
    experts = [d for _, d in graph.nodes(data=True) if d["kind"] == "moe_experts"]
    assert {d["role"] for d in experts} == {"moe.experts"}
    assert all(d["us"] > 0 and d["device"] == "cpu:0" for d in experts)
    assert all(d["us"] == 0.0 for _, d in plan_graph(planned).nodes(data=True))


def test_critical_path_is_a_path_and_the_longest(planned: Plan):
    graph = plan_graph(planned, "decode")
    path, us = critical_path(graph)
    assert all(graph.has_edge(a, b) for a, b in itertools.pairwise(path))
    assert us == pytest.approx(sum(graph.nodes[n]["us"] for n in path))
    # networkx weighs edges: give each the time of the node it enters, and a root to enter the first.
    weighted = nx.DiGraph()
    weighted.add_weighted_edges_from((a, b, graph.nodes[b]["us"]) for a, b in graph.edges)
    weighted.add_weighted_edges_from(("root", n, graph.nodes[n]["us"]) for n in graph)
    assert us == pytest.approx(nx.dag_longest_path_length(weighted))
    # One lane can be no faster than the chain of what depends on each other.
    assert us <= next(t for t in planned.timelines if t.phase == "decode").total_us


def test_empty_plan_has_no_path():
    assert critical_path(plan_graph(replace(tiny_plan(), calls=()))) == ([], 0.0)
