"""Adapters that peft made of the demo model, merged and at run time, against peft's own model in float32."""

from __future__ import annotations

import pytest
import torch
import transformers

import hetcomp
from hetcomp.models_zoo import find
from tests.parity.test_adapters import compiled, logits_of
from tests.parity.test_families import CONTEXT, relative_error
from tests.parity.test_runtime_adapters import decoded
from tests.reference.peft_adapters import everything, make_adapter

TOLERANCE = 1e-4
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\ndef main(argv):"
SHAPES = {
    "all": everything("qwen3_moe") | {"r": 16, "lora_alpha": 8},
    "attention": {"target_modules": ["q_proj", "o_proj"]},
}


@pytest.fixture(scope="module")
def ids():
    tokenizer = transformers.AutoTokenizer.from_pretrained(find("demo-moe"))
    return tokenizer(TEXT).input_ids


@pytest.fixture(scope="module")
def wanted(ids, tmp_path_factory):
    """Of the base and of each adapter: its folder (the base has none) and peft's logits."""
    found = {}
    for seed, (name, fields) in enumerate({"base": None, **SHAPES}.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32).eval()
        folder = tmp_path_factory.mktemp("adapter") / name
        found[name] = folder, logits_of(make_adapter(model, folder, seed=seed, **fields) if fields else model, ids)
    return found


@pytest.mark.slow
def test_at_run_time(ids, wanted, tmp_path):
    exe = hetcomp.compile(
        find("demo-moe"), formats="f32", context_length=CONTEXT, out=tmp_path / "demo.hetc", isa=["avx2"]
    )
    assert relative_error(exe(ids), wanted["base"][1]) < TOLERANCE
    for name in SHAPES:
        folder, logits = wanted[name]
        assert relative_error(wanted["base"][1], logits) > 0.05  # the adapter matters
        exe.load_adapter(folder)
        assert relative_error(exe(ids, adapter=name), logits) < TOLERANCE
        assert relative_error(decoded(exe, ids, name), logits[4:]) < TOLERANCE


@pytest.mark.slow
def test_merged(ids, wanted, tmp_path):
    folder, logits = wanted["all"]
    exe = compiled(find("demo-moe"), folder, tmp_path / "merged.hetc")
    assert relative_error(exe(ids), logits) < TOLERANCE
