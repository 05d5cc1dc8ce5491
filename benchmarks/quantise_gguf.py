"""Quantises a GGUF file with llama.cpp: SOURCE TARGET TYPE [--importance FILE.safetensors].

Runs in the peers' environment. Prints, as JSON, the type that each matrix really got (llama.cpp falls back where a row
is no multiple of 256), and bytes and weights of all matrices but the routers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# Our names of the weights that share a column's importance, by theirs.
_NAMES = {
    "attn_q": "self_attn.q_proj.weight",
    "attn_k": "self_attn.k_proj.weight",
    "attn_v": "self_attn.v_proj.weight",
    "attn_output": "self_attn.o_proj.weight",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def _our_name(theirs: str) -> str | None:
    if theirs in ("token_embd.weight", "output.weight"):
        return "model.embed_tokens.weight" if theirs.startswith("token") else "lm_head.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", theirs)
    ours = _NAMES.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{ours}" if match and ours else None


def _importance(path: Path, source: Path) -> tuple[ctypes.Array, list[np.ndarray]]:
    """llama.cpp's array of importances, ended by an empty one, and the numbers that it points to."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    kept, entries = [], []
    for tensor in gguf.GGUFReader(str(source)).tensors:
        entry = header.get(_our_name(tensor.name) or "")
        if entry is None:
            continue
        count = int(np.prod(entry["shape"]))
        numbers = np.fromfile(path, np.float32, count, offset=8 + length + entry["data_offsets"][0])
        kept.append(numbers)
        pointer = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries.append(llama_cpp.llama_model_imatrix_data(tensor.name.encode(), pointer, count))
    entries.append(llama_cpp.llama_model_imatrix_data())
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries), kept


def _contents(path: Path) -> dict[str, object]:
    types: dict[str, Counter[str]] = {}
    size = weights = 0
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if len(tensor.shape) < 2 or tensor.name.endswith("ffn_gate_inp.weight"):
            continue
        kind = re.sub(r"blk\.\d+\.|\.weight", "", tensor.name)
        types.setdefault(kind, Counter())[tensor.tensor_type.name] += 1
        size += int(tensor.n_bytes)
        weights += int(tensor.n_elements)
    return {"types": types, "bytes": size, "weights": weights}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("type", help="F32, BF16, Q8_0, Q4_0, Q4_K_M, ..")
    parser.add_argument("--importance", type=Path)
    options = parser.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: object) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    request = llama_cpp.llama_model_quantize_default_params()
    request.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if options.type == 'F32' else 'MOSTLY'}_{options.type}")
    if options.importance is not None:
        array, _kept = _importance(options.importance, options.source)
        request.imatrix = array
    partial = Path(f"{options.target}.partial")
    source, target = str(options.source).encode(), str(partial).encode()
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(request)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {options.source} to {options.type}")
    partial.rename(options.target)
    print(json.dumps(_contents(options.target)))


if __name__ == "__main__":
    main()
