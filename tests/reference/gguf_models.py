"""Writes tiny models as llama.cpp's converter does: with gguf-py's writer, names and quantisers, by the rules of
convert_hf_to_gguf.py (metadata, permutations, splits), written out for each family.

Quantised weights are put back into the model dequantised, so that it is the file's twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

from hetcomp.artifact.tokenizer import _byte_characters

ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
}
# K types have no quantiser in gguf-py: blocks of random codes, with scales that make numbers of a spread of some 0.15.
_SCALES = {
    Type.Q4_K: {0: 7e-4, 2: 5e-3},
    Type.Q5_K: {0: 3.5e-4, 2: 5e-3},
    Type.Q6_K: {208: 1.5e-4},
}
Choose = Callable[[str], Type]
Put = Callable[[Tensor], object]
DELTA_NETS = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")


def write(
    path: Path,
    model: PreTrainedModel,
    choose: Choose = lambda name: Type.F32,
    facts: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    fused: bool = False,
    **split: Any,
) -> Path:
    """Writes ``model`` to ``path``, matrices but routers in the types that ``choose`` has for their names. ``facts``
    adds metadata. ``fused``: gate and up of experts in one, as --fuse-gate-up-exps has them. Returns the (first)
    file."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], **split)
    _describe(writer, config)
    facts(writer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for hf_name, view, put in _converted(model, fused):
        name = hf_name if hf_name.startswith("blk.") else names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        _add(writer, name, view, choose, put)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.is_file() else min(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def add_words(writer: gguf.GGUFWriter) -> None:
    """A tokenizer whose tokens are the bytes, but the last: ``ab``."""
    characters = {byte: character for character, byte in _byte_characters().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(characters[chr(byte)] for byte in range(255)), "ab"])
    writer.add_token_merges(["a b"])


def _add(writer: gguf.GGUFWriter, name: str, view: Tensor, choose: Choose, put: Put) -> None:
    numbers = _stored(name, view.detach().numpy())
    # prepare_tensors of the converter; gates of linear attention are as small as routers.
    single = ("_norm", "ffn_gate_inp", "ssm_conv1d")
    matrix = numbers.ndim > 1 and name.endswith(".weight") and not any(part in name for part in single)
    kind = choose(name) if matrix else Type.F32
    if kind == Type.F32:
        writer.add_tensor(name, numbers)
        return
    raw = quantise(numbers, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
    with torch.no_grad():
        put(torch.from_numpy(np.copy(gguf.quants.dequantize(raw, kind))).reshape(view.shape))


def _stored(name: str, numbers: np.ndarray) -> np.ndarray:
    """Of views of heads in halves (see _permuted) the axes of rows are one."""
    rest = numbers.shape[3:] if numbers.ndim > 2 and (".attn_q." in name or ".attn_k." in name) else None
    return np.ascontiguousarray(numbers if rest is None else numbers.reshape(-1, *rest))


def quantise(numbers: np.ndarray, kind: Type) -> np.ndarray:
    """``numbers`` in the type; random codes for those that gguf-py does not quantise to."""
    if kind not in _SCALES:
        return gguf.quants.quantize(np.ascontiguousarray(numbers), kind)
    size, each = gguf.GGML_QUANT_SIZES[kind]
    count = numbers.size // size
    blocks = np.random.default_rng(count).integers(0, 256, (count, each), np.uint8)
    for offset, scale in _SCALES[kind].items():
        blocks[:, offset : offset + 2] = np.full(count, scale, np.float16)[:, None].view(np.uint8)
    return blocks.reshape(*numbers.shape[:-1], -1)


# ---------------------------------------------------------------- metadata: set_gguf_parameters


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    kind = config.model_type
    deepseek = kind in ("deepseek_v2", "deepseek_v3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if config.model_type != "qwen3_5_moe_text":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if deepseek else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _rope(writer, config, deepseek)
    shared = deepseek or kind == "glm4_moe"
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts is not None and not shared:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind in ("gpt_oss", "minimax_m2"):
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    if kind == "minimax_m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_rope_dimension_count(config.rotary_dim)
    head_dim = getattr(config, "head_dim", None)
    if kind in ("llama", "mixtral"):
        writer.add_rope_dimension_count(head_dim or config.hidden_size // config.num_attention_heads)
    if head_dim is not None and not deepseek:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if shared:
        _shared_and_grouped(writer, config)
    if kind == "glm4_moe":
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if deepseek:
        _latent(writer, config)
    if kind in DELTA_NETS:
        _delta_net(writer, config)


def _rope(writer: gguf.GGUFWriter, config: Any, deepseek: bool) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if deepseek:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _shared_and_grouped(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def _latent(writer: gguf.GGUFWriter, config: Any) -> None:
    sigmoid = config.model_type == "deepseek_v3"
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def _delta_net(writer: gguf.GGUFWriter, config: Any) -> None:
    """Qwen3NextModel.set_gguf_parameters."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([11, 11, 10, 0])


# ---------------------------------------------------------------- tensors: modify_tensors


def _converted(model: PreTrainedModel, fused: bool) -> Iterator[tuple[str, Tensor, Put]]:
    """Names that gguf-py's TensorNameMap knows, tensors as they are written, and what puts numbers of them back into
    the model."""
    buffers = [(n, t) for n, t in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        if model.config.model_type in DELTA_NETS and (name.endswith("norm.weight") or "linear_attn." in name):
            yield from _of_delta_nets(name, parameter.data, model.config)
        elif fused and name.endswith("gate_up_proj"):
            yield f"blk.{name.split('.')[2]}.ffn_gate_up_exps.weight", parameter.data, parameter.data.copy_
        else:
            for converted, view in _modified(name, parameter.data, model.config):
                yield converted, view, view.copy_
    if model.config.rope_parameters["rope_type"] == "llama3":
        factors = _llama3_factors(model.config)
        yield "rope_freqs.weight", factors, factors.copy_


def _of_delta_nets(name: str, data: Tensor, config: Any) -> Iterator[tuple[str, Tensor, Put]]:
    """Qwen3NextModel.modify_tensors, behind _LinearAttentionVReorderBase's for Qwen3.5."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    k_dim, v_dim = config.linear_key_head_dim, config.linear_value_head_dim
    each = values // keys
    if name.endswith("in_proj_qkvz.weight"):
        of_heads = torch.arange(len(data)).view(keys, -1).split([k_dim, k_dim, each * v_dim, each * v_dim], 1)
        block = f"blk.{name.split('.')[2]}"
        for tensor, parts in ((f"{block}.attn_qkv.weight", of_heads[:3]), (f"{block}.attn_gate.weight", of_heads[3:])):
            rows = torch.cat([part.flatten() for part in parts])
            yield tensor, data[rows], _putting(data, rows)
        return
    order = _reordered(name, data, config, keys, each, k_dim, v_dim)
    axis = 1 if name.endswith("out_proj.weight") else 0
    stored = data.index_select(axis, order)
    if name.endswith("A_log"):
        stored = -torch.exp(stored)
        data[order] = torch.log(-stored.double()).float()
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        stored = stored + 1
        data.copy_(stored - 1)
    name = name.replace("dt_bias", "dt_proj.bias")
    yield name, stored.squeeze(), _putting(data if axis == 0 else data.T, order, turned=axis == 1)


def _reordered(name: str, data: Tensor, config: Any, keys: int, each: int, k_dim: int, v_dim: int) -> Tensor:
    """Which of transformers' rows (columns, of out_proj) is written at each place."""
    part = name.split("linear_attn.")[-1].split(".")[0]
    order = torch.arange(data.shape[1 if part == "out_proj" else 0])
    if config.model_type == "qwen3_next" or "linear_attn." not in name or part == "norm":
        return order
    first = 2 * keys * k_dim if part in ("in_proj_qkv", "conv1d") else 0
    width = v_dim if part in ("in_proj_qkv", "conv1d", "in_proj_z", "out_proj") else 1
    tiled = order[first:].view(keys, each, width).swapaxes(0, 1).flatten()
    return torch.cat([order[:first], tiled])


def _putting(data: Tensor, order: Tensor, turned: bool = False) -> Put:
    def put(numbers: Tensor) -> None:
        data[order] = (numbers.T if turned else numbers).reshape(len(order), *data.shape[1:])

    return put


def _modified(name: str, data: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.model_type in ("llama", "mixtral") and ".q_proj." in name:
        data = _permuted(data, heads)
    if config.model_type in ("llama", "mixtral") and ".k_proj." in name:
        data = _permuted(data, kv_heads)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if name.endswith("sinks"):
        name += ".weight"
    if name.endswith("kv_b_proj.weight"):
        nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
        k_b, v_b = data.view(kv_heads, nope + v_dim, -1).split([nope, v_dim], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), k_b.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), v_b
    elif ".experts." in name:
        yield from _experts(name, data, config.model_type == "gpt_oss")
    else:
        yield name, data


def _experts(name: str, data: Tensor, interleaved: bool) -> Iterator[tuple[str, Tensor]]:
    bias = name.endswith("_bias")
    base, suffix = name.removesuffix("_bias"), ".bias" if bias else ".weight"
    if interleaved and not bias:
        data = data.transpose(-1, -2)
    if not base.endswith("gate_up_proj"):
        yield base + suffix, data
        return
    axis = -1 if bias else -2
    if interleaved:
        gate, up = (data[:, half::2] for half in (0, 1))
    else:
        gate, up = data.chunk(2, axis)
    yield base.replace("gate_up_proj", "gate_proj") + suffix, gate
    yield base.replace("gate_up_proj", "up_proj") + suffix, up


def _permuted(data: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute, short of the last reshape, so that it is a view."""
    return data.view(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2)


def _llama3_factors(config: Any) -> Tensor:
    """LlamaModel.generate_extra_tensors."""
    rope = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for freq in freqs:
        wavelength = 2 * torch.pi / freq
        if wavelength < 8192 / high:
            factors.append(torch.tensor(1.0))
        elif wavelength > 8192 / low:
            factors.append(torch.tensor(rope["factor"]))
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.stack(factors).float()
