"""PEFT folders, read as peft itself applies them; and everything that must be refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hetcomp.adapters.base_model import BaseModel, import_base
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter, Factor
from hetcomp.cli.main import app
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import find
from tests.reference.peft_adapters import ATTENTION, EXPERTS, everything, make_adapter, merged_state
from tests.reference.tiny_models import build, save_tiny

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
TENSORS = "adapter_model.safetensors"
# Sums of at most a dozen products of numbers below one, in float32 in another order.
TOLERANCE = 1e-6


def whole_delta(weight: AdaptedWeight) -> np.ndarray:
    return weight.delta() if weight.experts is None else np.stack([weight.delta(e) for e in range(weight.experts)])


def deltas_of(wrapped: peft.PeftModel, original: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What peft adds to each parameter that it changes."""
    merged = merged_state(wrapped)
    made = {name: (merged[name] - tensor).detach().numpy() for name, tensor in original.items()}
    return {name: delta for name, delta in made.items() if delta.any()}


def assert_same(adapter: Adapter, wanted: dict[str, np.ndarray]) -> None:
    assert set(adapter.weights) == set(wanted)
    for name, delta in wanted.items():
        np.testing.assert_allclose(whole_delta(adapter.weights[name]), delta, atol=TOLERANCE, err_msg=name)
        assert adapter.weights[name].norm() == pytest.approx(np.linalg.norm(delta), rel=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder, base model and parameters of a tiny model; made once."""
    made = {}

    def get(family: str, odd: bool = False):
        if (family, odd) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{odd}") / "hf"
            model = save_tiny(family, folder, odd=odd)
            parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            made[family, odd] = folder, BaseModel.of(import_base(folder)), parameters
        return made[family, odd]

    return get


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """An adapter of everything in a Qwen3-MoE, for tests that damage copies of it."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    make_adapter(build("qwen3_moe"), folder, **everything("qwen3_moe"))
    return folder


def damaged(plain: Path, tmp_path: Path, config: dict | None = None, tensors=None) -> Path:
    """A copy of the adapter with fields of its config replaced and its tensors changed by a function."""
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors is not None:
        loaded = load_file(folder / TENSORS)
        tensors(loaded)
        save_file({name: tensor.contiguous() for name, tensor in loaded.items()}, folder / TENSORS)
    return folder


# ---------------------------------------------------------------- what peft writes


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_as_peft_applies_it(family, odd, bases, tmp_path):
    _, base, parameters = bases(family, odd)
    wrapped = make_adapter(build(family, odd), tmp_path / "a", **everything(family))
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


# ---------------------------------------------------------------- refusals


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
