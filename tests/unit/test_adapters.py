"""PEFT folders, read as peft itself applies them; and everything that must be refused by name."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hetcomp.adapters.base_model import BaseModel, import_base
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import AdaptedWeight, Factor
from hetcomp.cli.main import app
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import find
from tests.reference.peft_adapters import (
    ATTENTION,
    EXPERTS,
    TENSORS,
    assert_same,
    damaged,
    deltas_of,
    everything,
    make_adapter,
    whole_delta,
)
from tests.reference.tiny_models import build

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
LINEAR_ATTENTION = (("qwen3_next", True), ("qwen3_5_moe", False))


# ---------------------------------------------------------------- what peft writes


@pytest.mark.parametrize(("family", "odd"), [*itertools.product(FAMILIES, (False, True)), *LINEAR_ATTENTION])
def test_every_target_as_peft_applies_it(family, odd, bases, tmp_path):
    _, base, parameters = bases(family, odd)
    wrapped = make_adapter(build(family, odd), tmp_path / "a", **everything(family))
    assert_same(read_adapter(tmp_path / "a", base), deltas_of(wrapped, parameters))


def test_an_adapter_of_a_model_that_takes_images(bases, tmp_path):
    """Made for the whole model: its text part has names of its own there, and is all that is compiled."""
    _, base, parameters = bases("qwen3_5_moe")
    wrapped = make_adapter(build("qwen3_5_moe"), tmp_path / "a", **everything("qwen3_5_moe"))
    tensors = load_file(tmp_path / "a" / TENSORS)
    renamed = {name.replace(".model.layers.", ".model.language_model.layers."): t for name, t in tensors.items()}
    assert not tensors.keys() & renamed.keys()
    save_file(renamed, tmp_path / "a" / TENSORS, metadata={"format": "pt"})
    assert_same(read_adapter(tmp_path / "a", base), deltas_of(wrapped, parameters))


def test_demo_moe(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32)
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    wrapped = make_adapter(model, tmp_path / "a", dtype=torch.bfloat16, **everything("qwen3_moe"))
    adapter = read_adapter(tmp_path / "a", BaseModel.of(import_base("demo-moe")))
    assert adapter.dtypes == ("bf16",)
    assert_same(adapter, deltas_of(wrapped, parameters))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "target_parameters": None},
        {"target_modules": r".*layers\.[02]\.self_attn\.(k|v)_proj", "target_parameters": None},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.experts\.down_proj": 2}, "alpha_pattern": {"down_proj": 7}},
        {"target_modules": ["q_proj"], "target_parameters": None, "layers_to_transform": [1]},
        {"exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "target_parameters": None},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_targets_ranks_and_scales(fields, bases, tmp_path):
    _, base, parameters = bases("qwen3_moe")
    wrapped = make_adapter(build("qwen3_moe"), tmp_path / "a", **(everything("qwen3_moe") | fields))
    assert_same(read_adapter(tmp_path / "a", base), deltas_of(wrapped, parameters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, bases, tmp_path):
    _, base, parameters = bases("mixtral")
    wrapped = make_adapter(build("mixtral"), tmp_path / "a", dtype=dtype, **everything("mixtral"))
    assert_same(read_adapter(tmp_path / "a", base), deltas_of(wrapped, parameters))


# ---------------------------------------------------------------- one pair an expert, as transformers 4 had modules

V4 = {
    "qwen3_moe": ("mlp", {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}, 32),
    "mixtral": ("block_sparse_moe", {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}, 96),
}


def write_per_expert(folder: Path, family: str, rank: int = 2) -> None:
    module, shapes, _ = V4[family]
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(3):
        for expert in range(8):
            for name, (out, columns) in shapes.items():
                at = f"base_model.model.model.layers.{layer}.{module}.experts.{expert}.{name}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 10
                tensors[f"{at}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 10
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": list(shapes), "lora_dropout": 0.05}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", V4)
def test_one_pair_an_expert(family, bases, tmp_path):
    _, base, parameters = bases(family)
    write_per_expert(tmp_path / "a", family)
    adapter = read_adapter(tmp_path / "a", base)
    # peft refuses dropout on parameters, which is what it makes of these modules; it means nothing here.
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace("0.05", "0.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(build(family), tmp_path / "a")
    wrapped.save_pretrained(tmp_path / "stacked")
    assert_same(adapter, deltas_of(wrapped, parameters))
    # What peft made of it: rank doubled, B block-diagonal; with its own config, and with that of transformers 4.
    stacked = read_adapter(tmp_path / "stacked", base)
    unconverted = json.loads(config.read_text()) | {"peft_version": "0.21.2"}
    (tmp_path / "stacked" / "adapter_config.json").write_text(json.dumps(unconverted))
    assert "experts.base_layer" in next(iter(load_file(tmp_path / "stacked" / TENSORS)))
    for other in (stacked, read_adapter(tmp_path / "stacked", base)):
        assert_same(other, {name: whole_delta(weight) for name, weight in adapter.weights.items()})
        assert {w.rank for w in other.weights.values()} == {2, 4}


@pytest.mark.parametrize("experts", [0, 8])
def test_dense_and_shared_modules_by_the_names_of_transformers_4(experts, bases, tmp_path):
    """target_modules gate_proj, up_proj, down_proj: of the dense layer, of shared experts, and of routed ones where
    these were modules when the adapter was trained."""
    _, base, parameters = bases("deepseek_v3")
    modules = ["model.layers.0.mlp"]
    for layer in (1, 2):
        at = f"model.layers.{layer}.mlp"
        modules += [f"{at}.shared_experts", *(f"{at}.experts.{expert}" for expert in range(experts))]
    generator = torch.Generator().manual_seed(7)
    tensors, deltas = {}, {}
    for module in modules:
        width = parameters[f"{modules[0]}.gate_proj.weight"].shape[0] if module == modules[0] else 32
        for name, (out, columns) in (("gate", (width, 64)), ("up", (width, 64)), ("down", (64, width))):
            a, b = (torch.randn(size, generator=generator) / 10 for size in ((3, columns), (out, 3)))
            tensors |= {f"base_model.model.{module}.{name}_proj.lora_{s}.weight": t for s, t in (("A", a), ("B", b))}
            deltas[f"{module}.{name}_proj"] = (2 * b @ a).numpy()
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    wanted = {f"{name}.weight": delta for name, delta in deltas.items() if ".experts." not in name}
    for layer in (1, 2) if experts else ():
        at = f"model.layers.{layer}.mlp.experts"
        parts = {n: np.stack([deltas[f"{at}.{e}.{n}_proj"] for e in range(8)]) for n in ("gate", "up", "down")}
        wanted[f"{at}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        wanted[f"{at}.down_proj"] = parts["down"]
    assert_same(read_adapter(folder, base), wanted)


def test_halves_with_scales_of_their_own(bases, tmp_path):
    _, base, _ = bases("qwen3_moe")
    write_per_expert(tmp_path / "a", "qwen3_moe")
    before = read_adapter(tmp_path / "a", base)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"up_proj": 6}}))
    after = read_adapter(tmp_path / "a", base)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    gate, up = np.split(whole_delta(before.weights[name]), 2, axis=1)
    np.testing.assert_allclose(
        whole_delta(after.weights[name]), np.concatenate([gate, 2 * up], axis=1), rtol=1e-6, atol=1e-7
    )


# ---------------------------------------------------------------- a wrong reading would be noticed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_permuted_experts_are_another_adapter(family, bases, tmp_path):
    _, base, _ = bases(family)
    make_adapter(build(family), tmp_path / "a", **everything(family))
    right = read_adapter(tmp_path / "a", base)

    def slowest(tensors):
        """B with the expert as its slowest index: the reading that others had for years."""
        for name, tensor in tensors.items():
            if ".experts." in name and "lora_B" in name:
                out, columns = tensor.shape
                tensors[name] = tensor.reshape(out, columns // 8, 8).transpose(1, 2).reshape(out, columns)

    wrong = read_adapter(damaged(tmp_path / "a", tmp_path, tensors=slowest), base)
    for name, weight in right.weights.items():
        changed = np.abs(whole_delta(weight) - whole_delta(wrong.weights[name])).max()
        assert (changed > 0.01) == ("experts" in name)


@pytest.mark.parametrize(
    ("family", "odd", "version", "reverse"),
    [
        ("qwen3_moe", True, None, False),
        ("qwen3_moe", True, None, True),
        ("qwen3_moe", False, "0.17.1", True),
        ("qwen3_moe", False, "0.18.1", True),
        ("qwen3_moe", False, "0.19.0", True),
        ("qwen3_moe", False, "0.19.1", False),
        ("gpt_oss", False, "0.18.1", False),
        ("gpt_oss", False, "0.19.0", True),
    ],
)
def test_rows_and_columns_as_older_peft_had_them(family, odd, version, reverse, bases, tmp_path):
    """Versions up to 0.19.0 had A along the rows of some matrices. gate_up is 64 x 64 in a Qwen3-MoE that is not odd,
    down in such a GPT-OSS."""
    _, base, _ = bases(family, odd)
    make_adapter(build(family, odd), tmp_path / "a", **everything(family))
    right = read_adapter(tmp_path / "a", base)
    experts = 7 if odd else 8

    def rearranged(tensors):
        for name in [n for n in tensors if ".experts." in n and "lora_A" in n] if reverse else []:
            other = name.replace("lora_A", "lora_B")
            a = tensors[name].reshape(experts, -1, tensors[name].shape[1])
            b = tensors[other].reshape(tensors[other].shape[0], -1, experts)
            tensors[name] = b.permute(2, 1, 0).flatten(0, 1)
            tensors[other] = a.permute(2, 1, 0).flatten(1, 2)

    folder = damaged(tmp_path / "a", tmp_path, {"peft_version": version}, rearranged)
    assert_same(read_adapter(folder, base), {name: whole_delta(weight) for name, weight in right.weights.items()})


def test_square_experts_of_an_unknown_version_are_refused(plain, bases, tmp_path):
    with pytest.raises(HetcompError, match=r"square.*peft_version"):
        read_adapter(damaged(plain, tmp_path, {"peft_version": None}), bases("qwen3_moe")[1])


@given(data=st.data(), rank=st.integers(1, 4), out=st.integers(1, 5), columns=st.integers(1, 7), alike=st.booleans())
def test_parts_of_rows_become_one_pair(data, rank, out, columns, alike):
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scales = (0.5, 0.5 if alike else 3.0)
    parts = tuple(
        Factor(
            generator.standard_normal((rank, columns), np.float32),
            generator.standard_normal((out, rank), np.float32),
            scale,
            (i * out, (i + 1) * out),
        )
        for i, scale in enumerate(scales)
    )
    weight = AdaptedWeight("w", (2 * out, columns), False, False, "", (parts,))
    wanted = np.concatenate([p.scale * p.b @ p.a for p in parts])
    np.testing.assert_allclose(weight.delta(), wanted, rtol=1e-4, atol=1e-5)
    assert weight.norm() == pytest.approx(np.linalg.norm(wanted), rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- hetcomp adapter inspect


def test_inspect(plain, bases):
    folder, _, _ = bases("qwen3_moe")
    result = CliRunner().invoke(app, ["adapter", "inspect", str(plain), "--model", str(folder)])
    assert result.exit_code == 0, result.output
    for text in ("rank 3, alpha 5", "f32", "mlp.experts.gate_up_proj", "every tensor can be applied", "this one"):
        assert text in result.output
    result = CliRunner().invoke(app, ["adapter", "inspect", str(plain), "--model", str(folder), "--json"])
    document = json.loads(result.output)
    assert len(document["targets"]) == 3 * len(ATTENTION["qwen3_moe"] + EXPERTS)
    assert all(target["norm"] > 0 for target in document["targets"])
    bytes_by_rank = {rank: stored for rank, stored, _ in document["memory"]}
    assert bytes_by_rank[3] == 4 * document["parameters"] and bytes_by_rank[1] == bytes_by_rank[3] // 3


def test_inspect_without_a_model_and_of_another(plain, bases):
    result = CliRunner().invoke(app, ["adapter", "inspect", str(plain)])
    assert result.exit_code == 0 and "give --model" in result.output
    result = CliRunner().invoke(app, ["adapter", "inspect", str(plain), "--model", str(bases("mixtral")[0])])
    assert result.exit_code == 1 and "gate_up_proj" in result.output
