"""Graphs with If: a decoder for steps with and without caches in one file, as optimum merges them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from hetcomp import frontend
from hetcomp.errors import HetcompError
from tests.reference import onnx_models, tiny_models

BOUNDS = {"context_length": 32, "max_batch": 1, "max_tokens": 32, "max_logit_rows": 32}


def prefixed(graph: onnx.GraphProto, prefix: str, kept: set[str]) -> onnx.GraphProto:
    """All names but those of the inputs ``kept`` made the branch's own."""
    made = onnx.GraphProto()
    made.CopyFrom(graph)
    for node in made.node:
        node.input[:] = [v if v in kept or not v else prefix + v for v in node.input]
        node.output[:] = [prefix + v for v in node.output]
    for thing in [*made.initializer, *made.output]:
        thing.name = prefix + thing.name
    return made


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> tuple[Path, Path]:
    """With caches, and without."""
    folder = tmp_path_factory.mktemp("decoders")
    model = tiny_models.build("llama", num_hidden_layers=1)
    made = [onnx_models.export(folder / f"{caches}.onnx", model, caches=caches) for caches in (True, False)]
    return made[0], made[1]


def merged(decoders: tuple[Path, Path], condition: str, path: Path) -> Path:
    cached, plain = (onnx.load(p) for p in decoders)
    kept = {i.name for i in cached.graph.input}
    branches = []
    initialisers: list[onnx.TensorProto] = []
    for prefix, graph in (("then/", cached.graph), ("else/", plain.graph)):
        part = prefixed(graph, prefix, kept)
        initialisers.extend(part.initializer)
        outputs = part.output[:1]
        branches.append(helper.make_graph(part.node, f"{prefix}branch", [], outputs))
    inputs = [*cached.graph.input, helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])]
    nodes = [
        helper.make_node("If", [condition], ["logits"], "merged", then_branch=branches[0], else_branch=branches[1])
    ]
    if condition != "use_cache_branch":
        nodes.insert(0, helper.make_node("ReduceMin", ["input_ids"], ["least"], "least", keepdims=0))
        nodes.insert(1, helper.make_node("Cast", ["least"], [condition], to=TensorProto.BOOL))
    graph = helper.make_graph(nodes, "merged", inputs, cached.graph.output[:1], initialisers)
    onnx.save(helper.make_model(graph, opset_imports=cached.opset_import, ir_version=cached.ir_version), path)
    return path


def test_the_branch_with_caches_is_taken(decoders, tmp_path):
    got = frontend.load(merged(decoders, "use_cache_branch", tmp_path / "m.onnx"), **BOUNDS)
    assert got.plan.notes == () and all(name.startswith("else/") for name in got.unused)
    ids = [int(i) for i in range(3, 15)]
    want = onnx_models.reference_logits(decoders[0], ids, 5)
    assert onnx_models.relative_error(onnx_models.interpreted_logits(got, ids, 5), want) < 1e-5


def test_a_branch_that_tokens_choose(decoders, tmp_path):
    path = merged(decoders, "any", tmp_path / "m.onnx")
    with pytest.raises(HetcompError, match=r"node merged \(If\) chooses by any, which depends on more than"):
        frontend.load(path, **BOUNDS)
