"""The transformers config that a GGUF file's metadata describes, family by family.

Keys and defaults are those of llama.cpp's loader (src/models/*.cpp) and of its converter (conversion/*.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.header import shown
from hetcomp.frontend.gguf.model_facts import ModelFacts
from hetcomp.frontend.gguf.model_files import ModelFiles

Json = dict[str, Any]

# expert_gating_func, LLAMA_EXPERT_GATING_FUNC_TYPE_*.
_SOFTMAX, _SIGMOID = 1, 2
_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|return|> <|call|> <|endoftext|> <|eom_id|> <EOT> [EOT] [EOS] <|end_of_text|> </s> <eos> "
    "<end_of_turn> <end_of_utterance> <｜end▁of▁sentence｜>".split()
)
# Frequency factors of Llama 3's rope: what a converter that took them from a config writes (all of Meta's models).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_config(files: ModelFiles) -> Json:
    """What config.json of the model would hold. Raises HetcompError naming an architecture that is unknown, or what
    the metadata lacks."""
    kind = files.get("general.type", str) or "model"
    if kind != "model":
        raise HetcompError(f"{files.path} holds no model: its general.type is {shown(kind)}")
    family = FAMILIES.get(files.architecture)
    if family is None:
        raise HetcompError(
            f"{files.path}: architecture {shown(files.architecture)} is not read from GGUF files; known are "
            f"{', '.join(FAMILIES)}"
        )
    return family(ModelFacts(files))


def _common(model: ModelFacts, prefix: str, model_type: str) -> Json:
    vocabulary = model.tensor("token_embd.weight").shape[0]

    def token(name: str) -> int | None:
        found = model.files.get(f"tokenizer.ggml.{name}_token_id", int)
        return found if found is not None and 0 <= found < vocabulary else None

    ends = [i for i in map(token, ("eos", "eot", "eom")) if i is not None]
    ends += [i for i in _end_tokens(model.files) if i < vocabulary]
    return {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": model.width("embedding_length"),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.width("attention.head_count_kv", model.heads),
        "max_position_embeddings": model.need("context_length", int),
        "rms_norm_eps": model.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": model.get("rope.freq_base", float) or 10000.0,
        "rope_scaling": _rope_scaling(model),
        "hidden_act": "silu",
        "tie_word_embeddings": not model.has("output.weight"),
        "bos_token_id": token("bos"),
        "eos_token_id": list(dict.fromkeys(ends)) or None,
        "pad_token_id": token("padding"),
    }


def _end_tokens(files: ModelFiles) -> list[int]:
    """Control tokens that end an answer by their texts, since the metadata has room for one or two: what llama.cpp adds
    (llama-vocab.cpp), without <|end|>, which ends parts of answers of GPT-OSS."""
    tokens, types = files.facts.get("tokenizer.ggml.tokens"), files.numbers("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or types is None:
        return []
    return [i for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == 3 and text in _ENDS]


def _rope_scaling(model: ModelFacts) -> Json | None:
    linear = model.get("rope.scale_linear", float)  # the key before rope.scaling.*
    kind = model.get("rope.scaling.type", str) or ("linear" if linear else "none")
    if kind == "none":
        return None
    factor = model.get("rope.scaling.factor", float) or linear
    if kind not in ("linear", "yarn") or factor is None:
        raise model.refuse("rope.scaling.type", kind, "none, linear or yarn, with rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    for key in ("yarn_ext_factor", "yarn_attn_factor"):
        # llama.cpp multiplies by them what transformers replaces.
        if model.get(f"rope.scaling.{key}", float) not in (None, 1.0):
            raise model.refuse(f"rope.scaling.{key}", model.get(f"rope.scaling.{key}", float), "1, or none")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.need("rope.scaling.original_context_length", int),
        "beta_fast": model.get("rope.scaling.yarn_beta_fast", float) or 32.0,
        "beta_slow": model.get("rope.scaling.yarn_beta_slow", float) or 1.0,
    }


def _dense_layers(model: ModelFacts) -> list[int]:
    return [layer for layer in range(model.layers) if model.has(f"blk.{layer}.ffn_gate.weight")]


def _gating(model: ModelFacts, default: int) -> int:
    found = model.whole("expert_gating_func", 0) or default
    if found not in (_SOFTMAX, _SIGMOID):
        raise model.refuse("expert_gating_func", found, f"{_SOFTMAX} (softmax) or {_SIGMOID} (sigmoid)")
    return found


def _only(model: ModelFacts, gating: int) -> None:
    """Raises HetcompError if the router is of another kind than the family's."""
    found = _gating(model, gating)
    if found != gating:
        raise model.refuse("expert_gating_func", found, str(gating))


def _norm_topk(model: ModelFacts, default: bool) -> bool:
    found = model.get("expert_weights_norm", bool)
    return default if found is None else found


# ---------------------------------------------------------------- families


def _llama(model: ModelFacts) -> Json:
    """Llama, and Mixtral, which llama.cpp holds to be a Llama with experts."""
    experts = model.whole("expert_count", 0)
    config = _common(model, "Mixtral" if experts else "Llama", "mixtral" if experts else "llama")
    config["intermediate_size"] = model.width("feed_forward_length")
    config["head_dim"] = model.rotary(model.head_dim, model.head_dim)
    if experts:
        return config | {
            "num_local_experts": experts,
            "num_experts_per_tok": model.used_experts,
            "sliding_window": None,
        }
    if model.has("rope_freqs.weight"):
        config["rope_scaling"] = _llama3_rope(model, config)
    config["attention_bias"] = model.has("blk.0.attn_q.bias")
    config["mlp_bias"] = model.has("blk.0.ffn_up.bias")
    return config


def _llama3_rope(model: ModelFacts, config: Mapping[str, Any]) -> Json:
    """The parameters that the tensor of frequency factors was made from. Raises HetcompError if it was made from other
    ones than those of Llama 3."""
    tensor = model.tensor("rope_freqs.weight")
    if tensor.dtype != "F32" or len(tensor.shape) != 1:
        raise HetcompError(f"{model.files.path}: rope_freqs.weight is {tensor.dtype} {list(tensor.shape)}")
    path = model.files.path.with_name(tensor.file)
    found = np.fromfile(path, "<f4", tensor.shape[0], offset=tensor.offset)
    made = {"rope_type": "llama3", "factor": float(found.max())} | _LLAMA3
    expected = _llama3_factors(config["rope_theta"], config["head_dim"], made)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise HetcompError(
            f"{model.files.path}: rope_freqs.weight has factors that are not Llama 3's with the parameters {_LLAMA3}"
        )
    return made


def _llama3_factors(theta: float, head_dim: int, rope: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """As LlamaModel.generate_extra_tensors of llama.cpp's converter."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors


def _qwen2(model: ModelFacts) -> Json:
    return _common(model, "Qwen2", "qwen2") | {"intermediate_size": model.width("feed_forward_length")}


def _qwen3(model: ModelFacts) -> Json:
    return _common(model, "Qwen3", "qwen3") | {
        "intermediate_size": model.width("feed_forward_length"),
        "head_dim": model.head_dim,
        "attention_bias": model.has("blk.0.attn_q.bias"),
    }


def _qwen_moe(model: ModelFacts) -> Json:
    return {
        "intermediate_size": model.width("feed_forward_length", 1),
        "moe_intermediate_size": model.width("expert_feed_forward_length", model.columns("ffn_down_exps.weight")),
        "num_experts": model.width("expert_count"),
        "num_experts_per_tok": model.used_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(model),
    }


def _qwen2_moe(model: ModelFacts) -> Json:
    _only(model, _SOFTMAX)
    return (
        _common(model, "Qwen2Moe", "qwen2_moe")
        | _qwen_moe(model)
        | {"shared_expert_intermediate_size": _shared_expert(model), "norm_topk_prob": _norm_topk(model, False)}
    )


def _qwen3_moe(model: ModelFacts) -> Json:
    _only(model, _SOFTMAX)
    return (
        _common(model, "Qwen3Moe", "qwen3_moe")
        | _qwen_moe(model)
        | {
            "head_dim": model.head_dim,
            "norm_topk_prob": _norm_topk(model, True),
            "attention_bias": model.has("blk.0.attn_q.bias"),
        }
    )


def _delta_net(model: ModelFacts) -> Json:
    """Layers of linear attention, told by their tensors, and full attention with a gate beside each head's queries."""
    linear = [model.has(f"blk.{layer}.ssm_a") for layer in range(model.layers)]
    values = model.width("ssm.time_step_rank")
    inner = model.width("ssm.inner_size")
    if inner % values:
        raise model.refuse("ssm.inner_size", inner, f"a multiple of the {values} heads of ssm.time_step_rank")
    head_dim = model.width("attention.key_length", max(1, model.width("embedding_length") // model.heads))
    return {
        "layer_types": ["linear_attention" if is_linear else "full_attention" for is_linear in linear],
        "linear_conv_kernel_dim": model.width("ssm.conv_kernel"),
        "linear_key_head_dim": model.width("ssm.state_size"),
        "linear_num_key_heads": model.width("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": inner // values,
        "head_dim": head_dim,
        "partial_rotary_factor": model.rotary(head_dim, head_dim // 4) / head_dim,
        "attention_bias": any(model.has(f"blk.{layer}.attn_q.bias") for layer in range(model.layers)),
    }


def _shared_expert(model: ModelFacts) -> int:
    return model.width("expert_shared_feed_forward_length", model.columns("ffn_down_shexp.weight"))


def _qwen3_next(model: ModelFacts) -> Json:
    _only(model, _SOFTMAX)
    return (
        _common(model, "Qwen3Next", "qwen3_next")
        | _qwen_moe(model)
        | _delta_net(model)
        | {"shared_expert_intermediate_size": _shared_expert(model), "norm_topk_prob": _norm_topk(model, True)}
    )


def _qwen35_moe(model: ModelFacts) -> Json:
    _only(model, _SOFTMAX)
    if not _norm_topk(model, True):
        raise model.refuse("expert_weights_norm", False, "true, as Qwen3.5 has it")
    experts = _qwen_moe(model)
    return (
        _common(model, "Qwen3_5Moe", "qwen3_5_moe_text")
        | {k: experts[k] for k in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")}
        | _delta_net(model)
        | {"shared_expert_intermediate_size": _shared_expert(model)}
    )


def _qwen35(model: ModelFacts) -> Json:
    return (
        _common(model, "Qwen3_5", "qwen3_5_text")
        | {"intermediate_size": model.width("feed_forward_length")}
        | _delta_net(model)
    )


def _olmoe(model: ModelFacts) -> Json:
    _only(model, _SOFTMAX)
    clip = model.get("attention.clamp_kqv", float)
    return _common(model, "Olmoe", "olmoe") | {
        "intermediate_size": model.width("feed_forward_length"),
        "num_experts": model.width("expert_count"),
        "num_experts_per_tok": model.used_experts,
        "norm_topk_prob": _norm_topk(model, False),
        "clip_qkv": clip or None,
    }


def _shared_and_grouped(model: ModelFacts) -> Json:
    """What DeepSeek and GLM have besides routed experts. Files without groups were written before llama.cpp knew
    them, and it chooses among all experts then."""
    groups = model.width("expert_group_count", 1)
    return {
        "intermediate_size": model.width("feed_forward_length"),
        "moe_intermediate_size": model.width("expert_feed_forward_length"),
        "n_routed_experts": model.width("expert_count"),
        "num_experts_per_tok": model.used_experts,
        "n_shared_experts": model.whole("expert_shared_count", 0),
        "first_k_dense_replace": model.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": model.get("expert_weights_scale", float) or 1.0,
        "n_group": groups,
        "topk_group": model.width("expert_group_used_count", groups),
    }


def _glm4_moe(model: ModelFacts) -> Json:
    _only(model, _SIGMOID)
    rotary = model.rotary(model.head_dim, model.head_dim // 2)
    return (
        _common(model, "Glm4Moe", "glm4_moe")
        | _shared_and_grouped(model)
        | {
            "head_dim": model.head_dim,
            "partial_rotary_factor": rotary / model.head_dim,
            "norm_topk_prob": _norm_topk(model, False),
            "use_qk_norm": model.has("blk.0.attn_q_norm.weight"),
            "attention_bias": model.has("blk.0.attn_q.bias"),
        }
    )


def _deepseek2(model: ModelFacts) -> Json:
    if model.get("attention.temperature_length", int):
        raise model.refuse("attention.temperature_length", model.get("attention.temperature_length", int), "none")
    sigmoid = _gating(model, _SOFTMAX) == _SIGMOID
    config = _common(model, *(("DeepseekV3", "deepseek_v3") if sigmoid else ("DeepseekV2", "deepseek_v2")))
    config |= _shared_and_grouped(model)
    # Before llama.cpp absorbed the key projection, key_length and value_length were those of the heads.
    split = model.get("attention.key_length_mla", int) is not None
    keys, values = (model.width(f"attention.{name}_length{'_mla' * split}") for name in ("key", "value"))
    rotary = model.rotary(keys, keys)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": None if model.has("blk.0.attn_q.weight") else model.width("attention.q_lora_rank"),
        "kv_lora_rank": model.width("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": keys - rotary,
        "v_head_dim": values,
        "norm_topk_prob": _norm_topk(model, False),
    }
    if config["rope_scaling"] is not None and config["rope_scaling"]["rope_type"] == "yarn":
        # The converter multiplies mscale_all_dim by 0.1; mscale is the same in all models (else rope would scale, too).
        mscale = 10 * model.need("rope.scaling.yarn_log_multiplier", float)
        config["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    if not sigmoid:
        if config["norm_topk_prob"]:
            raise model.refuse("expert_weights_norm", True, "false, as DeepSeek V2 has it with softmax")
        config["topk_method"] = "greedy" if config["n_group"] <= 1 else "group_limited_greedy"
    return config


def _gpt_oss(model: ModelFacts) -> Json:
    config = _common(model, "GptOss", "gpt_oss")
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["truncate"] = False  # of the architecture; no key says it
    return config | {
        "head_dim": model.head_dim,
        "intermediate_size": model.width("expert_feed_forward_length"),
        "num_local_experts": model.width("expert_count"),
        "num_experts_per_tok": model.used_experts,
        "sliding_window": model.need("attention.sliding_window", int),
        "layer_types": _layer_types(model),
    }


def _layer_types(model: ModelFacts) -> list[str]:
    """Of every period of layers the last attends to all, or as the file says layer by layer."""
    key = f"{model.files.architecture}.attention.sliding_window_pattern"
    if isinstance(model.files.facts.get(key), int):
        period = max(1, model.need("attention.sliding_window_pattern", int))
        sliding = [layer % period < period - 1 for layer in range(model.layers)]
    else:
        by_layer = model.files.numbers(key)
        sliding = [layer % 2 == 0 for layer in range(model.layers)] if by_layer is None else [bool(b) for b in by_layer]
    if len(sliding) < model.layers:
        raise model.refuse("attention.sliding_window_pattern", len(sliding), f"{model.layers} layers")
    return ["sliding_attention" if s else "full_attention" for s in sliding[: model.layers]]


def _minimax_m2(model: ModelFacts) -> Json:
    _only(model, _SIGMOID)
    return _common(model, "MiniMaxM2", "minimax_m2") | {
        "head_dim": model.head_dim,
        "rotary_dim": model.rotary(model.head_dim, model.head_dim),
        "intermediate_size": model.width("expert_feed_forward_length"),
        "num_local_experts": model.width("expert_count"),
        "num_experts_per_tok": model.used_experts,
    }


# By llama.cpp's name of the architecture.
FAMILIES: dict[str, Callable[[ModelFacts], Json]] = {
    "qwen3moe": _qwen3_moe,
    "qwen2moe": _qwen2_moe,
    "llama": _llama,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "olmoe": _olmoe,
    "minimax-m2": _minimax_m2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3next": _qwen3_next,
    "qwen35moe": _qwen35_moe,
    "qwen35": _qwen35,
}
