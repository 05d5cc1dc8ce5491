"""An adapter as llama.cpp reads it: a GGUF file of type adapter.

Names and layouts are those of llama.cpp's converters (convert_hf_to_gguf.py, convert_lora_to_gguf.py) and of its loader
(llama-adapter.cpp): lora_a [r, in] and lora_b [out, r] of a matrix, [E, r, in] and [E, out, r] of experts; a delta is
multiplied with adapter.lora.alpha / r.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from hetcomp.adapters.base_model import BaseModel
from hetcomp.adapters.gguf_file import write_gguf
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter
from hetcomp.adapters.pair_stack import PairStack, gate_and_up, stack_of
from hetcomp.adapters.tensor_file import NewTensor
from hetcomp.errors import HetcompError

# llama.cpp's architecture by model_type.
_ARCHITECTURES = {
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "llama": "llama",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
# Whose rows of q and k llama.cpp has in the order of its own rope (LlamaModel.permute of convert_hf_to_gguf.py).
_PERMUTED = ("llama", "mixtral")
# A block's tensor by the module's name in the layer; gate and up of experts in one are written apart.
_TENSORS = {
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
_GATE_UP = "mlp.experts.gate_up_proj"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def export_gguf(adapter: Adapter, base: BaseModel, out: Path) -> None:
    """Writes the adapter to the file ``out``, in f32. Raises HetcompError naming the model or the weight that llama.cpp
    has no adapters for, and as new_file."""
    architecture = _ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise HetcompError(f"There are no GGUF names for {base.model_type}; known are {', '.join(_ARCHITECTURES)}.")
    named = [pair for weight in adapter.weights.values() for pair in _named(weight, base)]
    # One alpha for all: what a tensor's own rank and scale differ from it by is in its b.
    alpha = named[0][1].scale * named[0][1].rank
    tensors = []
    for name, stack, is_matrix in named:
        factor = stack.scale * stack.rank / alpha if alpha else stack.scale
        for side, numbers in (("a", stack.a), ("b", stack.b if factor == 1.0 else np.float32(factor) * stack.b)):
            stored = numbers[0] if is_matrix else numbers
            tensors.append(NewTensor(f"{name}.weight.lora_{side}", "F32", stored.shape, partial(np.asarray, stored)))
    facts: dict[str, str | float] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": adapter.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_gguf(out, facts, tensors)


def _named(weight: AdaptedWeight, base: BaseModel) -> Iterator[tuple[str, PairStack, bool]]:
    """Names and stacks of a weight's tensors, and whether they are matrices."""
    stack = stack_of(weight)
    module = weight.fqn.removesuffix(".weight")
    if module == "lm_head":
        yield "output", stack, True
        return
    found = _LAYER.fullmatch(module)
    layer, inside = found.groups() if found else ("", module)
    if inside == _GATE_UP:
        gate, up = gate_and_up(weight, stack)
        yield f"blk.{layer}.ffn_gate_exps", gate, False
        yield f"blk.{layer}.ffn_up_exps", up, False
        return
    name = _TENSORS.get(inside)
    if name is None:
        raise HetcompError(
            f"GGUF has no tensor that is {weight.fqn} of {base.model_type}, so an adapter of it cannot be exported."
        )
    if base.model_type in _PERMUTED and name in ("attn_q", "attn_k"):
        heads = base.config["num_attention_heads"]
        stack = _permuted(stack, heads if name == "attn_q" else base.config.get("num_key_value_heads") or heads)
    yield f"blk.{layer}.{name}", stack, weight.experts is None


def _permuted(stack: PairStack, heads: int) -> PairStack:
    """Rows of b with the halves of each head in turn."""
    count, rows, rank = stack.b.shape
    b = stack.b.reshape(count, heads, 2, rows // heads // 2, rank).swapaxes(2, 3).reshape(count, rows, rank)
    return replace(stack, b=b)
