"""GGUF models of every family: the same config and, bit by bit, the same weights as the model that was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from hetcomp import frontend
from hetcomp.backends.packing import to_f32
from hetcomp.cli.plan_weights import weight_classes
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.frontend.checkpoint import ModuleCheckpoint
from hetcomp.frontend.gguf.model_files import open_model
from hetcomp.frontend.source import resolve
from hetcomp.ir.native_format import native_format
from hetcomp.ir.plan import ValueKind
from hetcomp.quantised_numbers import QuantisedNumbers
from tests.reference import gguf_models, tiny_models
from tests.reference.conversion_notes import assert_q8_notes

BOUNDS = {"context_length": 64, "max_batch": 1, "max_tokens": 8, "max_logit_rows": 8}
# What llama.cpp has no key for in these families.
FIXED = {
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False},
    "mixtral": {"sliding_window": None, "head_dim": 10},
    "qwen3_next": {"mlp_only_layers": [], "norm_topk_prob": True},
}
OF_GGUF = tuple(family for family in tiny_models.FAMILIES if family != "phimoe")
# Layers of two kinds, listed.
FEW = {"gpt_oss": {}, "qwen3_next": {}, "qwen3_5_moe": {}, "qwen3_5": {}}
# Of no effect on what is computed.
INDIFFERENT = ("dtype", "pad_token_id", "eos_token_id", "bos_token_id", "initializer_range", "_name_or_path")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Columns of out_proj are in another order by heads of 64.
CUT = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "linear_value_head_dim": 64}
CUT |= {"layer_types": ["linear_attention", "full_attention"], "head_dim": 64}
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4, "num_hidden_layers": 2}


def numbers(read):
    return read.to_f32() if isinstance(read, QuantisedNumbers) else to_f32(read)


def assert_same_weights(path, model):
    """What a file gives for each of a model's weights is what the model has. Returns the imported file."""
    got = frontend.load(path, **BOUNDS)
    want = ModuleCheckpoint(model, got.aliases)
    for value in (v for v in got.plan.values if v.kind is ValueKind.WEIGHT):
        expected = want.read(value)
        np.testing.assert_array_equal(numbers(got.checkpoint.read(value)), expected, value.fqn)
        if ".experts." in value.fqn:
            one = numbers(got.checkpoint.read_expert(value, 1))
            np.testing.assert_array_equal(one, expected[1], value.fqn)
    return got


def assert_same_config(path, model):
    got, want = resolve(path).config.to_dict(), model.config.to_dict()
    for config in (got, want):
        for name in INDIFFERENT:
            config.pop(name, None)
    assert got == want


@pytest.mark.parametrize(
    ("family", "odd", "overrides"),
    [
        *((family, True, FIXED.get(family, {})) for family in OF_GGUF if family != "llama"),
        ("llama", True, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}),
        ("llama", False, {"tie_word_embeddings": False, "max_position_embeddings": 64}),
        ("deepseek_v3", False, {}),
        ("deepseek_v2", False, {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None}),
        ("deepseek_v2", False, {}),
        ("glm4_moe", False, {}),
    ],
)
def test_family(family, odd, overrides, tmp_path):
    model = tiny_models.build(family, odd, **FEW.get(family, {"num_hidden_layers": 2}) | overrides)
    path = gguf_models.write(tmp_path / "m.gguf", model)
    assert_same_config(path, model)
    assert assert_same_weights(path, model).unused == ()


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_K, Type.Q6_K])
def test_types_through_permutations_and_experts(kind, tmp_path):
    """Mixtral has permuted rows; gate and up of its experts are joined."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 2, "num_hidden_layers": 1}
    model = tiny_models.build("mixtral", **wide)
    path = gguf_models.write(tmp_path / "mixtral.gguf", model, lambda name: kind)
    got = assert_same_weights(path, model)
    values = [v for v in got.plan.values if v.kind is ValueKind.WEIGHT and len(v.type.shape) > 1]
    stored = {t.dtype for v in values for t in got.checkpoint.source(v).tensors if "ffn_gate_inp" not in t.name}
    assert stored == {kind.name}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_next", Type.Q4_K), ("qwen3_5", Type.F16), ("qwen3_5", Type.Q4_0), ("qwen3_5", Type.Q4_K)],
)
def test_types_through_the_orders_of_linear_attention(family, kind, tmp_path):
    """Columns of Qwen3.5's out_proj are in another order by heads of 64: whole blocks of 32, but not of K's 256, whose
    numbers come in f32 and are quantised to q8."""
    wide = {"hidden_size": 256, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    wide |= {"intermediate_size": 256, "linear_value_head_dim": 64, "head_dim": 64}
    if family == "qwen3_next":
        wide |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "num_experts": 3}
    model = tiny_models.build(family, **wide)
    path = gguf_models.write(tmp_path / "m.gguf", model, lambda name: kind)
    got = assert_same_weights(path, model)
    out_proj = next(v for v in got.plan.values if v.id.endswith("out_proj.weight"))
    bound = replace(out_proj, source=got.checkpoint.source(out_proj))
    cut = (family, kind) == ("qwen3_5", Type.Q4_K)
    native = native_format(bound, "panels16")
    assert (native is None) == (kind == Type.F16)
    if native is not None:
        assert ("cuts blocks of 256" in native.inexact, native.format == "q8") == (cut, cut)


def test_decays_are_as_exact_as_one_rounding(tmp_path):
    """A_log comes from the -exp(A_log) that is stored: exp and log in f32 and one rounding of the logarithm."""
    model = tiny_models.build("qwen3_5", layer_types=["linear_attention"] * 4)
    decays = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("A_log")}
    got = frontend.load(gguf_models.write(tmp_path / "m.gguf", model), **BOUNDS)
    for value in (v for v in got.plan.values if v.id in decays):
        error = np.abs(got.checkpoint.read(value) - decays[value.id].numpy())
        assert error.max() <= 2**-22, value.id  # an error of e^a of half a unit is one of 2^-24 of a


def test_a_decay_that_grows_is_refused(tmp_path):
    model = tiny_models.build("qwen3_next")
    path = gguf_models.write(tmp_path / "m.gguf", model)
    place = open_model(path).tensors["blk.1.ssm_a"].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(np.float32(0.5).tobytes())
    got = frontend.load(path, **BOUNDS)
    value = next(v for v in got.plan.values if v.id == "model.layers.1.linear_attn.A_log")
    with pytest.raises(HetcompError, match=r"blk\.1\.ssm_a has numbers that are not negative"):
        got.checkpoint.read(value)


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    model = tiny_models.build("gpt_oss")
    path = gguf_models.write(tmp_path / "gpt_oss.gguf", model, lambda name: Type.MXFP4 if "_exps" in name else Type.F32)
    assert_same_config(path, model)
    assert_same_weights(path, model)


def test_split_files_are_one_model(tmp_path):
    model = tiny_models.build("qwen3_moe")
    gguf_models.write(tmp_path / "split.gguf", model, split_max_tensors=10)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 2
    assert open_model(parts[2]).tensors == open_model(parts[0]).tensors
    assert open_model(parts[2]).name == "split"
    assert_same_weights(parts[2], model)


def test_layers_behind_the_last_predict_further_tokens_and_are_left_out(tmp_path):
    """GLM's last block is a NextN layer: counted in block_count, not in nextn-less num_hidden_layers."""
    model = tiny_models.build("glm4_moe")

    def facts(writer):
        writer.add_block_count(model.config.num_hidden_layers + 1)
        writer.add_nextn_predict_layers(1)
        writer.add_tensor("blk.3.nextn.enorm.weight", np.ones(64, np.float32))

    got = frontend.load(gguf_models.write(tmp_path / "glm4_moe.gguf", model, facts=facts), **BOUNDS)
    assert got.plan.model.layers == 3
    assert got.unused == ("blk.3.nextn.enorm.weight",)


def test_deepseek_files_from_before_the_key_projection_was_split(tmp_path):
    model = tiny_models.build("deepseek_v3", num_hidden_layers=2)
    config = model.config

    def facts(writer):
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length(config.v_head_dim)
        for key in ("key_length_mla", "value_length_mla"):
            del writer.kv_data[0][f"deepseek2.attention.{key}"]
        for layer in (0, 1):
            whole = model.get_parameter(f"model.layers.{layer}.self_attn.kv_b_proj.weight")
            writer.add_tensor(f"blk.{layer}.attn_kv_b.weight", whole.detach().numpy())

    path = gguf_models.write(tmp_path / "m.gguf", model, facts=facts)
    assert_same_config(path, model)
    got = assert_same_weights(path, model)
    assert {name.split(".")[2] for name in got.unused} == {"attn_k_b", "attn_v_b"}


def test_dense_qwen2(tmp_path):
    """Which no other test has: its q, k and v have biases, its output has none."""
    config = transformers.Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, use_sliding_window=False,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    model = transformers.Qwen2ForCausalLM(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    path = gguf_models.write(tmp_path / "m.gguf", model)
    assert assert_same_weights(path, model).unused == ()
    assert resolve(path).config.rope_parameters == config.rope_parameters


def test_tokens_that_end_an_answer(tmp_path):
    """Those that the metadata names, and control tokens that are known by their texts."""

    def facts(writer):
        writer.add_token_list(["a", "<|im_end|>", "</s>", "<|endoftext|>", "<|call|>"])
        writer.add_token_types([1, 3, 1, 3, 3])
        writer.add_eos_token_id(3)
        writer.add_eot_token_id(0)
        writer.add_bos_token_id(1 << 20)

    path = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe", num_hidden_layers=1), facts=facts)
    config = resolve(path).config
    assert (config.eos_token_id, config.bos_token_id) == ([3, 0, 1, 4], None)


def test_fused_gate_and_up(tmp_path):
    model = tiny_models.build("qwen3_moe")
    path = gguf_models.write(tmp_path / "qwen3_moe.gguf", model, fused=True)
    assert_same_weights(path, model)


def test_plan_shows_how_weights_are_stored_and_computed(tmp_path: Path):
    model = tiny_models.build("qwen3_moe", **WIDE)
    kinds = {"attn": Type.Q8_0, "ffn_": Type.Q4_K, "toke": Type.Q6_K}
    path = gguf_models.write(
        tmp_path / "m.gguf", model, lambda name: kinds[name.removeprefix("blk.0.").removeprefix("blk.1.")[:4]]
    )
    plan = plan_model(path, hw_profile="preset:9950x-64gb", context_length=64).plan
    found = {(c.role, c.source, c.source_bits, c.format, c.exact) for c in weight_classes(plan)}
    assert {
        ("attention", "GGUF Q8_0", 8.5, "q8", True),
        ("experts", "GGUF Q4_K", 4.5, "q4k", True),
        ("embedding", "GGUF Q6_K", 6.5625, "q6k", True),
    } <= found
    assert not any("converted" in note for note in plan.notes)
    with_gpu = plan_model(path, hw_profile="preset:9950x-64gb+rtx4090", context_length=64).plan
    assert weight_classes(with_gpu) == weight_classes(plan)


@pytest.mark.parametrize(
    ("family", "kind", "options", "why", "roles"),
    [
        (
            "qwen3_moe",
            Type.Q4_1,
            {},
            "the minima of its groups are no multiples",
            {"attention", "experts", "embedding"},
        ),
        ("llama", Type.Q5_1, {}, "the minima of its groups are no multiples", {"attention", "dense", "embedding"}),
        ("qwen3_5", Type.Q4_K, CUT, "cuts blocks of 256", {"attention"}),
    ],
)
def test_what_no_format_holds_goes_into_q8_and_the_plan_says_at_what_cost(family, kind, options, why, roles, tmp_path):
    """As the test of that name in test_quantised_checkpoints.py. Last, columns whose order here divides K blocks."""
    model = tiny_models.build(family, **({"num_hidden_layers": 1} | options))
    path = gguf_models.write(tmp_path / "m.gguf", model, lambda name: kind)
    planned = plan_model(path, hw_profile="preset:9950x-64gb", context_length=32)
    assert planned.imported.checkpoint is not None
    assert assert_q8_notes(planned.plan, planned.imported.checkpoint, f"GGUF {kind.name}", why) == roles


def test_blocks_are_not_made_of_other_weights(tmp_path: Path):
    model = tiny_models.build("qwen3_moe", **WIDE)
    path = gguf_models.write(tmp_path / "m.gguf", model, lambda name: Type.Q4_K if "exps" in name else Type.Q8_0)
    ask = {"hw_profile": "preset:9950x-64gb", "context_length": 64}
    plan = plan_model(path, formats={"experts": "q8|q4k"}, **ask).plan
    assert {c.format for c in weight_classes(plan) if c.role == "experts"} <= {"q8", "q4k"}
    with pytest.raises(HetcompError, match=r"not converted to q4k, and .* is stored as GGUF Q8_0; give auto"):
        plan_model(path, formats="q4k", **ask)
    tiny_models.save_tiny("qwen3_moe", tmp_path / "floats")
    for form in ("q6k", "q4z"):
        with pytest.raises(HetcompError, match=rf"not converted to {form}, and .* is not quantised; give auto"):
            plan_model(tmp_path / "floats", formats={"experts": form}, **ask)
