"""llama.cpp's names of architectures and tensors (gguf-py's constants.py, tensor_mapping.py), and transformers' own."""

from __future__ import annotations

import re

# llama.cpp's architecture by model_type.
ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "llama": "llama",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}
# Whose rows of q and k llama.cpp has in the order of its own rope (LlamaModel.permute of its converter).
PERMUTED = ("llama", "mixtral")
# Whose norms it stores with the 1 added that the model adds, and A_log as -exp(A_log).
ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")
# Of those, whose value heads of linear attention it has in turn by key heads.
TILED = ("qwen3_5_moe_text", "qwen3_5_text")
# A block's tensor by the module's name in the layer; gate and up of experts in one are written apart.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.experts.down_proj": "ffn_down_exps",
} | {
    f"mlp.{module}.{name}_proj": f"ffn_{name}_shexp"
    for module in ("shared_expert", "shared_experts")
    for name in ("gate", "up", "down")
}
GATE_UP = "mlp.experts.gate_up_proj"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
KV_B = "self_attn.kv_b_proj"

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Norms and what else has no adapters, with what families differ in, of which a file has one.
_OTHERS = {
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("ffn_norm", "post_attention_norm"),
    "self_attn.q_norm": ("attn_q_norm",),
    "self_attn.k_norm": ("attn_k_norm",),
    "self_attn.q_a_layernorm": ("attn_q_a_norm",),
    "self_attn.kv_a_layernorm": ("attn_kv_a_norm",),
    KV_B: ("attn_kv_b",),
    "linear_attn.in_proj_qkvz": ("ssm_in",),
    "linear_attn.in_proj_qkv": ("attn_qkv",),
    "linear_attn.in_proj_z": ("attn_gate",),
    "linear_attn.in_proj_ba": ("ssm_ba",),
    "linear_attn.in_proj_b": ("ssm_beta",),
    "linear_attn.in_proj_a": ("ssm_alpha",),
    "linear_attn.conv1d": ("ssm_conv1d",),
    "linear_attn.norm": ("ssm_norm",),
    "linear_attn.out_proj": ("ssm_out",),
}
# Parameters whose last part is no weight or bias of a module.
_BARE = {
    "sinks": "attn_sinks.weight",
    "e_score_correction_bias": "exp_probs_b.bias",
    "A_log": "ssm_a",
    "dt_bias": "ssm_dt.bias",
}
# In two tensors, each of which is a part that models multiply with by itself.
IN_PARTS = {KV_B: ("attn_k_b", "attn_v_b"), "linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate")}


def stored_as(parameter: str) -> list[tuple[str, ...]]:
    """In which tensors a file may have a parameter, in the order of how they are joined: one tensor, or two whose
    experts' rows lie behind each other, or (see IN_PARTS) of which each is a part. Empty if GGUF has no name for it."""
    module, suffix = _suffix(parameter)
    if module in _OUTSIDE:
        return [(f"{_OUTSIDE[module]}.{suffix}",)]
    found = LAYER.fullmatch(module)
    if found is None:
        return []
    block, inside = f"blk.{found[1]}", found[2]
    bare = _BARE.get(inside.rpartition(".")[2])
    if bare is not None:
        return [(f"{block}.{bare}",)]
    if inside == GATE_UP:
        pair = (f"{block}.ffn_gate_exps.{suffix}", f"{block}.ffn_up_exps.{suffix}")
        return [pair, (f"{block}.ffn_gate_up_exps.{suffix}",)]
    names = _OTHERS.get(inside, (MODULES[inside],) if inside in MODULES else ())
    candidates: list[tuple[str, ...]] = [(f"{block}.{name}.{suffix}",) for name in names]
    if inside in IN_PARTS:
        candidates.append(tuple(f"{block}.{name}.{suffix}" for name in IN_PARTS[inside]))
    return candidates


def _suffix(parameter: str) -> tuple[str, str]:
    """The module and what of it: experts' parameters are named like modules."""
    for end, suffix in ((".weight", "weight"), (".bias", "bias"), ("_proj_bias", "bias")):
        if parameter.endswith(end):
            return parameter.removesuffix(end) + ("_proj" if end == "_proj_bias" else ""), suffix
    return parameter, "weight"
