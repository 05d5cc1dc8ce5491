"""Files with matrices as large as those of real models, in every form that is read: two layers of Qwen3-30B-A3B's shape
with its whole vocabulary, in MXFP4 three of GPT-OSS-20B's with half of its own; made in seconds.

Some rows of a matrix of each shape are quantised and repeated: what a compile takes depends on sizes alone. The output
layer is quantised as the rest is, which makes it the largest matrix of codes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import write_gguf
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.models_zoo import find
from hetcomp.models_zoo.synthesise import checkpoint_shapes
from tests.reference import gguf_models, onnx_genai_models
from tests.reference import quantised_checkpoints as made

_ROWS = 2048  # of a matrix, at most, that are quantised: whole blocks of all forms
_INT4 = {"bits": 4, "sym": True}
# By kind: quantization_config, what quantises a matrix, and the axis of its tensors that counts rows.
_QUANTISED: Mapping[str, tuple[dict[str, Any], made.Quantiser, int]] = {
    "GPTQ": ({"quant_method": "gptq", "desc_act": False, "group_size": 128, **_INT4}, made.gptq(group=128), 1),
    "GPTQ, act-order": (
        {"quant_method": "gptq", "desc_act": True, "group_size": 128, **_INT4},
        made.gptq(group=128, act_order=True),
        1,
    ),
    "GPTQ, groups of 16": (
        {"quant_method": "gptq", "desc_act": False, "group_size": 16, **_INT4},
        made.gptq(group=16),
        1,
    ),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, made.awq(128), 1),
    "FP8, blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, made.fp8(), 0),
}
_GGUF = ("Q8_0", "Q4_K", "Q4_1")
KINDS = ("bf16", *(f"GGUF {kind}" for kind in _GGUF), "ONNX int4", *_QUANTISED, "MXFP4")


def write(kind: str, folder: Path) -> tuple[Path, float]:
    """Makes the model in the form ``kind`` (of KINDS) in a new folder, if it is not there; returns what is to be
    compiled, and the GB of its largest tensor as the file has it: of experts in one tensor, which are read one by one,
    that of one."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _written(kind, partial)
        partial.rename(folder)
    path = next((path for end in ("gguf", "onnx") for path in folder.glob(f"*.{end}")), folder)
    return path, _largest(path) / 1e9


def _written(kind: str, folder: Path) -> Path:
    if kind == "MXFP4":
        _configure(folder, "gpt-oss-20b", num_hidden_layers=3, vocab_size=100_544, pad_token_id=0, eos_token_id=2)
        return _mxfp4(folder)
    if kind.startswith("ONNX"):  # fewer experts: all of a layer are quantised in f32 at a time
        _configure(folder, "qwen3-30b-a3b", num_hidden_layers=4, num_experts=48)
        return _onnx(folder)
    _configure(folder, "qwen3-30b-a3b", num_hidden_layers=2)
    if kind.startswith("GGUF"):
        return _gguf(folder, gguf.GGMLQuantizationType[kind.removeprefix("GGUF ")])
    return _safetensors(folder, kind)


def _largest(path: Path) -> int:
    if path.suffix == ".gguf":
        sizes = [int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if "_exps" not in t.name]
    elif path.suffix == ".onnx":
        initialisers = onnx.load(path, load_external_data=False).graph.initializer
        facts = ({e.key: e.value for e in t.external_data} for t in initialisers if "experts" not in t.name)
        sizes = [int(each.get("length", 0)) for each in facts]
    else:
        tensors = read_header(path / "model.safetensors").values()
        sizes = [t.bytes for t in tensors if not t.name.endswith(("_blocks", "_scales"))]
    return max(sizes)


def _configure(folder: Path, model: str, **changes: int) -> None:
    config = json.loads((find(model) / "config.json").read_text()) | changes
    config.pop("quantization_config", None)
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][: changes["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(config))


def _normal(*shape: int) -> torch.Tensor:
    """One row of numbers for all: no memory but a row's."""
    return (torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)) * 0.01).expand(shape)


def _save(folder: Path, stored: made.Tensors, quantisation: Mapping[str, Any] | None) -> Path:
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if quantisation is not None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": dict(quantisation)}))
    return folder


def _safetensors(folder: Path, kind: str) -> Path:
    config, quantise, axis = _QUANTISED.get(kind, (None, None, 0))

    @cache
    def coded(rows: int, columns: int) -> made.Tensors:
        assert quantise is not None
        have = min(rows, _ROWS)
        parts, _ = quantise(torch.randn(have, columns, generator=torch.Generator().manual_seed(1)) * 0.01)
        return {end: _repeated(part, axis, have, rows) for end, part in parts.items()}

    stored: made.Tensors = {}
    for name, shape in checkpoint_shapes(folder)[0].items():
        if quantise is not None and name.endswith(("_proj.weight", "lm_head.weight")):
            stored |= {name.removesuffix("weight") + end: part.clone() for end, part in coded(*shape).items()}
        else:
            stored[name] = _normal(*shape).to(torch.bfloat16).contiguous()
    return _save(folder, stored, config)


def _repeated(part: torch.Tensor, axis: int, have: int, rows: int) -> torch.Tensor:
    """What is stored for ``have`` rows, for more of them."""
    if part.ndim < 2 or rows == have:  # the groups of columns are those of all rows
        return part.contiguous()
    repeats = [-(-rows // have) if i == axis else 1 for i in range(part.ndim)]
    return part.repeat(repeats).narrow(axis, 0, part.shape[axis] * rows // have).contiguous()


def _mxfp4(folder: Path) -> Path:
    stored: made.Tensors = {}
    for name, shape in checkpoint_shapes(folder)[0].items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = shape
            blocks, scales, _ = made.mxfp4_blocks(_normal(1, rows, columns))
            stored |= {
                f"{name}_blocks": blocks.repeat(experts, 1, 1, 1),
                f"{name}_scales": scales.repeat(experts, 1, 1),
            }
        else:
            stored[name] = _normal(*shape).to(torch.bfloat16).contiguous()
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head", "model.embed_tokens"]
    return _save(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": left_out})


def _gguf(folder: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Matrices but routers in ``kind``, the vocabulary's too."""
    config = json.loads((folder / "config.json").read_text())
    shapes = checkpoint_shapes(folder)[0]
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    write_gguf.describe(writer, config)
    zeros = {name: np.broadcast_to(np.uint16(0), shape) for name, shape in shapes.items()}
    for name, bits in write_gguf.tensors(zeros, config):
        numbers = _normal(*bits.shape[1:]).numpy() if bits.ndim > 1 else _normal(*bits.shape).numpy()
        if bits.ndim < 2 or name.endswith("ffn_gate_inp"):
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(np.broadcast_to(numbers, bits.shape)))
            continue
        row = gguf_models.quantise(_normal(1, bits.shape[-1]).numpy(), kind)
        raw = np.ascontiguousarray(np.broadcast_to(row, (*bits.shape[:-1], row.shape[-1])))
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _onnx(folder: Path) -> Path:
    """Int4 in blocks of 32, embeddings too, as onnxruntime-genai's builder has them; weights beside the graph."""
    choices = onnx_genai_models.Choices(bits=4, zeros=True, quantised_embedding=True)
    builder = onnx_genai_models.Builder(_with_one_row(folder), choices)
    path = folder / "model.onnx"
    onnx.save(builder.build(), path, save_as_external_data=True, location="model.onnx.data")
    return path


def _with_one_row(folder: Path) -> PreTrainedModel:
    """The folder's model without memory for its weights."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = {name: _normal(*parameter.shape) for name, parameter in model.state_dict().items()}
    model.load_state_dict(numbers, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model
