"""Writes a bf16 Qwen3-MoE checkpoint as GGUF, number for number, for llama.cpp: FOLDER FILE.

Runs in the peers' environment (gguf and numpy only). llama.cpp's own converter refuses tokenizers that it
does not know by hash, hence this one; what it writes for bf16 is the same: norms and the router as f32, the
rest as bf16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp": "mlp.gate",
}


class Checkpoint:
    """bf16 tensors of a safetensors folder as uint16 arrays, mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, tuple[Path, int, list[int]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise SystemExit(f"{path}: {name} is {entry['dtype']}, BF16 was expected")
                self._tensors[name] = (path, 8 + length + entry["data_offsets"][0], entry["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        path, offset, shape = self._tensors[name]
        return np.memmap(path, np.uint16, "r", offset, tuple(shape))


def tensors(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    yield "token_embd", checkpoint["model.embed_tokens.weight"]
    yield "output_norm", checkpoint["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output", checkpoint["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for ours, theirs in _LAYER_TENSORS.items():
            yield f"blk.{layer}.{ours}", checkpoint[f"{prefix}{theirs}.weight"]
        for part in ("gate", "up", "down"):
            names = [f"{prefix}mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            yield f"blk.{layer}.ffn_{part}_exps", np.stack([checkpoint[name] for name in names])


def _add(writer: gguf.GGUFWriter, name: str, bits: np.ndarray) -> None:
    if bits.ndim == 1 or name.endswith("ffn_gate_inp"):
        writer.add_tensor(f"{name}.weight", (bits.astype(np.uint32) << 16).view(np.float32))
    else:
        rows = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=BF16)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i] = token
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(gguf.TokenType.CONTROL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, key in ((writer.add_bos_token_id, "bos_token_id"), (writer.add_eos_token_id, "eos_token_id")):
        ids = config[key] if isinstance(config[key], list) else [config[key]]
        if ids[0] is not None:  # GGUF has room for one
            add(ids[0])
    writer.add_add_bos_token(False)


def main() -> None:
    """Command line."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise SystemExit(f"{folder} is a {config['model_type']} model, qwen3_moe was expected")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "qwen3moe")
    describe(writer, config)
    _add_tokenizer(writer, folder, config)
    for name, bits in tensors(Checkpoint(folder), config):
        _add(writer, name, bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    main()
