"""Graphs of onnxruntime-genai's ops: their Plan, interpreted, against onnxruntime's CPU kernels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from hetcomp import frontend
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Plan, ValueKind
from tests.reference import onnx_genai_models, onnx_models, tiny_models
from tests.reference.conversion_notes import assert_q8_notes

BOUNDS = {"context_length": 64, "max_batch": 1, "max_tokens": 64, "max_logit_rows": 64}


def imported(path):
    return frontend.load(path, **BOUNDS)


def planned(path: Path) -> Plan:
    return plan_model(path, hw_profile="preset:9950x-64gb", context_length=32).plan


def stored(got) -> dict[str, tuple[str, str]]:
    """(how it is stored, format; with ~ if that is not exact) by the last parts of each quantised weight's name."""
    out = {}
    for value in (v for v in got.plan.values if v.kind is ValueKind.WEIGHT):
        quantised = got.checkpoint.source(value).tensors[0].quantised
        if quantised is not None:
            out[".".join(value.fqn.split(".")[-2:])] = (quantised.label, quantised.format)
    return out


@pytest.mark.parametrize(
    ("family", "options", "choices"),
    [
        ("llama", {"tie_word_embeddings": False}, {}),
        ("llama", {"attention_bias": True}, {"joined": True}),
        ("llama", {}, {"rotary": False, "attributes": {"softcap": 3.0}}),
        ("qwen3", {}, {"rotary": False}),
        ("qwen3_moe", {}, {}),
        pytest.param("qwen3_moe", {"norm_topk_prob": False}, {"rotary": False}, marks=pytest.mark.exhaustive),
        ("gpt_oss", {}, {}),
        ("qwen3_moe", {}, {"bits": 4}),
        pytest.param("qwen3_moe", {}, {"bits": 4, "zeros": True}, marks=pytest.mark.exhaustive),
        ("qwen3_moe", {}, {"bits": 8, "expert_rows": True}),
        ("gpt_oss", {}, {"bits": 4, "zeros": True}),
        pytest.param("llama", {}, {"bits": 4, "block": 16, "zeros": True}, marks=pytest.mark.exhaustive),
        pytest.param("llama", {}, {"bits": 8, "zeros": True}, marks=pytest.mark.exhaustive),
        ("llama", {}, {"bits": 8, "quantised_embedding": True}),
        pytest.param(
            "llama", {"hidden_size": 80, "head_dim": 16}, {"bits": 4, "block": 64}, marks=pytest.mark.exhaustive
        ),
        ("llama", {}, {"bits": 4, "scattered": True}),
        ("llama", {"hidden_size": 80, "head_dim": 16}, {"bits": 4, "block": 64, "scattered": True}),
        ("qwen3", {"tie_word_embeddings": True}, {"bits": 4, "quantised_embedding": True, "sized": False}),
    ],
)
def test_logits_are_onnxruntimes(family, options, choices, tmp_path):
    """In 14 tokens the layers of GPT-OSS that see few positions differ from those that see all."""
    layers = {} if family == "gpt_oss" else {"num_hidden_layers": 2}  # whose layers are of kinds that its config lists
    model = tiny_models.build(family, **layers, **options)
    path = onnx_genai_models.write(tmp_path / "m.onnx", model, **choices)
    got = imported(path)
    assert got.unused == ()
    assert "aten" not in {op.kind for template in got.plan.templates for op in template.ops}
    assert len(got.plan.templates) == len(frontend.load(model, **BOUNDS).plan.templates)
    ids = [int(t) for t in tiny_models.token_ids(model, 14)[0]]
    want = onnx_models.reference_logits(path, ids, 5, model.config.head_dim)
    assert onnx_models.relative_error(onnx_models.interpreted_logits(got, ids, 5), want) < 1e-5


def error_of(path, model, reference=None) -> float:
    """Of the Plan's logits: against onnxruntime's of another file, or transformers'."""
    ids = [int(t) for t in tiny_models.token_ids(model, 14)[0]]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    want = logits if reference is None else onnx_models.reference_logits(reference, ids, 5)
    return onnx_models.relative_error(onnx_models.interpreted_logits(imported(path), ids, 5), want)


@pytest.mark.parametrize(
    ("choices", "layout"),
    [
        ({"bits": 4, "zeros": True}, "panels16_act_order"),
        ({"bits": 8}, "panels16_act_order"),
        ({"bits": 8, "zeros": True}, "panels16"),
        ({"bits": 4, "block": 16, "zeros": True}, "panels16"),
    ],
)
def test_columns_of_blocks_are_where_they_are(choices, layout, tmp_path):
    """onnxruntime's CPU kernel for such (MatMulNBits with g_idx) has no 8 bits and takes all zero points for 8: the
    reference is the graph of the numbers that the codes stand for. What no format holds becomes q8."""
    model = tiny_models.build("llama", num_hidden_layers=1)
    coded = onnx_genai_models.write(tmp_path / "coded.onnx", model, scattered=True, **choices)
    floats = onnx_genai_models.write(tmp_path / "floats.onnx", model, scattered=True, as_numbers=True, **choices)
    assert error_of(coded, model, floats) < 1e-5
    weights = [v for v in planned(coded).values if v.kind is ValueKind.WEIGHT and v.fqn.endswith("proj.weight")]
    assert {v.type.layout for v in weights} == {layout}


def test_columns_of_blocks_that_there_are_not(tmp_path):
    path = onnx_genai_models.write(tmp_path / "m.onnx", tiny_models.build("llama"), bits=4, scattered=True)
    model = onnx.load(path)
    groups = next(t for t in model.graph.initializer if t.name.endswith("layers.1.attn.o_proj.MatMul.weight_g_idx"))
    groups.CopyFrom(numpy_helper.from_array(np.full(groups.dims[0], 9, np.int32), groups.name))
    onnx.save(model, path)
    with pytest.raises(HetcompError, match=r"1\.attn\.o_proj\.weight in .* has columns of groups that it does not"):
        planned(path)


@pytest.mark.parametrize("bits", [32, 4])
def test_windows_whose_caches_hold_no_more(bits, tmp_path):
    """As genai writes GPT-OSS today. onnxruntime wants such caches allocated; the graph without is the reference."""
    model = tiny_models.build("gpt_oss")
    today = onnx_genai_models.write(tmp_path / "today.onnx", model, bits=bits, sized=False)
    before = onnx_genai_models.write(tmp_path / "before.onnx", model, bits=bits)
    assert error_of(today, model, before) < 1e-5


@pytest.mark.parametrize(
    ("activation", "bits", "zeros"),
    [("silu", 4, True), ("silu", 8, False), ("gelu_pytorch_tanh", 32, False), ("relu", 32, False)],
)
def test_gate_and_up_apart(activation, bits, zeros, tmp_path):
    """onnxruntime's CPU kernels do not take FC3; gate and up in one, they are its reference, in the same codes."""
    model = tiny_models.build("qwen3_moe", num_hidden_layers=2, hidden_act=activation)
    choices = {"bits": bits, "zeros": zeros}
    apart = onnx_genai_models.write(tmp_path / "apart.onnx", model, apart=True, **choices)
    joined = onnx_genai_models.write(tmp_path / "joined.onnx", model, **choices) if bits == 4 else None
    if bits == 8:
        got = stored(imported(apart))["gate_up_proj.pair"]
        assert got == ("ONNX int8, blocks of 32", "q8")
    else:
        assert error_of(apart, model, joined) < 1e-5


def test_phi_moe(tmp_path):
    """A sparse mixer, experts with FC3, layer norms with biases and tables that an If chooses between: onnxruntime has
    no CPU kernel for the first two, so transformers is the reference. The tables are rounded to fp16."""
    model = tiny_models.build("phimoe")
    path = onnx_genai_models.write(tmp_path / "m.onnx", model, apart=True, joined=True, sized=False)
    got = imported(path)
    assert {op.attrs.scoring for t in got.plan.templates for op in t.ops if op.kind == "route"} == {"sparse_mixer"}
    assert got.plan.notes == ()
    assert error_of(path, model) < 2e-4


def test_tables_for_long_sequences_are_for_all_where_the_context_is_long(tmp_path):
    model = tiny_models.build("phimoe", num_hidden_layers=1)
    path = onnx_genai_models.write(tmp_path / "m.onnx", model, apart=True)
    tables = {}
    for context in (256, 257):
        plan = imported_with_context(path, context).plan
        (tables[context],) = (op.attrs.scaling for t in plan.templates for op in t.ops if op.kind == "rope_table")
        assert [("/model/rope_caches_subgraph/If" in note) for note in plan.notes] == [True] * (context == 257)
    assert tables == {256: pytest.approx(1.2, rel=1e-3), 257: pytest.approx(1.3, rel=1e-3)}


def test_norms_of_heads_inside_attention(tmp_path):
    model = tiny_models.build("qwen3", num_hidden_layers=2)
    assert error_of(onnx_genai_models.write(tmp_path / "m.onnx", model, norms_inside=True), model) < 1e-5


@pytest.mark.parametrize(
    ("choices", "label", "form"),
    [
        ({"bits": 4}, "ONNX int4, blocks of 32", "q4"),
        ({"bits": 4, "block": 64}, "ONNX int4, blocks of 64", "q4"),
        ({"bits": 4, "zeros": True}, "ONNX int4, blocks of 32, zero points", "q4z"),
        ({"bits": 4, "block": 16}, "ONNX int4, blocks of 16", "q8"),
        ({"bits": 8}, "ONNX int8, blocks of 32", "q8"),
    ],
)
def test_formats_that_weights_are_taken_over_in(choices, label, form, tmp_path):
    model = tiny_models.build("qwen3_moe", num_hidden_layers=1, moe_intermediate_size=64)
    found = stored(imported(onnx_genai_models.write(tmp_path / "m.onnx", model, **choices)))
    names = {"q_proj.weight", "o_proj.weight", "router.weight", "gate_up_proj.weight", "down_proj.weight"}
    assert names <= found.keys()
    assert {found[name] for name in names} == {(label, form)}


def test_blocks_of_16_go_into_q8_and_the_plan_says_at_what_cost(tmp_path):
    """As the test in test_quantised_checkpoints.py."""
    model = tiny_models.build("qwen3_moe", num_hidden_layers=1, moe_intermediate_size=64)
    path = onnx_genai_models.write(tmp_path / "m.onnx", model, bits=4, block=16)
    made = plan_model(path, hw_profile="preset:9950x-64gb", context_length=32)
    assert made.imported.checkpoint is not None
    label, why = "ONNX int4, blocks of 16", "its groups are no runs of 32 columns"
    roles = assert_q8_notes(made.plan, made.imported.checkpoint, label, why)
    assert roles == {"attention", "experts", "embedding"}


def test_roles_and_names(tmp_path):
    path = onnx_genai_models.write(tmp_path / "m.onnx", tiny_models.build("gpt_oss"), bits=4)
    plan = imported(path).plan
    roles = {op.role for template in plan.templates for op in template.ops}
    assert {"attn.norm", "attn.q", "attn.o", "attn.core", "moe.norm", "moe.router", "moe.experts", "lm_head"} <= roles
    names = {v.fqn for v in plan.values if v.kind is ValueKind.WEIGHT}
    assert {"model.layers.1.attn.q_proj.weight", "model.layers.1.attn.q_proj.bias", "lm_head.weight"} <= names
    windows = {op.attrs.window for t in plan.templates for op in t.ops if isinstance(op.attrs, ops.Attention)}
    assert len(windows) == 2


def test_facts_beside_the_file(tmp_path):
    path = onnx_genai_models.write(tmp_path / "model.onnx", tiny_models.build("llama", num_hidden_layers=1))
    facts = {"model": {"type": "llama", "context_length": 48, "eos_token_id": [7, 9], "bos_token_id": 1}}
    (tmp_path / "genai_config.json").write_text(json.dumps(facts))
    info = imported_with_context(path, 48).plan.model
    assert (info.name, info.model_type, info.max_positions) == (tmp_path.name, "llama", 48)
    assert (info.eos_token_ids, info.bos_token_id) == ((7, 9), 1)
    with pytest.raises(HetcompError, match="takes 1 to 48"):
        imported_with_context(path, 49)


def imported_with_context(path: Path, context: int):
    return frontend.load(path, **BOUNDS | {"context_length": context})


def test_a_second_vector_behind_a_product_is_not_lost(tmp_path):
    """The bias is an operand of the product; what is added behind it has no op in the Plan."""

    def change(model):
        node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and "q_proj" in n.name)
        node.input.extend([""] * (5 - len(node.input)) + ["model.layers.0.attn.q_proj.Add.bias"])

    text = refusal(tmp_path, "llama", {"bits": 4}, change, attention_bias=True)
    assert "node /model/layers.0/attn/q_proj/Add (Add) reads model.layers.0.attn.q_proj.Add.bias" in text


# ---------------------------------------------------------------- refusals


def refusal(tmp_path, family, choices, change=lambda model: None, **options: object) -> str:
    model = tiny_models.build(family, num_hidden_layers=1, **options)
    path = onnx_genai_models.write(tmp_path / "m.onnx", model, **choices)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    with pytest.raises(HetcompError) as caught:
        imported(path)
    return str(caught.value)


def with_attribute(kind: str, **attributes: object):
    def change(model):
        for node in (n for n in model.graph.node if n.op_type == kind):
            kept = [a for a in node.attribute if a.name not in attributes]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())

    return change


@pytest.mark.parametrize(
    ("family", "choices", "change", "says"),
    [
        ("llama", {}, with_attribute("GroupQueryAttention", smooth_softmax=1), "smooth_softmax=1"),
        ("llama", {"bits": 4}, with_attribute("MatMulNBits", bits=2), "weights of 2 bits; expected 4 or 8"),
        ("llama", {"bits": 4}, with_attribute("MatMulNBits", block_size=64), "elements for a weight of shape"),
        ("llama", {"bits": 4}, with_attribute("MatMulNBits", K=96), "K=96"),
        ("qwen3_moe", {}, with_attribute("MoE", use_sparse_mixer=1), "normalize_routing_weights=1"),
        ("qwen3_moe", {"apart": True}, with_attribute("MoE", activation_type="identity"), "activation_type=identity"),
        ("qwen3_moe", {}, with_attribute("MoE", activation_type="relu"), "activation_type=relu"),
        ("qwen3_moe", {"bits": 4}, with_attribute("QMoE", quant_type="nvfp4"), "quant_type=nvfp4"),
    ],
)
def test_what_is_not_compiled_is_named_with_its_node(family, choices, change, says, tmp_path):
    text = refusal(tmp_path, family, choices, change)
    assert says in text and "node /model/layers.0/" in text and "\n" not in text


def test_experts_in_a_gpus_own_order(tmp_path):
    facts = {"model": {"decoder": {"session_options": {"provider_options": [{"cuda": {}}]}}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(facts))
    assert "an order of cuda's own" in refusal(tmp_path, "qwen3_moe", {"bits": 4})


def test_tables_that_are_no_rotation(tmp_path):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == "sin_cache")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, "sin_cache"))

    assert "scales positions or dimensions differently" in refusal(tmp_path, "llama", {}, change)
