"""Quantised checkpoints, compiled, against transformers in float32 with the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import hetcomp
from tests.reference import quantised_checkpoints as made
from tests.reference.tiny_models import token_ids
from tests.unit.test_quantised_checkpoints import AWQ, BLOCKS, FP8, SMALL, gptq, int_pack

CONTEXT = 64
QWEN2 = SMALL | {"shared_expert_intermediate_size": 64}
WRITTEN = {
    "fp8": lambda folder: made.write(folder, "qwen3_moe", FP8, made.fp8(), **BLOCKS),
    "mxfp4": made.write_gpt_oss,
    "compressed int4": lambda folder: made.write(
        folder, "qwen2_moe", int_pack(4, 32), made.packed_quantized(), **QWEN2
    ),
    "compressed int8": lambda folder: made.write(folder, "mixtral", int_pack(8, 32), made.packed_quantized(8)),
    "gptq": lambda folder: made.write(folder, "qwen3_moe", gptq(), made.gptq(), **SMALL),
    "gptq, order": lambda folder: made.write(
        folder, "qwen3_moe", gptq(desc_act=True), made.gptq(act_order=True), **SMALL
    ),
    "awq": lambda folder: made.write(folder, "llama", AWQ, made.awq(), intermediate_size=96),
}


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, tmp_path_factory) -> tuple[Path, torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    quantised, twin = WRITTEN[request.param](folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return quantised, model.eval(), folder


def errors(model: torch.nn.Module, exe: hetcomp.Executable) -> np.ndarray:
    """Of each position the largest error of a logit, relative to the largest logit."""
    ids = token_ids(model, 33)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits[0].numpy()
    return np.abs(exe(ids[0].tolist()) - want).max(-1) / np.abs(want).max()


@pytest.mark.slow
def test_dequantised_to_f32_the_logits_are_those_of_float32(written):
    """Another order of summation, as tests/parity/test_families.py."""
    quantised, model, folder = written
    exe = hetcomp.compile(quantised, formats="f32", context_length=CONTEXT, out=folder / "f32.hetc")
    assert errors(model, exe).max() < 1e-4


@pytest.mark.slow
def test_as_they_are_the_logits_are_off_by_the_arithmetic_alone(written):
    """Activations are rounded to int8 in groups of 32 (q4, q8, mxfp4) or to bf16 (fp8): by up to 1/254 of a group's
    largest number before each product, of which a position has some twenty in turn, and it attends to earlier ones that
    are off as well. The median over positions: where a random router is near a tie, another expert is chosen. Weights
    that were read wrongly give errors near 1."""
    quantised, model, folder = written
    exe = hetcomp.compile(quantised, context_length=CONTEXT, out=folder / "native.hetc")
    assert np.median(errors(model, exe)) < 0.1
