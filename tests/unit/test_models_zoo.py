"""The zoo: names, published sizes of the configs, synthetic checkpoints."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from hetcomp import models_zoo
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import synthesise as synthesis
from hetcomp.models_zoo.safetensors_stream import plan_shards
from hetcomp.models_zoo.synthesise import checkpoint_shapes, synthesise
from tests.reference import tiny_models

# Total parameters in billions as the model cards state them, without MTP layers (transformers builds none).
PUBLISHED = {
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "deepseek-r1": 671.0,
    "glm-4.5": 352.8,
    "glm-4.5-air": 106.9,
    "glm-4.6": 352.8,
    "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
    "kimi-k2": 1026.5,
    "llama-3.1-8b": 8.03,
    "minimax-m2": 228.7,
    "mixtral-8x22b": 140.6,
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.92,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-235b-a22b": 235.1,
    "qwen3-30b-a3b": 30.5,
    "qwen3-8b": 8.19,
    "qwen3-next-80b-a3b": 79.7,
}
# Cards give whole billions, with some 0.5 for images.
IN_BILLIONS = {"qwen3.5-35b-a3b": 35, "qwen3.5-122b-a10b": 122, "qwen3.5-397b-a17b": 397}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_has_the_published_size(name):
    shapes, _ = checkpoint_shapes(models_zoo.find(name))
    billions = sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.004)


@pytest.mark.parametrize("name", IN_BILLIONS)
def test_text_part_has_the_size_of_the_name(name):
    shapes, _ = checkpoint_shapes(models_zoo.find(name))
    billions = sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert abs(billions + 0.5 - IN_BILLIONS[name]) <= 0.7


def test_every_name_is_found_and_an_unknown_one_lists_them():
    for name in models_zoo.names():
        assert (models_zoo.find(name) / "config.json").is_file()
    assert "demo-moe" in models_zoo.names()
    with pytest.raises(HetcompError, match=r"no model 'qwen4'; it has .*demo-moe.*qwen3moe-1b"):
        models_zoo.find("qwen4")
    with pytest.raises(HetcompError):
        models_zoo.find("../models_zoo/demo-moe")


@pytest.mark.parametrize("name", [n for n in models_zoo.names() if models_zoo.unsupported(n)])
def test_what_the_zoo_calls_unsupported_is_refused_with_its_reason_and_does_fail(name, tmp_path):
    reason = models_zoo.unsupported(name)
    assert reason is not None
    with pytest.raises(HetcompError, match=re.escape(reason)):
        plan_model(name, hw_profile="preset:2x8480", formats="q4")
    # The same config under another name is traced for real, and fails: the reason is still true.
    shutil.copy(models_zoo.find(name) / "config.json", tmp_path / "config.json")
    with pytest.raises(HetcompError, match=r"cannot trace|keeps the state of a convolution or recurrence"):
        plan_model(tmp_path, hw_profile="preset:2x8480", formats="q4")


def _config_folder(tmp_path: Path, family: str, **overrides: object) -> Path:
    folder = tmp_path / "config"
    config = tiny_models.config(family, **overrides)
    config.architectures = [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "minimax_m2", "llama"])
def test_synthetic_checkpoint_loads_completely(tmp_path, family):
    out = synthesise(_config_folder(tmp_path, family), tmp_path / "model", max_shard_gb=1e-4, progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    logits = model(torch.arange(7)[None]).logits
    assert torch.isfinite(logits).all() and 0.05 < logits.float().std() < 20


def test_names_of_experts_are_the_published_ones(tmp_path):
    shapes, _ = checkpoint_shapes(models_zoo.find("qwen3moe-1b"))
    assert shapes["model.layers.11.mlp.experts.63.down_proj.weight"] == (1024, 512)
    _, transposed = checkpoint_shapes(models_zoo.find("gpt-oss-20b"))
    assert "model.layers.0.mlp.experts.down_proj" in transposed


def test_same_seed_same_weights_whatever_the_depth(tmp_path):
    folder = _config_folder(tmp_path, "qwen3_moe")
    tensors = []
    for run, (layers, seed) in enumerate([(None, 1), (2, 1), (2, 2)]):
        out = synthesise(folder, tmp_path / str(run), layers=layers, seed=seed, progress=False)
        state = transformers.AutoModelForCausalLM.from_pretrained(out)
        tensors.append(state.state_dict()["model.layers.0.mlp.experts.gate_up_proj"])
    assert torch.equal(tensors[0], tensors[1]) and not torch.equal(tensors[1], tensors[2])


def test_tokenizer_covers_the_vocabulary(tmp_path):
    out = synthesise(_config_folder(tmp_path, "qwen3_moe", vocab_size=3000), tmp_path / "m", progress=False)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 3000
    assert {tokenizer.id_to_token(i) for i in range(3000)}.isdisjoint({None})
    for text in ("Call me Ishmael.", "naïve 🦜\n\tx = 41+1", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 2 and tokenizer.token_to_id("<|startoftext|>") == 1


def test_refuses_what_exists_and_leaves_nothing_after_a_failure(tmp_path, monkeypatch):
    folder = _config_folder(tmp_path, "llama")
    (tmp_path / "there").mkdir()
    with pytest.raises(HetcompError, match="exists already"):
        synthesise(folder, tmp_path / "there")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthesis, "_make", full_disk)
    with pytest.raises(OSError):
        synthesise(folder, tmp_path / "new", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config", "there"]


def test_unknown_architecture_and_bad_depth_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model", "vocab_size": 10}))
    with pytest.raises(HetcompError, match="transformers cannot build"):
        synthesise(tmp_path, tmp_path / "out", progress=False)
    with pytest.raises(HetcompError, match="12 layers"):
        synthesise("qwen3moe-1b", tmp_path / "out", layers=13, progress=False)


def test_shards_hold_every_tensor_once_and_keep_the_limit():
    sizes = {f"t{i}": size for i, size in enumerate([40, 70, 10, 10, 200, 5])}
    shards = plan_shards(sizes, 100)
    assert [name for shard in shards for name in shard.tensors] == list(sizes)
    assert all(len(s.tensors) == 1 or sum(sizes[n] for n in s.tensors) <= 100 for s in shards)
    assert plan_shards({"a": 1}, 100)[0].file == "model.safetensors"
