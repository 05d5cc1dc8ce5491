"""Quantised safetensors that contradict their config, or that are not read: named, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.errors import HetcompError
from hetcomp.importance_from_text import importance_from_text
from hetcomp.ir.plan import Plan, ValueKind
from tests.reference import quantised_checkpoints as made
from tests.unit.test_quantised_checkpoints import (
    AWQ,
    BLOCKS,
    FP8,
    SMALL,
    compressed,
    differences,
    gptq,
    planned,
    rewrite,
)


def refusal(folder: Path) -> str:
    with pytest.raises(HetcompError) as caught:
        differences(planned(folder), folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(end: str) -> Callable[[made.Tensors], made.Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(end)}


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[made.Tensors], made.Tensors]:
    return lambda tensors: {k: change(v) if k.endswith(end) else v for k, v in tensors.items()}


BAD: dict[str, tuple[Callable[[made.Tensors], made.Tensors], Mapping[str, Any], tuple[str, ...]]] = {
    "no scales": (without("0.gate_proj.scales"), {}, ("gate_proj.qweight", "no scales")),
    "no zero points": (without("q_proj.qzeros"), {}, ("q_proj.qweight", "has no zeros")),
    "scales of another shape": (changed("k_proj.scales", lambda t: t[:1]), {}, ("k_proj.scales", "shape", "expected")),
    "scales of another type": (changed("k_proj.scales", lambda t: t.int()), {}, ("k_proj.scales", "I32", "expected")),
    "other groups than the config's": (lambda t: t, {"group_size": 16}, ("scales", "expected")),
    "groups that do not divide": (lambda t: t, {"group_size": 56}, ("groups of 56",)),
    "other bits than the config's": (lambda t: t, {"bits": 8}, ("48 columns", "qweight")),
    "no quantised tensor": (
        lambda t: {k: v for k, v in t.items() if "_proj" not in k},
        {},
        ("gptq", "no tensor is"),
    ),
    "columns of other groups": (changed("v_proj.g_idx", lambda t: t.flip(0)), {}, ("v_proj", "runs of columns")),
    "zero points of a symmetric": (changed("v_proj.qzeros", lambda t: t + 1), {}, ("v_proj", "symmetric")),
    "an excluded module": (lambda t: t, {"modules_to_not_convert": ["v_proj"]}, ("v_proj", "as it is")),
    "three bits": (lambda t: t, {"bits": 3}, ("3 bits", "4 and 8")),
    "a dynamic config": (lambda t: t, {"dynamic": {"+:.*": {"bits": 8}}}, ("dynamic",)),
    "an unknown layout": (lambda t: t, {"checkpoint_format": "marlin"}, ("marlin",)),
    "an unknown method": (lambda t: t, {"quant_method": "bitsandbytes"}, ("bitsandbytes", "gptq")),
    "no bits": (lambda t: t, {"bits": None}, ("bits", "None")),
    "a damaged list": (lambda t: t, {"modules_to_not_convert": "lm_head"}, ("modules_to_not_convert",)),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_and_unknown_variants_are_refused_by_name(case, tmp_path):
    change, config, words = BAD[case]
    quantised, _ = made.write(tmp_path, "qwen3_moe", gptq(), made.gptq(), **SMALL)
    rewrite(quantised, change, **config)
    message = refusal(quantised)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FP8 | {"fmt": "e5m2"}, ("e5m2",)),
        (FP8 | {"weight_block_size": [128]}, ("blocks",)),
        (FP8 | {"weight_block_size": [64, 128]}, ("weight_scale_inv", "shape")),
        (AWQ | {"version": "gemv"}, ("gemv",)),
        (AWQ | {"bits": 8}, ("8 bits",)),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), ("nvfp4-pack-quantized",)),
        (compressed("marlin-24", num_bits=4, type="int"), ("marlin-24",)),
        (compressed("pack-quantized", num_bits=2, type="int"), ("2 bits",)),
        (compressed("pack-quantized", num_bits=4, type="int", strategy="attn_head"), ("attn_head",)),
        (compressed("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparse",)),
        (compressed("pack-quantized", num_bits=4) | {"ignore": ["re:("]}, ("pattern",)),
        ({"quant_method": "compressed-tensors"}, ("config_groups",)),
        ({"quant_method": "mxfp4"}, ("no tensor is",)),
        ({"bits": 4}, ("unnamed",)),
        ([1], ("no object",)),
    ],
)
def test_configs_that_are_not_read_are_named(config, words, tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    raw = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    message = refusal(quantised)
    for word in words:
        assert word in message, message


def test_a_truncated_quantised_file_is_refused(tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    with (quantised / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    assert "truncated" in refusal(quantised)


def test_nan_codes_are_reported(tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        codes = tensor.view(torch.uint8).clone()
        codes[3, 5] = 0x7F
        return codes.view(torch.float8_e4m3fn)

    rewrite(quantised, changed("layers.1.self_attn.q_proj.weight", spoilt))
    plan: Plan = (whole := planned(quantised)).plan
    assert whole.imported.checkpoint is not None
    packer = WeightPacker(whole.imported.checkpoint)
    for _ in packer.chunks([v for v in plan.values if v.kind is ValueKind.WEIGHT]):
        pass
    assert packer.not_finite == ["model.layers.1.self_attn.q_proj.weight"]


def test_importance_needs_the_checkpoint_in_float(tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    with pytest.raises(HetcompError, match=r"is quantised \(fp8\), but importance"):
        importance_from_text(quantised, [[1, 2, 3]], tmp_path / "i.safetensors")


def test_a_config_without_tensors_is_planned_with_a_note(tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    (quantised / "model.safetensors").unlink()
    plan = planned(quantised).plan
    assert any("quantised (fp8)" in note and "--formats" in note for note in plan.notes)
