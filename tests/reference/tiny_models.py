"""Tiny random models with the real structure of every supported family, for parity tests.

``build`` gives a float32 ``transformers`` model with eager attention and eager experts, the reference of all
parity tests. ``odd`` models have sizes that are no multiples of vector or block widths. Weights are drawn
wider than transformers' initialisation so that routers have clear winners and errors show in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 256
FAMILIES = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "minimax_m2",
    "phimoe",
    "qwen3_next",
    "qwen3_5_moe",
    "llama",
    "qwen3",
    "qwen3_5",
)
MOE_FAMILIES = FAMILIES[:11]
# Those that `make test` compiles and interprets on devices where all are tested in `make test-all`: together they have
# every kind of op with every function, every option and every number of operands (tests/unit/test_sampled_cases.py).
# What is a family's own, its weights' names and its graph, make test imports of all (tests/parity/test_lowering.py).
EACH_OP = ("qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "qwen3_next", "llama")
OTHERS = tuple(family for family in FAMILIES if family not in EACH_OP)
# Not promised, but their configs are in the zoo.
EXTRA_FAMILIES = ("deepseek_v2",)


def _common(odd: bool, layers: int = 3) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB + 5 if odd else VOCAB,
        "hidden_size": 60 if odd else 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 6 if odd else 4,
        "num_key_value_heads": 3 if odd else 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _qwen3_moe(odd: bool) -> dict[str, Any]:
    return {
        "head_dim": 20 if odd else 16,
        "intermediate_size": 90 if odd else 96,
        "moe_intermediate_size": 29 if odd else 32,
        "num_experts": 7 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "norm_topk_prob": not odd,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0] if odd else [],
        "tie_word_embeddings": not odd,
    }


def _qwen2_moe(odd: bool) -> dict[str, Any]:
    return {
        "intermediate_size": 90 if odd else 96,
        "moe_intermediate_size": 29 if odd else 32,
        "shared_expert_intermediate_size": 43 if odd else 48,
        "num_experts": 7 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "norm_topk_prob": odd,
    }


def _mixtral(odd: bool) -> dict[str, Any]:
    return {
        "intermediate_size": 90 if odd else 96,
        "num_local_experts": 7 if odd else 8,
        "num_experts_per_tok": 2,
        "sliding_window": 9 if odd else None,
    }


def _olmoe(odd: bool) -> dict[str, Any]:
    return {
        "intermediate_size": 29 if odd else 32,
        "num_experts": 7 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "norm_topk_prob": odd,
    }


def _deepseek_v3(odd: bool) -> dict[str, Any]:
    return {
        "num_key_value_heads": 6 if odd else 4,
        "intermediate_size": 90 if odd else 96,
        "moe_intermediate_size": 29 if odd else 32,
        "n_routed_experts": 9 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "n_shared_experts": 2 if odd else 1,
        "n_group": 3 if odd else 2,
        "topk_group": 2 if odd else 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": None if odd else 32,
        "kv_lora_rank": 27 if odd else 24,
        "qk_nope_head_dim": 14 if odd else 16,
        "qk_rope_head_dim": 6 if odd else 8,
        "v_head_dim": 11 if odd else 16,
        "rope_scaling": None
        if odd
        else {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }


def _deepseek_v2(odd: bool) -> dict[str, Any]:
    return _deepseek_v3(odd) | {
        "topk_method": "group_limited_greedy",
        "head_dim": 6 if odd else 8,
        "kv_lora_rank": 26 if odd else 24,
        "rope_scaling": None,
    }


def _glm4_moe(odd: bool) -> dict[str, Any]:
    return {
        "head_dim": 20 if odd else 16,
        "intermediate_size": 90 if odd else 96,
        "moe_intermediate_size": 29 if odd else 32,
        "n_routed_experts": 9 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "n_shared_experts": 1,
        "n_group": 3 if odd else 1,
        "topk_group": 2 if odd else 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": not odd,
        "attention_bias": odd,
    }


def _gpt_oss(odd: bool) -> dict[str, Any]:
    return {
        "head_dim": 20 if odd else 16,
        "intermediate_size": 58 if odd else 64,
        "num_local_experts": 7 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }


def _minimax_m2(odd: bool) -> dict[str, Any]:
    return {
        "head_dim": 20 if odd else 16,
        "intermediate_size": 29 if odd else 32,
        "num_local_experts": 7 if odd else 8,
        "num_experts_per_tok": 3 if odd else 2,
        "rotary_dim": 12 if odd else 8,
    }


def _phimoe(odd: bool) -> dict[str, Any]:
    head_dim = 10 if odd else 16
    long_rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(head_dim // 2)],
        "long_factor": [1.0 + 1.5 * i for i in range(head_dim // 2)],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 256,
    }
    return {
        "intermediate_size": 29 if odd else 32,
        "num_local_experts": 7 if odd else 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.1 if odd else 0.01,
        "attention_bias": not odd,
        "lm_head_bias": not odd,
        "rope_parameters": None if odd else long_rope,
    }


def _llama(odd: bool) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "intermediate_size": 90 if odd else 96,
        "attention_bias": odd,
        "mlp_bias": odd,
        "tie_word_embeddings": odd,
        "rope_scaling": scaling if odd else None,
    }


def _qwen3(odd: bool) -> dict[str, Any]:
    return {
        "head_dim": 20 if odd else 16,
        "intermediate_size": 90 if odd else 96,
        "tie_word_embeddings": not odd,
    }


def _delta_net(k_heads: int, v_heads: int, width: int, odd: bool) -> dict[str, Any]:
    """Linear attention in all layers but every second (odd) or fourth, partial rotary embedding in the others."""
    return {
        "head_dim": 20 if odd else 16,
        "num_hidden_layers": 3 if odd else 4,
        "full_attention_interval": 2 if odd else 4,
        "linear_num_key_heads": k_heads,
        "linear_num_value_heads": v_heads,
        "linear_key_head_dim": 11 if odd else 16,
        "linear_value_head_dim": 13 if odd else 16,
        "linear_conv_kernel_dim": width,
        "attention_bias": odd,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5 if odd else 0.25,
        },
    }


def _qwen3_next(odd: bool) -> dict[str, Any]:
    return _qwen3_moe(odd) | _qwen2_moe(odd) | _delta_net(*((3, 6, 3) if odd else (2, 4, 4)), odd)


def _qwen3_5_moe(odd: bool) -> dict[str, Any]:
    experts = _qwen2_moe(odd)
    return {k: experts[k] for k in experts if k not in ("intermediate_size", "norm_topk_prob")} | _delta_net(
        *((1, 4, 2) if odd else (2, 4, 4)), odd
    )


def _qwen3_5(odd: bool) -> dict[str, Any]:
    return _qwen3(odd) | _delta_net(*((5, 5, 3) if odd else (2, 8, 4)), odd)


_SPECIFIC: dict[str, tuple[str, Callable[[bool], dict[str, Any]]]] = {
    "qwen3_moe": ("Qwen3Moe", _qwen3_moe),
    "qwen2_moe": ("Qwen2Moe", _qwen2_moe),
    "mixtral": ("Mixtral", _mixtral),
    "olmoe": ("Olmoe", _olmoe),
    "deepseek_v3": ("DeepseekV3", _deepseek_v3),
    "deepseek_v2": ("DeepseekV2", _deepseek_v2),
    "glm4_moe": ("Glm4Moe", _glm4_moe),
    "gpt_oss": ("GptOss", _gpt_oss),
    "minimax_m2": ("MiniMaxM2", _minimax_m2),
    "phimoe": ("Phimoe", _phimoe),
    "llama": ("Llama", _llama),
    "qwen3": ("Qwen3", _qwen3),
    "qwen3_next": ("Qwen3Next", _qwen3_next),
    "qwen3_5_moe": ("Qwen3_5Moe", _qwen3_5_moe),
    "qwen3_5": ("Qwen3_5", _qwen3_5),
}


def config(name: str, odd: bool = False, **overrides: Any) -> transformers.PreTrainedConfig:
    """Configuration of the tiny model ``name``; KeyError for an unknown family."""
    prefix, specific = _SPECIFIC[name]
    fields = _common(odd, layers=4 if name == "gpt_oss" else 3) | specific(odd) | overrides
    # Of a model that takes images as well, the text's.
    named = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    made: transformers.PreTrainedConfig = named(**fields)
    made.architectures = [f"{prefix}ForCausalLM"]
    return made


def build(name: str, odd: bool = False, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Float32 model of family ``name`` with random weights, eager attention and eager experts."""
    cfg = config(name, odd, **overrides)
    cfg._attn_implementation = "eager"
    cfg._experts_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, cfg.architectures[0])(cfg).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if "inv_freq" in key:
                continue
            if tensor.dim() >= 2:
                tensor.normal_(0.0, 0.15, generator=generator)
            elif "norm" in key:
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0.0, 0.3, generator=generator)
    model.tie_weights()
    return model


def save_tiny(
    name: str, folder: Path, odd: bool = False, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> PreTrainedModel:
    """Writes the model as an HF folder (config.json, safetensors) and returns it."""
    model = build(name, odd, seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def token_ids(model: PreTrainedModel, count: int, seed: int = 1) -> torch.Tensor:
    """``count`` random token ids, int64[1, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (1, count), generator=generator)
