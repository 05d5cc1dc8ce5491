"""Models that nobody prepared hetcomp for: ops that no kind stands for are compiled by TVM, with equal logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hetcomp
from tests.parity.test_families import TOLERANCE, relative_error

COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# LayerNorm without weights.
UNLISTED = ("olmo",)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", UNLISTED)
@torch.no_grad()
def test_logits_equal_transformers(model_type: str, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **COMMON))
    model = model.float().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.12)
    model.save_pretrained(tmp_path / "hf")
    exe = hetcomp.compile(tmp_path / "hf", formats="f32", context_length=64, out=tmp_path / "unlisted.hetc")
    assert any(op.kind == "aten" for template in exe.plan.templates for op in template.ops)
    for tokens in (1, 13):
        ids = torch.randint(3, 200, (1, tokens))
        want = model(ids, use_cache=False).logits[0].numpy()
        assert relative_error(exe(ids[0].tolist()), want) < TOLERANCE
