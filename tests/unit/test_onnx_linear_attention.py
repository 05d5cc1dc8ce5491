"""Linear attention in ONNX graphs, in all forms that it comes in: the Plan, interpreted, against onnxruntime's CPU
kernels, with states carried from step to step, and against transformers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.export_graph import GraphExport, model_of
from hetcomp.frontend.onnx.import_model import read_model, traced_model
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference import onnx_linear_attention_models as models
from tests.reference import onnx_models

BOUNDS = {"context_length": 32, "max_batch": 1, "max_tokens": 32, "max_logit_rows": 32}
IDS = list(range(17, 200, 14))


@pytest.fixture(scope="module")
def model():
    return models.model()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The file in each form, and what it is imported as."""
    made = {}

    def one(form: str):
        if form not in made:
            path = models.write(tmp_path_factory.mktemp(form) / "m.onnx", model, form)
            made[form] = path, frontend.load(path, **BOUNDS)
        return made[form]

    return one


def kinds(imported, kind: str) -> set:
    return {op.attrs for t in imported.plan.templates for op in t.ops if op.kind == kind}


@pytest.mark.parametrize("form", models.FORMS)
def test_logits_are_onnxruntimes(form, written):
    """In one go, and one token after the other behind a prompt shorter than the convolution reaches back."""
    path, got = written(form)
    assert got.unused == ()
    assert "aten" not in {op.kind for template in got.plan.templates for op in template.ops}
    for split in (len(IDS), 2):
        want = onnx_models.reference_logits(path, IDS, split, 16)
        assert onnx_models.relative_error(onnx_models.interpreted_logits(got, IDS, split), want) < 1e-5


def test_logits_are_transformers(model, written):
    """The form with its epsilon in the norm of queries and keys."""
    with torch.no_grad():
        want = model(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    _, got = written("plain")
    assert onnx_models.relative_error(onnx_models.interpreted_logits(got, IDS, 5), want) < 1e-5


@pytest.mark.parametrize(("bits", "op"), [(32, "MoE"), (4, "QMoE")])
def test_qwen3_5_with_routed_experts_and_a_shared_one(bits, op, tmp_path):
    """As genai writes it, against onnxruntime; in floats, with the epsilon of queries and keys, transformers, too."""
    made = models.model(("linear_attention", "full_attention"), experts=6)
    path = models.write(tmp_path / "m.onnx", made, "genai" if bits == 4 else "plain", bits)
    assert op in {node.op_type for node in onnx.load(path).graph.node}
    got = frontend.load(path, **BOUNDS)
    assert got.unused == ()
    assert len(kinds(got, "moe_experts")) == 1 and {a.top_k for a in kinds(got, "route")} == {2}
    logits = onnx_models.interpreted_logits(got, IDS, 5)
    assert onnx_models.relative_error(logits, onnx_models.reference_logits(path, IDS, 5, 16)) < 1e-5
    if bits == 32:
        with torch.no_grad():
            want = made(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
        assert onnx_models.relative_error(logits, want) < 1e-5


@pytest.mark.parametrize(("form", "eps"), [("genai", 1e-30), ("plain", 1e-6), ("onnx", 1e-6), ("net", 1e-12)])
def test_one_op_has_norms_and_gates_inside(form, eps, written):
    _, got = written(form)
    assert kinds(got, "gated_delta") == {ops.GatedDelta(2, 4, 8, 12, 8**-0.5, eps)}
    assert kinds(got, "causal_conv") == {ops.CausalConv(80, 4, "silu", form != "onnx")}
    states = {v.fqn: v.type.shape for v in got.plan.values if v.kind is ValueKind.STATE and not v.type.is_cache}
    assert states == {
        f"l{layer}.cache.{kind}": ("slots", *shape)
        for layer in (0, 2)
        for kind, shape in (("conv", (3, 80)), ("delta", (4, 8, 12)))
    }
    assert [call.layer for call in got.plan.calls if call.layer is not None] == [0, 1, 2]
    assert got.plan.model.layers == 3


def test_the_logarithm_of_a_folded_decay(model, written):
    """-exp(A_log) in float32 is some 1e-7 of itself off; so far off is A_log, and no farther."""
    _, got = written("genai")
    values = [v for v in got.plan.values if (v.fqn or "").endswith("neg_exp_A")]
    assert len(values) == 2
    for value in values:
        want = model.state_dict()[value.fqn.replace("neg_exp_A", "A_log")].numpy()
        np.testing.assert_allclose(got.checkpoint.read(value), want, rtol=0, atol=3e-7)


@pytest.mark.parametrize("form", ["genai", "plain"])
def test_exported_again_it_is_the_same_plan(form, written, tmp_path):
    path, got = written(form)
    traced, checkpoint = traced_model(read_model(path), BOUNDS["context_length"])
    export = GraphExport(traced, frontend.find(path).config)
    graph = export.build()
    for name, shape in export.weights.items():
        whole = Value(name, TensorType(DType.F32, shape), ValueKind.WEIGHT, fqn=name)  # the plan may have parts of it
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(checkpoint.read(whole)), name))
    again = tmp_path / "again.onnx"
    onnx.save(model_of(graph, {}), again)
    found = frontend.load(again, **BOUNDS).plan
    assert (found.templates, found.calls, found.values) == (got.plan.templates, got.plan.calls, got.plan.values)


# ---------------------------------------------------------------- refusals


def refusal(tmp_path, model, form: str, change=lambda graph: None, **attributes: object) -> str:
    path = models.write(tmp_path / "m.onnx", model, form, **attributes)
    made = onnx.load(path)
    change(made.graph)
    onnx.save(made, path)
    with pytest.raises(HetcompError) as caught:
        frontend.load(path, **BOUNDS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def node(graph, kind: str):
    return next(n for n in graph.node if n.op_type == kind)


def added(kind: str, operand: int, to: str, *others: str):
    """Another op between an operand of the first node of a kind and what makes it."""

    def change(graph):
        reader = node(graph, to)
        made = onnx.helper.make_node(kind, [reader.input[operand], *others], ["between"], name="between")
        reader.input[operand] = "between"
        graph.node.insert(list(graph.node).index(reader), made)

    return change


def started_elsewhere(kind: str, *shape: int):
    """A state that the file has, and not its caller."""

    def change(graph):
        graph.initializer.append(numpy_helper.from_array(np.ones((1, *shape), np.float32), "start"))
        node(graph, kind).input[3] = "start"

    return change


@pytest.mark.parametrize(
    ("form", "attributes", "change", "says"),
    [
        ("genai", {"update_rule": "delta"}, lambda g: None, "update_rule=delta; hetcomp compiles gated_delta"),
        ("net", {"update_rule": "gated"}, lambda g: None, "update_rule=gated; hetcomp compiles gated_delta"),
        ("genai", {"state_window": 2}, lambda g: None, "state_window=2"),
        ("net", {"gate_activation": "kda"}, lambda g: None, "gate_activation=kda"),
        ("genai", {}, added("Abs", 4, "LinearAttention"), "a decay that is not -exp(a_log) * softplus(a + dt_bias)"),
        ("genai", {}, added("Sqrt", 5, "LinearAttention"), "a beta that is not the sigmoid of something"),
        ("genai", {}, added("Neg", 1, "LinearAttention"), "keys that are scaled"),
        ("genai", {}, started_elsewhere("LinearAttention", 4, 8, 12), "begins with the state start, which is neither"),
        ("genai", {}, started_elsewhere("CausalConvWithState", 80, 3), "begins with the state start, which is neither"),
    ],
)  # fmt: skip
def test_what_is_not_compiled_is_named_with_its_node(form, attributes, change, says, model, tmp_path):
    text = refusal(tmp_path, model, form, change, **attributes)
    assert says in text and "node /model/layers.0/linear_attn/" in text
