"""Graphs of ONNX's own ops: their Plan, interpreted, against onnxruntime, and against the Plan of the same model."""

from __future__ import annotations

import onnx
import pytest

from hetcomp import frontend
from tests.reference import onnx_models, onnx_opset23_models, tiny_models

BOUNDS = {"context_length": 64, "max_batch": 1, "max_tokens": 64, "max_logit_rows": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def structure_ops(plan):
    """The ops of each call."""
    return [plan.template(call.template).ops for call in plan.calls]


def structure(plan):
    """Ops of all templates and what calls them, without names."""
    return [[op.attrs for op in ops] for ops in structure_ops(plan)]


@pytest.mark.parametrize(
    ("family", "attention", "odd", "options"),
    [
        ("llama", "eager", False, {"rope_scaling": LLAMA3}),
        ("llama", "sdpa", True, {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen3", "sdpa", False, {}),
        ("qwen3", "eager", True, {}),
    ],
)
def test_an_exported_decoder_becomes_the_plan_of_its_model(family, attention, odd, options, tmp_path):
    model = tiny_models.build(family, odd, num_hidden_layers=2, **options)
    want = frontend.load(model, **BOUNDS).plan
    path = onnx_models.export(tmp_path / "m.onnx", model, attention)
    got = frontend.load(path, **BOUNDS)
    assert structure(got.plan) == structure(want)
    assert len(got.plan.templates) == len(want.templates)
    assert got.unused == ()
    ids = [int(t) for t in tiny_models.token_ids(model, 9)[0]]
    logits = onnx_models.interpreted_logits(got, ids, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, ids, 5)) < 1e-5


@pytest.mark.slow
def test_what_torch_exports_today(tmp_path):
    """By torch.export, with opset 23's attention and tables of sines that no positions choose from."""
    model = tiny_models.build("qwen3", num_hidden_layers=1)
    path = onnx_models.export(tmp_path / "m.onnx", model, "sdpa", opset=23)
    assert "Attention" in {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    got = frontend.load(path, **BOUNDS)
    assert structure(got.plan) == structure(frontend.load(model, **BOUNDS).plan)
    ids = [int(t) for t in tiny_models.token_ids(model, 9)[0]]
    logits = onnx_models.interpreted_logits(got, ids, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, ids, 5)) < 1e-5


def test_layers_that_look_back_some_positions(tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "use_sliding_window": True}
    model = tiny_models.build("qwen3", num_hidden_layers=2, **kinds)
    path = onnx_models.export(tmp_path / "m.onnx", model)
    got = frontend.load(path, **BOUNDS)
    assert structure(got.plan) == structure(frontend.load(model, **BOUNDS).plan)
    windows = [op.attrs.window for ops in structure_ops(got.plan) for op in ops if op.kind == "attention"]
    assert windows == [7, 0]
    ids = [int(t) for t in tiny_models.token_ids(model, 12)[0]]
    logits = onnx_models.interpreted_logits(got, ids, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, ids, 5)) < 1e-5


def test_a_graph_without_caches_gets_them(tmp_path):
    model = tiny_models.build("llama", num_hidden_layers=1)
    path = onnx_models.export(tmp_path / "m.onnx", model, caches=False)
    got = frontend.load(path, **BOUNDS)
    assert structure(got.plan) == structure(frontend.load(model, **BOUNDS).plan)
    assert got.plan.model.max_positions == 2048
    ids = [int(t) for t in tiny_models.token_ids(model, 9)[0]]
    logits = onnx_models.interpreted_logits(got, ids, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, ids, 9)) < 1e-5


@pytest.mark.parametrize(("family", "float_mask"), [("llama", False), ("qwen3", True)])
def test_the_ops_of_opset_23(family, float_mask, tmp_path):
    model = tiny_models.build(family, num_hidden_layers=2)
    path = onnx_opset23_models.write(tmp_path / "m.onnx", model, float_mask)
    got = frontend.load(path, **BOUNDS)
    kinds = [op.kind for template in got.plan.templates for op in template.ops]
    assert {"attention", "rope", "rms_norm"} <= set(kinds) and "aten" not in kinds
    ids = [int(t) for t in tiny_models.token_ids(model, 9)[0]]
    logits = onnx_models.interpreted_logits(got, ids, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, ids, 5)) < 1e-5
