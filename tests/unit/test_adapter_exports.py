"""Exported adapters, read again by the tools that they are for: peft, transformers, gguf."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from hetcomp.adapters.base_model import BaseModel, import_base
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.export_gguf import export_gguf
from hetcomp.adapters.export_merged import export_merged
from hetcomp.adapters.export_peft import export_per_expert, export_stacked
from hetcomp.adapters.low_rank import AdaptedWeight, Factor
from hetcomp.adapters.pair_stack import gate_and_up, stack_of
from hetcomp.adapters.tensor_file import NewTensor, new_file
from hetcomp.cli.main import app
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import find
from tests.reference.peft_adapters import (
    EXPERTS,
    assert_same,
    deltas_of,
    everything,
    make_adapter,
    merged_state,
    whole_delta,
)
from tests.reference.tiny_models import build, save_tiny
from tests.unit.test_adapters import FAMILIES, write_per_expert

pytestmark = pytest.mark.spread("case")
# Everything that is not split in GGUF; DeepSeek's kv_b_proj is.
GGUF_MODULES = {"deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """Family, folder of its base, the imported base, and an adapter of everything with ranks of its own."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    save_tiny(family, folder / "hf")
    fields = everything(family) | {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 9}}
    make_adapter(build(family), folder / "adapter", **fields)
    imported = import_base(folder / "hf")
    base = BaseModel.of(imported)
    return family, folder / "hf", imported, base, read_adapter(folder / "adapter", base)


def loaded_by_peft(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(was matched|missing|unexpected)")
        return peft.PeftModel.from_pretrained(build(family), folder)


def wanted(adapter) -> dict[str, np.ndarray]:
    return {name: whole_delta(weight) for name, weight in adapter.weights.items()}


def test_stacked_is_read_by_peft(case, tmp_path):
    family, _, _, base, adapter = case
    export_stacked(adapter, base, tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out", base), wanted(adapter))
    original = {name: tensor.detach() for name, tensor in build(family).named_parameters()}
    assert_same(adapter, deltas_of(loaded_by_peft(family, tmp_path / "out"), original))


def test_one_pair_an_expert(case, tmp_path):
    family, _, _, base, adapter = case
    if family == "gpt_oss":
        with pytest.raises(HetcompError, match=r"gate_up_proj .* all experts at once"):
            export_per_expert(adapter, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_per_expert(adapter, base, tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out", base), wanted(adapter))
    if family == "deepseek_v3":
        return  # peft 0.21 takes a target gate_proj of a dense layer for one of experts
    original = {name: tensor.detach() for name, tensor in build(family).named_parameters()}
    assert_same(adapter, deltas_of(loaded_by_peft(family, tmp_path / "out"), original))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_taken_apart_again_have_their_rank_and_names(family, tmp_path):
    """Stacked by peft, the pairs of gate and up are one of twice the rank; exported, they are two again."""
    save_tiny(family, tmp_path / "hf")
    base = BaseModel.of(import_base(tmp_path / "hf"))
    write_per_expert(tmp_path / "a", family)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace("0.05", "0.0"))
    loaded_by_peft(family, tmp_path / "a").save_pretrained(tmp_path / "stacked")
    export_per_expert(read_adapter(tmp_path / "stacked", base), base, tmp_path / "out")
    with (
        safe_open(tmp_path / "a" / "adapter_model.safetensors", "np") as before,
        safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():
            np.testing.assert_array_equal(before.get_tensor(name), after.get_tensor(name))


def test_merged_checkpoint_is_read_by_transformers(case, tmp_path):
    family, _, imported, base, adapter = case
    export_merged(adapter, base, imported, tmp_path / "out")
    model = getattr(transformers, imported.plan.model.architecture).from_pretrained(tmp_path / "out")
    original = build(family).state_dict()
    merged = model.state_dict()
    assert set(merged) == set(original)
    deltas = wanted(adapter)
    for name, tensor in original.items():
        np.testing.assert_allclose(merged[name], tensor + torch.tensor(deltas.get(name, 0.0)), atol=1e-6, err_msg=name)


def test_merged_bf16_checkpoint_of_several_files(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32)
    wrapped = make_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16, **everything("qwen3_moe"))
    result = CliRunner().invoke(
        app,
        ["adapter", "export", f"{tmp_path}/adapter", "--to", "merged", "-o", f"{tmp_path}/out", "--model", "demo-moe"],
    )
    assert result.exit_code == 0, result.output
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype is torch.bfloat16
    for name, tensor in merged_state(wrapped).items():
        # Sums in another order may be rounded to a neighbour, 2^-8 away.
        torch.testing.assert_close(merged.get_parameter(name).float(), tensor.detach(), rtol=2**-8, atol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids


@given(data=st.data(), interleaved=st.booleans(), block_diagonal=st.booleans())
def test_stacks_have_the_deltas_of_all_experts(data, interleaved, block_diagonal):
    """Whatever ranks and scales the experts have; gate and up apart give their rows of it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    experts, half, columns = (data.draw(st.integers(1, 4)) for _ in range(3))

    def factor(rows: tuple[int, int] | None) -> Factor:
        rank, scale = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0.5, 2.0]))
        out = half if rows else 2 * half
        numbers = rng.standard_normal((rank, columns), np.float32), rng.standard_normal((out, rank), np.float32)
        return Factor(*numbers, scale, rows)

    parts = ((0, half), (half, 2 * half)) if block_diagonal else (None,)
    factors = tuple(tuple(factor(rows) for rows in parts) for _ in range(experts))
    weight = AdaptedWeight("experts.gate_up_proj", (experts, 2 * half, columns), False, interleaved, "", factors)
    stack = stack_of(weight)
    np.testing.assert_allclose(stack.scale * stack.b @ stack.a, whole_delta(weight), rtol=1e-4, atol=1e-5)
    rows = (np.s_[0::2], np.s_[1::2]) if interleaved else (np.s_[:half], np.s_[half:])
    for part, own in zip(gate_and_up(weight, stack), rows, strict=True):
        filled = part.filled_up(part.rank + 2)
        np.testing.assert_allclose(
            filled.scale * filled.b @ filled.a, whole_delta(weight)[:, own], rtol=1e-4, atol=1e-5
        )
        assert not (block_diagonal and not interleaved) or part.rank < weight.rank


def gguf_delta(tensors, alpha: float, name: str) -> np.ndarray:
    a, b = (tensors[f"{name}.weight.lora_{side}"] for side in "ab")
    return alpha / b.shape[-1] * (b @ a)  # as llama.cpp: llama_adapter_lora_weight::get_scale


def test_gguf_is_read_by_its_package(case, tmp_path):
    family, _, _, base, _ = case
    fields = everything(family)
    fields["target_modules"] = GGUF_MODULES.get(family, fields["target_modules"])
    make_adapter(build(family), tmp_path / "a", rank_pattern={"o_proj": 2}, **fields)
    adapter = read_adapter(tmp_path / "a", base)
    export_gguf(adapter, base, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == facts["general.architecture"])
    known = {gguf.TENSOR_NAMES[tensor].format(bid=i) for tensor in gguf.MODEL_TENSORS[architecture] for i in range(9)}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert {name.rpartition(".weight.lora_")[0] for name in tensors} <= known
    alpha = facts["adapter.lora.alpha"]
    for i in range(base.layers):
        experts = (
            adapter.weights[f"model.layers.{i}.mlp.experts.gate_up_proj"] if i or family != "deepseek_v3" else None
        )
        if experts is not None:
            delta = whole_delta(experts).swapaxes(1, 2) if experts.transposed else whole_delta(experts)
            gate, up = (delta[:, ::2], delta[:, 1::2]) if family == "gpt_oss" else np.split(delta, 2, axis=1)
            for part, name in ((gate, "gate"), (up, "up")):
                np.testing.assert_allclose(gguf_delta(tensors, alpha, f"blk.{i}.ffn_{name}_exps"), part, atol=1e-5)
        output = adapter.weights[f"model.layers.{i}.self_attn.o_proj.weight"]
        np.testing.assert_allclose(gguf_delta(tensors, alpha, f"blk.{i}.attn_output"), output.delta(), atol=1e-5)
    if family == "mixtral":
        # LlamaModel.permute: the rows of each head, halves in turn.
        rows = adapter.weights["model.layers.1.self_attn.k_proj.weight"].delta().reshape(2, 2, 8, 64)
        found = gguf_delta(tensors, alpha, "blk.1.attn_k")
        np.testing.assert_allclose(found, rows.swapaxes(1, 2).reshape(32, 64), atol=1e-5)
    assert len(tensors) == 2 * sum(2 if name.endswith(EXPERTS[0]) else 1 for name in adapter.weights)


@pytest.mark.parametrize(("family", "module"), [("deepseek_v3", "kv_b_proj"), ("qwen3_next", "linear_attn.out_proj")])
def test_gguf_refuses_what_llama_cpp_splits(family, module, tmp_path):
    save_tiny(family, tmp_path / "hf")
    make_adapter(build(family), tmp_path / "a", target_modules=[module])
    arguments = ["adapter", "export", f"{tmp_path}/a", "--to", "gguf", "-o", f"{tmp_path}/out", "--model"]
    result = CliRunner().invoke(app, [*arguments, f"{tmp_path}/hf"])
    assert result.exit_code == 1 and module in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"a", "hf"}


@pytest.mark.parametrize("form", ["peft-stacked", "peft-per-expert", "merged", "gguf"])
def test_command_writes_each_form_and_leaves_others_alone(form, tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    make_adapter(build("qwen3_moe"), tmp_path / "a", **everything("qwen3_moe"))
    arguments = ["adapter", "export", f"{tmp_path}/a", "--to", form, "-o", f"{tmp_path}/out"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "give --model" in result.output  # the adapter does not name its base
    result = CliRunner().invoke(app, [*arguments, "--model", f"{tmp_path}/hf"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*arguments, "--model", f"{tmp_path}/hf"])
    assert result.exit_code == 1 and "exists" in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"a", "hf", "out"}


def test_a_file_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "deep" / "x.gguf") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list((tmp_path / "deep").iterdir())
    assert NewTensor("x", "F32", (1,), lambda: np.zeros(1, np.float32)).make().shape == (1,)
