"""Writes tiny checkpoints as the quantisers' own formats have them, beside twins that hold the same numbers in float32.

The twin's numbers come from transformers for FP8 and MXFP4, else from formulas, which
tests/unit/test_quantisers_libraries.py holds against compressed-tensors and AutoGPTQ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.reference import tiny_models

Tensors = dict[str, Tensor]
# Of a float weight [N, K]: what is stored, by the end of its name in place of "weight", and the float32 numbers.
Quantiser = Callable[[Tensor], tuple[Tensors, Tensor]]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write(
    folder: Path,
    family: str,
    config: Mapping[str, Any],
    quantiser: Quantiser,
    chosen: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"),
    **overrides: Any,
) -> tuple[Path, Path]:
    """Folders of the quantised checkpoint and of its float32 twin. config: the ``quantization_config``."""
    quantised, twin = folder / "quantised", folder / "twin"
    tiny_models.save_tiny(family, twin, **overrides)
    tensors = load_file(twin / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in list(tensors.items()):
        if not chosen(name):
            stored[name] = tensor
            continue
        made, tensors[name] = quantiser(tensor)
        prefix = name.removesuffix("weight")
        stored |= {prefix + end: part.contiguous() for end, part in made.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, twin / "model.safetensors", {"format": "pt"})
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    raw = json.loads((twin / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": dict(config)}))
    return quantised, twin


# ---------------------------------------------------------------- FP8 and MXFP4


def _spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def fp8(
    block: tuple[int, int] | None = (128, 128),
    dtype: torch.dtype = torch.float32,
    scale_name: str = "weight_scale_inv",
    flat: bool = False,
) -> Quantiser:
    """Blocks (None: the whole tensor) of e4m3fn. ``dtype`` of the scales; ``flat``: one axis or none."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        whole = tuple(weight.shape)
        rows, columns = map(min, block or whole, whole)
        grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        padded = torch.zeros(grid[0] * rows, grid[1] * columns)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        most = padded.reshape(grid[0], rows, grid[1], columns).abs().amax((1, 3))
        scales = (most / 448 * 1.01).to(dtype)
        each = _spread(scales.float(), (rows, columns), weight.shape)
        codes = (weight / each).to(torch.float8_e4m3fn)
        if any(n % size for n, size in zip(whole, block or whole, strict=True)):  # transformers takes even blocks only
            numbers = codes.float() * each
        else:
            numbers = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        return {"weight": codes, scale_name: scales.reshape(-1)[:1] if flat else scales}, numbers

    return quantise


def mxfp4_blocks(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of [E, N, K]: blocks u8 [E, N, K/32, 16], scales u8 [E, N, K/32] and the numbers [E, K, N] as transformers
    dequantises them."""
    grouped = numbers.reshape(*numbers.shape[:2], -1, 32)
    exponent = grouped.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    scaled = grouped / exponent.exp2()[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponent + 127).to(torch.uint8)
    return blocks, scales, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def write_gpt_oss(folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """As :func:`write`: GPT-OSS with MXFP4 experts, everything else float."""
    quantised, twin = folder / "quantised", folder / "twin"
    tiny_models.save_tiny("gpt_oss", twin, **overrides)
    tensors = load_file(twin / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in list(tensors.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        blocks, scales, tensors[name] = mxfp4_blocks(tensor.transpose(1, 2))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file({k: v.contiguous() for k, v in tensors.items()}, twin / "model.safetensors", {"format": "pt"})
    quantised.mkdir()
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    raw = json.loads((twin / "config.json").read_text())
    config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return quantised, twin


# ---------------------------------------------------------------- whole numbers


def _groups(weight: Tensor, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Codes [N, K], scales and zero points [N, G], not negative."""
    by_group = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
    top = 2**bits - 1
    if symmetric:
        scales = by_group.abs().amax(-1) * 2 / top
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = by_group.amin(-1).clamp(max=0), by_group.amax(-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round()
    scales = scales.to(dtype)
    codes = (by_group / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, top).reshape(weight.shape), scales, zeros


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last axis packed into int32, the first in the lowest bits."""
    per = 32 // bits
    each = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, per)
    words = (each << (torch.arange(per) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _width(weight: Tensor) -> int:
    return weight.shape[1]


def _in_order(
    weight: Tensor, group: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: Callable[[Tensor], int] | None
) -> tuple[Tensor, ...]:
    """As :func:`_groups`, and the group of each column: of columns in a random order if there is a seed."""
    columns = weight.shape[1]
    order = torch.arange(columns)
    if seed is not None:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed(weight)))
    codes, scales, zeros = _groups(weight[:, order], group, bits, symmetric, dtype)
    groups = torch.empty(columns, dtype=torch.int32)
    groups[order] = (torch.arange(columns) // (group or columns)).to(torch.int32)
    return codes[:, order.argsort()], scales, zeros, groups


def gptq(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    seed: Callable[[Tensor], int] = _width,
) -> Quantiser:
    """As AutoGPTQ's QuantLinear packs it (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py). ``seed`` of the order of
    columns: GPTQ gives matrices with the same inputs the same one."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros, groups = _in_order(
            weight, group, bits, symmetric, torch.float16, seed if act_order else None
        )
        stored_zeros = _words(zeros.T, bits)
        if version == 1:
            ones = 0x11111111 if bits == 4 else 0x01010101
            less = stored_zeros.to(torch.int64) - ones
            stored_zeros = torch.where(less < -(2**31), less + 2**32, less).to(torch.int32)
        numbers = scales.float()[:, groups.long()] * (codes - zeros[:, groups.long()])
        made = {"qweight": _words(codes, bits).T, "qzeros": stored_zeros, "scales": scales.T, "g_idx": groups}
        return made, numbers

    return quantise


def awq(group: int = 32) -> Quantiser:
    """As AutoAWQ's WQLinear_GEMM packs it (awq/modules/linear/gemm.py)."""

    def packed(codes: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return _words(codes.reshape(len(codes), -1, 8)[..., order].reshape(codes.shape), 4)

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros = _groups(weight, group, 4, False, torch.float16)
        each = group or weight.shape[1]
        numbers = (codes - zeros.repeat_interleave(each, 1)) * scales.float().repeat_interleave(each, 1)
        return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T}, numbers

    return quantise


def packed_quantized(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
) -> Quantiser:
    """compressed-tensors' pack-quantized: int32 words along the columns, zero points along the rows."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, zeros, groups = _in_order(weight, group, bits, symmetric, dtype, _width if act_order else None)
        numbers = (codes - zeros[:, groups.long()]) * scales.float()[:, groups.long()]
        made = {
            "weight_packed": _words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        made |= {"weight_g_idx": groups} if act_order else {}
        return made | ({} if symmetric else {"weight_zero_point": _words(zeros.T, bits).T}), numbers

    return quantise


def int8(dtype: torch.dtype = torch.bfloat16, whole: bool = False) -> Quantiser:
    """compressed-tensors' int-quantized: a scale a row, or of the ``whole`` tensor."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, scales, _ = _groups(weight.reshape(1, -1) if whole else weight, 0, 8, True, dtype)
        numbers = (codes - 128).reshape(weight.shape)
        made = {"weight": numbers.to(torch.int8), "weight_scale": scales[0] if whole else scales}
        return made, numbers * scales.float()

    return quantise


def mxfp4_packed(weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors' mxfp4-pack-quantized."""
    blocks, scales, numbers = mxfp4_blocks(weight[None])
    made = {"weight_packed": blocks[0].reshape(len(weight), -1), "weight_scale": scales[0]}
    return made, numbers[0].T


def with_fused_experts(tensors: Tensors) -> Tensors:
    """The experts of each layer in one tensor, as a model of transformers has them in memory."""
    fused: Tensors = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        before, found, behind = name.partition(".experts.")
        if not found:
            fused[name] = tensor
            continue
        expert, _, part = behind.partition(".")
        parts.setdefault(f"{before}.experts", {}).setdefault(int(expert), {})[part] = tensor
    for prefix, experts in parts.items():
        for end, stored in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
            each = [experts[e] for e in range(len(experts))]
            pairs = [[e[f"{half}_proj.{stored}"] for half in ("gate", "up")] for e in each]
            fused[f"{prefix}.gate_up_proj{end}"] = torch.stack([torch.cat(pair) for pair in pairs])
            fused[f"{prefix}.down_proj{end}"] = torch.stack([e[f"down_proj.{stored}"] for e in each])
    return fused
