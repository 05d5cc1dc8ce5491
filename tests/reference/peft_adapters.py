"""Adapters with random A and B, written by peft itself, and what peft makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

ATTENTION = {
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
# peft rewrites a target_modules entry gate_proj to the experts' parameter; the same module as a parameter stays.
DENSE = {
    "deepseek_v3": [
        f"{module}.{name}.weight"
        for module in ("layers.0.mlp", "shared_experts")
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def everything(family: str) -> dict[str, Any]:
    """LoraConfig fields that target all that hetcomp adapts in ``family``."""
    return {"target_modules": ATTENTION[family], "target_parameters": [*EXPERTS, *DENSE.get(family, [])]}


def make_adapter(
    model: PreTrainedModel, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> peft.PeftModel:
    """Wraps ``model`` (which is changed), fills A and B with random numbers of ``dtype`` that move the logits by about
    as much as the model itself has, and saves the adapter. Returns peft's model, in float32."""
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5} | fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if ".lora_" in name:
                tensor.normal_(0.0, 0.1, generator=generator)
                tensor.copy_(tensor.to(dtype))
    wrapped.save_pretrained(folder)
    if dtype is not torch.float32:
        _store_as(folder / "adapter_model.safetensors", dtype)
    return wrapped.eval()


def _store_as(path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def merged_state(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Parameters of the base model after peft has merged the adapter. ``wrapped`` is used up."""
    return dict(wrapped.merge_and_unload().named_parameters())
