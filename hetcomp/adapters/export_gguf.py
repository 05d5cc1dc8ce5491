"""An adapter as llama.cpp reads it: a GGUF file of type adapter.

Names and layouts are those of llama.cpp's converters (convert_hf_to_gguf.py, convert_lora_to_gguf.py) and of its loader
(llama-adapter.cpp): lora_a [r, in] and lora_b [out, r] of a matrix, [E, r, in] and [E, out, r] of experts; a delta is
multiplied with adapter.lora.alpha / r.
"""

from __future__ import annotations

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
from hetcomp.frontend.gguf.tensor_names import ARCHITECTURES, GATE_UP, LAYER, MODULES, PERMUTED


def export_gguf(adapter: Adapter, base: BaseModel, out: Path) -> None:
    """Writes the adapter to the file ``out``, in f32. Raises HetcompError naming the model or the weight that llama.cpp
    has no adapters for, and as new_file."""
    architecture = ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise HetcompError(f"There are no GGUF names for {base.model_type}; known are {', '.join(ARCHITECTURES)}.")
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
    found = LAYER.fullmatch(module)
    layer, inside = found.groups() if found else ("", module)
    if inside == GATE_UP:
        gate, up = gate_and_up(weight, stack)
        yield f"blk.{layer}.ffn_gate_exps", gate, False
        yield f"blk.{layer}.ffn_up_exps", up, False
        return
    if inside.startswith("linear_attn."):
        raise HetcompError(
            f"llama.cpp has {weight.fqn} of {base.model_type} in parts or an order of its own, to which adapters are "
            "not exported; leave linear attention out of the adapter's targets, or export it to another form."
        )
    name = MODULES.get(inside)
    if name is None:
        raise HetcompError(
            f"GGUF has no tensor that is {weight.fqn} of {base.model_type}, so an adapter of it cannot be exported."
        )
    if base.model_type in PERMUTED and name in ("attn_q", "attn_k"):
        heads = base.config["num_attention_heads"]
        stack = _permuted(stack, heads if name == "attn_q" else base.config.get("num_key_value_heads") or heads)
    yield f"blk.{layer}.{name}", stack, weight.experts is None


def _permuted(stack: PairStack, heads: int) -> PairStack:
    """Rows of b with the halves of each head in turn."""
    count, rows, rank = stack.b.shape
    b = stack.b.reshape(count, heads, 2, rows // heads // 2, rank).swapaxes(2, 3).reshape(count, rows, rank)
    return replace(stack, b=b)
