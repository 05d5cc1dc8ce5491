"""Adapters with random A and B, written by peft itself, and what peft makes of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hetcomp.adapters.low_rank import AdaptedWeight, Adapter

TENSORS = "adapter_model.safetensors"
# Sums of at most a dozen products of numbers below one, in float32 in another order.
TOLERANCE = 1e-6

ATTENTION = {
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_5_moe": ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "o_proj"],
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
        _store_as(folder / TENSORS, dtype)
    return wrapped.eval()


def _store_as(path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def merged_state(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Parameters of the base model after peft has merged the adapter. ``wrapped`` is used up."""
    return dict(wrapped.merge_and_unload().named_parameters())


def whole_delta(weight: AdaptedWeight) -> np.ndarray:
    """Of all experts."""
    return weight.delta() if weight.experts is None else np.stack([weight.delta(e) for e in range(weight.experts)])


def deltas_of(wrapped: peft.PeftModel, original: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What peft adds to each parameter that it changes."""
    merged = merged_state(wrapped)
    made = {name: (merged[name] - tensor).detach().numpy() for name, tensor in original.items()}
    return {name: delta for name, delta in made.items() if delta.any()}


def assert_same(adapter: Adapter, wanted: dict[str, np.ndarray]) -> None:
    """The adapter changes these parameters, by these deltas, and nothing else."""
    assert set(adapter.weights) == set(wanted)
    for name, delta in wanted.items():
        np.testing.assert_allclose(whole_delta(adapter.weights[name]), delta, atol=TOLERANCE, err_msg=name)
        assert adapter.weights[name].norm() == pytest.approx(np.linalg.norm(delta), rel=1e-4)


def damaged(
    plain: Path,
    tmp_path: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> Path:
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
