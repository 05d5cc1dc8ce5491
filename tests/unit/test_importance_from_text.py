"""The importance of columns, measured by running a model on text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hetcomp.backends.importance import Importance
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.importance_from_text import SHARED_TOKENS, WINDOW, importance_from_text
from hetcomp.models_zoo import find
from tests.e2e.command_line import listing, refusal, run
from tests.reference.tiny_models import save_tiny

LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder and model of a tiny Qwen3-MoE, 8 experts of which each token takes 2."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny("qwen3_moe", folder)


@pytest.fixture(scope="module")
def texts(tiny):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, tiny[1].config.vocab_size, (2, 150), generator=generator).tolist()


@pytest.fixture(scope="module")
def made(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    importance_from_text(tiny[0], texts, out)
    assert listing(out.parent) == [out.name]
    return out


def test_plain_matrices_get_the_mean_square_of_their_inputs(tiny, texts, made):
    layer = tiny[1].model.layers[1]
    inputs: list[torch.Tensor] = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for ids in texts:
            tiny[1](torch.tensor([ids]))
    handle.remove()
    want = torch.cat(inputs).square().mean(0)
    np.testing.assert_allclose(load_file(made)[f"{LAYER}self_attn.o_proj.weight"], want, rtol=1e-5)


def test_experts_get_their_own_and_some_of_all(tiny, texts, made):
    model, experts = tiny[1], tiny[1].model.layers[1].mlp.experts
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1])))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    handle.remove()
    states = torch.cat([states for states, _ in calls])
    chosen = torch.cat([indices for _, indices in calls])
    by_expert = [states[(chosen == e).any(-1)] for e in range(len(experts.gate_up_proj))]
    shared = torch.cat(by_expert).square().mean(0)
    want = [(own.square().sum(0) + SHARED_TOKENS * shared) / (len(own) + SHARED_TOKENS) for own in by_expert]
    found = load_file(made)
    np.testing.assert_allclose(found[f"{LAYER}mlp.experts.gate_up_proj"], torch.stack(want), rtol=1e-4)
    assert found[f"{LAYER}mlp.experts.down_proj"].shape == experts.down_proj.shape[::2]


def test_second_moments_are_means_of_products(tiny, texts, made, tmp_path):
    out = tmp_path / "moments.safetensors"
    importance_from_text(tiny[0], texts, out, second_moments=True)
    plain, found = load_file(made), load_file(out)
    for name, vector in plain.items():
        moments = found[name + ".second_moments"]
        np.testing.assert_allclose(np.diagonal(moments, axis1=-2, axis2=-1), found[name], rtol=1e-4)
        np.testing.assert_allclose(found[name], vector, rtol=1e-6)
        assert np.linalg.eigvalsh(moments).min() > -1e-4 * moments.max()
    assert len(found) == 2 * len(plain)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_file_is_accepted_for_its_model(family, tmp_path):
    save_tiny(family, tmp_path / "model")
    out = tmp_path / "importance.safetensors"
    importance_from_text(tmp_path / "model", [list(range(3, 60))], out, second_moments=True)
    planned = plan_model(tmp_path / "model", hw_profile="preset:9654-768gb", formats="q4", stop_after="choose_formats")
    Importance.load(out, planned.plan.values)
    assert any("self_attn" in name for name in load_file(out))


def test_long_texts_are_cut_into_windows(tiny, tmp_path):
    text = [5 + i % 200 for i in range(WINDOW + 40)]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    importance_from_text(tiny[0], [text], whole)
    importance_from_text(tiny[0], [text[:WINDOW], text[WINDOW:]], parts)
    assert whole.read_bytes() == parts.read_bytes()


def test_command_writes_a_file(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "importance.safetensors"
    text.write_text("It was a fine morning, and the ship lay still.")
    outcome = run("importance", "demo-moe", "--text", text, "-o", out)
    assert outcome.code == 0 and outcome.out.strip() == str(out)
    vectors = load_file(out)
    assert vectors["model.layers.0.mlp.experts.down_proj"].shape == (32, 128)
    assert vectors["model.embed_tokens.weight"].shape == (256,)  # it is the head too


@pytest.mark.parametrize(
    ("model", "content", "sentence"),
    [
        ("demo-moe", None, "cannot be read"),
        ("demo-moe", b"\xff\xfe\x00", "expected a UTF-8 file"),
        ("demo-moe", b"", "has 0 tokens"),
        ("qwen3-8b", b"It was a fine morning.", "tokenizer"),
    ],
)
def test_bad_input_is_refused(tmp_path, model, content, sentence):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    before = listing(tmp_path)
    assert sentence in refusal("importance", model, "--text", text, "-o", tmp_path / "i.safetensors")
    assert listing(tmp_path) == before


def test_a_config_without_weights_is_refused(tmp_path):
    with pytest.raises(HetcompError, match=r"qwen3-8b is a config without weights; importance needs a model to run"):
        importance_from_text("qwen3-8b", [[1, 2, 3]], tmp_path / "i.safetensors")


def test_tokens_beyond_the_vocabulary_are_refused(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny[0], folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find("demo-moe") / name, folder)
    text, out = tmp_path / "text.txt", tmp_path / "i.safetensors"
    text.write_text("It was a fine morning.")
    with pytest.raises(HetcompError, match="has a vocabulary of 256"):
        importance_from_text(folder, text, out)
    assert not out.exists()
