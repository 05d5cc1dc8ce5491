"""Adapters that are damaged, made for another base, or more than plain LoRA: refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.errors import HetcompError
from tests.reference.peft_adapters import TENSORS, assert_same, damaged, deltas_of, everything, make_adapter
from tests.reference.tiny_models import build


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"some_new_thing": {"a": 1}}, "some_new_thing"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"r": 4}, "rank"),
        ({"target_modules": ["k_proj", "v_proj", "o_proj"]}, r"q_proj has tensors, but the config does not target it"),
        ({"layers_to_transform": [0]}, r"layers\.1\.self_attn\.\w+ has tensors, but"),
        ({"r": "many"}, "r is not valid"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]}, "embed_tokens|lm_head"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "base_layer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_is_refused_by_field(config, named, plain, bases, tmp_path):
    with pytest.raises(HetcompError, match=named):
        read_adapter(damaged(plain, tmp_path, config), bases("qwen3_moe")[1])


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
UP = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"


def _rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _spoil(number: float):
    return lambda tensors: tensors[Q.format("A")].view(-1)[5:6].fill_(number)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(Q.format("B")), "q_proj has lora_A but no lora_B"),
        (lambda t: t.pop(UP.format("A")), "experts.base_layer has lora_B but no lora_A"),
        (lambda t: [t.pop(Q.format(s)) for s in "AB"], "targets model.layers.1.self_attn.q_proj"),
        (lambda t: [t.pop(UP.format(s)) for s in "AB"], "targets model.layers.1.mlp.experts.gate_up_proj"),
        (lambda t: t.update({Q.format("A"): torch.zeros(0, 64), Q.format("B"): torch.zeros(64, 0)}), "at least 1"),
        (lambda t: t.update({Q.format("A"): t[Q.format("A")].T}), "q_proj"),
        (lambda t: t.update({UP.format("B"): t[UP.format("B")][:-1]}), "gate_up_proj is"),
        (lambda t: t.update({Q.format("A"): t[Q.format("A")].double()}), "F64"),
        (_spoil(float("nan")), "q_proj.lora_A.weight holds NaN"),
        (_spoil(float("inf")), "q_proj.lora_A.weight holds NaN or inf"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight is neither"),
        (lambda t: t.update({Q.format("A").replace("A.w", "magnitude_vector.w"): torch.zeros(4)}), "magnitude"),
        (_rename(Q.format("A"), "base_model.model.../../etc/passwd.lora_A.weight"), "no name"),
        (_rename(Q.format("A"), "/etc/passwd.lora_A.weight"), "no name"),
        (
            lambda t: [_rename(Q.format(s), Q.format(s).replace("layers.1", "layers.7"))(t) for s in "AB"],
            r"layers.7.self_attn.q_proj is no matrix of hf.*\(3 layers\)",
        ),
        (
            lambda t: t.update(
                {
                    f"base_model.model.lm_head.lora_{s}.weight": torch.ones(n)
                    for s, n in (("A", (3, 64)), ("B", (256, 3)))
                }
            ),
            "tied to the head",
        ),
        (
            lambda t: t.update(
                {
                    f"base_model.model.model.layers.0.mlp.gate.lora_{s}.weight": torch.ones(n)
                    for s, n in (("A", (3, 64)), ("B", (8, 3)))
                }
            ),
            "router.*--allow-router",
        ),
    ],
)
def test_tensors_are_refused_by_name(change, named, plain, bases, tmp_path):
    with pytest.raises(HetcompError, match=named):
        read_adapter(damaged(plain, tmp_path, tensors=change), bases("qwen3_moe")[1])


def test_router_with_the_flag(bases, tmp_path):
    _, base, parameters = bases("qwen3_moe")
    wrapped = make_adapter(build("qwen3_moe"), tmp_path / "a", target_parameters=["mlp.gate.weight"], target_modules=[])
    assert_same(read_adapter(tmp_path / "a", base, allow_router=True), deltas_of(wrapped, parameters))


@pytest.mark.parametrize(("family", "named"), [("mixtral", "gate_up_proj is"), ("llama", "mlp.experts")])
def test_another_base_is_refused(family, named, plain, bases, tmp_path):
    folder = damaged(plain, tmp_path, {"base_model_name_or_path": "org/qwen3"})
    with pytest.raises(HetcompError, match=f"{named}.*made for org/qwen3"):
        read_adapter(folder, bases(family)[1])


def test_fewer_layers_than_the_base(bases, tmp_path):
    make_adapter(build("qwen3_moe", num_hidden_layers=2), tmp_path / "a", **everything("qwen3_moe"))
    with pytest.raises(HetcompError, match=r"layers.2.*no tensors"):
        read_adapter(tmp_path / "a", bases("qwen3_moe")[1])


def test_huge_rank(bases, tmp_path):
    make_adapter(build("qwen3_moe"), tmp_path / "a", r=60, **everything("qwen3_moe"))
    with pytest.raises(HetcompError, match=r"rank 60.*too large"):
        read_adapter(tmp_path / "a", bases("qwen3_moe")[1])


@pytest.mark.parametrize("drop", ["adapter_config.json", TENSORS])
def test_missing_files(drop, plain, bases, tmp_path):
    folder = damaged(plain, tmp_path)
    (folder / drop).unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(HetcompError, match=drop):
        read_adapter(folder, bases("qwen3_moe")[1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_damaged_bytes_never_escape_as_another_error(plain, bases, tmp_path, at, byte, cut):
    folder = tmp_path / "fuzzed"
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    data = bytearray((plain / TENSORS).read_bytes())
    data[at] = byte
    (folder / TENSORS).write_bytes(data[: len(data) - cut])
    try:
        read_adapter(folder, bases("qwen3_moe")[1])
    except HetcompError:
        return
    assert cut == 0
