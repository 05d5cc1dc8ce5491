"""What the user may give, and what is refused with which words."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.source import resolve
from tests.reference import tiny_models
from tests.reference.plan_interpreter import PlanInterpreter

BOUNDS = {"context_length": 64, "max_batch": 1, "max_tokens": 8, "max_logit_rows": 8}


def write_config(folder, **changes: object):
    config = json.loads(tiny_models.config("qwen3_moe").to_json_string())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(model, *words: str, **bounds: int):
    with pytest.raises(HetcompError) as caught:
        frontend.load(model, **(BOUNDS | bounds))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_zoo_name_and_its_path_are_the_same():
    assert resolve("demo-moe").folder == resolve("models_zoo/demo-moe").folder.resolve()
    assert resolve("configs/mixtral-8x7b").name == "mixtral-8x7b"


def test_unknown_names(tmp_path):
    refused("no-such-model", "no-such-model", "demo-moe")
    refused(tmp_path / "nowhere", "nowhere")
    (tmp_path / "file.bin").write_text("x")
    refused(tmp_path / "file.bin", "is a file")


def test_folder_without_config(tmp_path):
    refused(tmp_path, "config.json")


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused(tmp_path, "config.json", "JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json")


def test_config_without_architecture(tmp_path):
    refused(write_config(tmp_path / "a", architectures=None), "architectures")
    refused(write_config(tmp_path / "b", model_type=None), "model_type")


def test_unknown_architecture(tmp_path):
    refused(write_config(tmp_path / "a", architectures=["NoSuchForCausalLM"]), "NoSuchForCausalLM")
    refused(write_config(tmp_path / "b", model_type="no_such_type"), "no_such_type", "trust_remote_code")
    refused(write_config(tmp_path / "c", architectures=["Qwen3MoeForSequenceClassification"]), "causal")


def test_quantised_checkpoint(tmp_path):
    refused(write_config(tmp_path, quantization_config={"quant_method": "eetq"}), "eetq", "fp8")


def test_quantised_model_in_memory():
    model = tiny_models.build("qwen3")
    model.config.quantization_config = {"quant_method": "fp8"}
    refused(model, "in memory is quantised", "folder")


def test_config_that_transformers_cannot_build(tmp_path):
    refused(write_config(tmp_path, num_key_value_heads=0), "Qwen3Moe")


def test_modules_that_are_no_language_model():
    refused(nn.Linear(2, 2), "Linear", "transformers")
    refused(tiny_models.build("qwen3").model, "ForCausalLM")


def test_module_with_changed_parameters():
    model = tiny_models.build("qwen3")
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 97, bias=False)
    refused(model, "model.layers.0.mlp.up_proj.weight", "[97, 64]")


def test_module_without_data():
    with torch.device("meta"):
        model = type(tiny_models.build("qwen3"))(tiny_models.config("qwen3"))
    refused(model, "meta device")


def test_context_beyond_the_model():
    model = tiny_models.build("qwen3")
    refused(model, "513", "512", context_length=513)
    refused(model, "max_batch", max_batch=0)
    assert frontend.load(model, **(BOUNDS | {"context_length": None})).plan.dim("context").max == 512


def test_bounds_of_the_dimensions():
    plan = frontend.load(
        tiny_models.build("qwen3"), context_length=16, max_batch=3, max_tokens=40, max_logit_rows=64
    ).plan
    bounds = {d.name: (d.min, d.max) for d in plan.dims}
    assert bounds == {"T": (1, 16), "R": (1, 16), "slots": (3, 3), "context": (16, 16)}


def test_rope_that_depends_on_the_length(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(tiny_models.build("llama", rope_scaling=scaling), "dynamic", "yarn")


def test_the_users_model_is_left_as_it_was():
    model = tiny_models.build("deepseek_v3")
    ids = tiny_models.token_ids(model, 5)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        frontend.load(model, **BOUNDS)
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "eager"


SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
KINDS = {"layer_types": ["linear_attention", "full_attention"]}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}


@pytest.mark.parametrize(
    ("prefix", "fields", "layer"),
    [
        ("Jamba", JAMBA | {"use_mamba_kernels": False}, "mamba (JambaMambaMixer)"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "conv (Lfm2ShortConv)"),
        # A gated delta net, but beta goes to 2.
        ("OlmoHybrid", DELTA | KINDS, "linear_attn (OlmoHybridGatedDeltaNet)"),
        # As the family's, but for the activation.
        ("Qwen3_5Text", DELTA | KINDS | {"hidden_act": "gelu"}, "linear_attn (Qwen3_5GatedDeltaNet)"),
    ],
)
def test_layers_that_keep_other_states_are_named(prefix, fields, layer):
    config = getattr(transformers, f"{prefix}Config")(**SIZES | HEADS | fields)
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config)
    refused(model, f"layer 0, model.layers.0.{layer}", "keeps the state of a convolution or recurrence")


def multi_modal(family, folder, **text: object):
    """A whole Qwen3.5 with a tiny image part, as its checkpoints are; saved."""
    prefix = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[family]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=tiny_models.config(family, **text).to_dict(),
        vision_config=vision,
        tie_word_embeddings=family == "qwen3_5",
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).float().eval()
    model.save_pretrained(folder)
    with_mtp = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(2, 2)}
    save_file(with_mtp, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_model_that_takes_images(family, tmp_path):
    torch.manual_seed(0)
    model = multi_modal(family, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any("model.visual." in n for n in names) and any("model.language_model." in n for n in names)
    got = frontend.load(tmp_path, **BOUNDS)
    assert got.unused == ()
    (note,) = got.plan.notes
    assert "ForConditionalGeneration is compiled as its text part" in note and "images" in note
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
    run = PlanInterpreter(got.plan, got.checkpoint)
    assert torch.allclose(run.step(ids[0].tolist(), range(8)), want, atol=1e-4 * float(want.abs().max()))


def test_a_model_without_a_language_model_of_its_own_is_refused(tmp_path):
    config = json.loads(transformers.ViltConfig().to_json_string())
    config |= {"architectures": ["ViltForQuestionAnswering"], "text_config": {"model_type": "bert"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "ViltForQuestionAnswering", "is not a causal language model", "text_config")
