"""Models compiled with an adapter merged in, against peft's own model in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import hetcomp
from hetcomp.adapters.merge import REPORT
from hetcomp.backends.packing import unpack
from hetcomp.models_zoo import find
from tests.parity.test_families import CONTEXT, TOLERANCE, relative_error
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import build, save_tiny, token_ids
from tests.sampled_cases import rest

TENSORS = "adapter_model.safetensors"
FIRST = [("qwen3_moe", True), ("deepseek_v3", False)]
MORE = [("mixtral", False), ("deepseek_v3", True), ("gpt_oss", True)]


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def compiled(folder: Path, adapter: Path, out: Path, formats: str = "f32") -> hetcomp.Executable:
    return hetcomp.compile(
        folder, formats=formats, context_length=CONTEXT, out=out, adapters=[adapter], merge=True, isa=["avx2"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FIRST, *rest(MORE)], ids=str)
def test_logits_as_peft_has_them(case, tmp_path):
    family, odd = case
    model = save_tiny(family, tmp_path / "hf", odd=odd)
    ids = token_ids(model, 17)[0].tolist()
    base = logits_of(model, ids)
    wrapped = make_adapter(model, tmp_path / "adapter", **everything(family))
    wanted = logits_of(wrapped, ids)
    assert relative_error(base, wanted) > 0.05  # the adapter matters
    exe = compiled(tmp_path / "hf", tmp_path / "adapter", tmp_path / "tiny.hetc")
    assert relative_error(exe(ids), wanted) < TOLERANCE
    adapter = exe.plan.adapters[0]
    assert adapter.name == "adapter" and adapter.merged and len(adapter.sha256) == 64
    report = json.loads((exe.path / REPORT).read_text())
    assert [w["fqn"] for w in report["weights"]] == [t.fqn for t in adapter.targets]
    assert all(0 < w["delta_norm"] for w in report["weights"])


@pytest.mark.slow
def test_experts_in_another_order_give_other_logits(tmp_path):
    """Whether B was read with its experts in the wrong place would show: also in a model whose every size fits."""
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    ids = token_ids(model, 17)[0].tolist()
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", **everything("qwen3_moe")), ids)
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    for name, tensor in tensors.items():
        if ".experts." in name and "lora_B" in name:
            out, columns = tensor.shape
            tensors[name] = tensor.reshape(out, columns // 8, 8).transpose(1, 2).reshape(out, columns).contiguous()
    shutil.copytree(tmp_path / "adapter", tmp_path / "permuted")
    save_file(tensors, tmp_path / "permuted" / TENSORS)
    permuted = compiled(tmp_path / "hf", tmp_path / "permuted", tmp_path / "permuted.hetc")
    assert relative_error(permuted(ids), wanted) > 100 * TOLERANCE


@pytest.mark.slow
def test_cut_over_two_numa_nodes(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "hf", moe_intermediate_size=96, tie_word_embeddings=False)
    ids = token_ids(model, 17)[0].tolist()
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", **everything("qwen3_moe")), ids)
    options = dict(formats="f32", context_length=CONTEXT, adapters=[tmp_path / "adapter"], merge=True)
    exe = hetcomp.compile(tmp_path / "hf", avx2_machine(2), out=tmp_path / "two.hetc", **options)
    assert relative_error(exe(ids), wanted) < TOLERANCE


@pytest.mark.slow
def test_module_in_memory_is_left_as_it_was(tmp_path):
    wrapped = make_adapter(build("qwen3_moe"), tmp_path / "adapter", **everything("qwen3_moe"))
    module = build("qwen3_moe")
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    options = dict(formats="f32", context_length=CONTEXT, isa=["avx2"])
    exe = hetcomp.compile(module, adapters=[tmp_path / "adapter"], merge=True, **options)
    assert relative_error(exe([5, 6, 7]), logits_of(wrapped, [5, 6, 7])) < TOLERANCE
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("form", "largest"), [pytest.param("q8", 0.01, marks=pytest.mark.exhaustive), ("q4", 0.12)])
def test_demo_moe_is_quantised_after_merging(form, largest, tmp_path):
    """The packed experts stand for peft's merged ones within what the format rounds: of groups of 32 numbers that are
    about normal the largest is some 2.2 deviations, of which q8 has 127 steps and q4 7 to 8; a step's error is 0.29 of
    it (0.5 % and 9 % of the norm)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32)
    wrapped = make_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16, **everything("qwen3_moe"))
    exe = compiled(find("demo-moe"), tmp_path / "adapter", tmp_path / "demo.hetc", form)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    packed = {name: data for path in exe.path.glob("weights-*") for name, data in load_numpy(path).items()}
    values = {value.fqn: value for value in exe.plan.values if value.fqn in packed}
    for target in exe.plan.adapters[0].targets:
        want = merged[target.fqn].detach().numpy()
        got = unpack(packed[target.fqn], values[target.fqn])
        assert np.linalg.norm(got - want) < largest * np.linalg.norm(want), target.fqn
