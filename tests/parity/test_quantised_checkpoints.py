"""Quantised checkpoints, compiled, against transformers in float32 with the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import hetcomp
from hetcomp.ir.annotations import AdapterRoom
from tests.parity.test_gpu_families import BF16_TOLERANCE, compile_tiny
from tests.reference import quantised_checkpoints as made
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.tiny_models import token_ids
from tests.sampled_cases import rest
from tests.unit.test_quantised_checkpoints import AWQ, BLOCKS, FP8, SMALL, gptq, int_pack

pytestmark = pytest.mark.spread("written")
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


def loaded(twin: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


# Of the integers the others have all: tests/unit/test_quantised_checkpoints.py reads each bit for bit.
_MORE = ("compressed int8", "gptq")


@pytest.fixture(scope="module", params=[*(name for name in WRITTEN if name not in _MORE), *rest(_MORE)])
def written(request, tmp_path_factory) -> tuple[Path, torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    quantised, twin = WRITTEN[request.param](folder)
    return quantised, loaded(twin), folder


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "vram", "nodes", "bound"), [("gpu", 0, 1, 1e-4), ("split", 500_000, 2, 0.1)])
@pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param("fp8", "fp8", marks=pytest.mark.exhaustive), ("mxfp4", "mxfp4"), ("gptq, order", "q4")],
)
def test_on_a_gpu_and_cut_over_nodes(name, form, placement, vram, nodes, bound, tmp_path):
    """Decoding, the GPU multiplies in float32 with the codes' own numbers; the CPU's experts round activations. Parts
    on nodes and of a GPU are cut out of the codes; of columns in an order of their own nodes get whole experts."""
    quantised, twin = WRITTEN[name](tmp_path)
    (tmp_path / "hf").symlink_to(quantised)
    model = loaded(twin)
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(tmp_path, placement, vram, formats="auto", max_batch=1, nodes=nodes)
        assert {v.format for v in exe.plan.values if v.fqn and ".experts." in v.fqn and len(v.type.shape) == 3} == {
            form
        }
        whole = [p.experts for call in exe.plan.calls for _, p in call.placements if p.experts and not p.slices]
        assert any(run.device == "cpu:1" for runs in whole for run in runs) == (nodes == 2 and form == "q4")
        ids = token_ids(model, 6)
        with exe.runtime.session() as session:
            decoded = np.concatenate([exe.runtime.decode([session], [int(i)]) for i in ids[0]])
        exe.runtime.close()
    assert np.median(differences(model, ids, decoded)) < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "bits", "symmetric", "placement", "bound"),
    [("q4z", 4, False, "gpu", BF16_TOLERANCE), ("q8", 8, True, "split", 0.1)],
)
def test_an_adapter_beside_columns_in_an_order_of_their_own(form, bits, symmetric, placement, bound, tmp_path):
    """An adapter's pairs meet activations in the order of those. In a prompt a GPU rounds to bf16."""
    config = gptq(bits, sym=symmetric, desc_act=True)
    quantiser = made.gptq(bits, symmetric=symmetric, act_order=True)
    quantised, twin = made.write(tmp_path, "qwen3_moe", config, quantiser, **SMALL)
    (tmp_path / "hf").symlink_to(quantised)
    ids = token_ids(loaded(twin), 20)
    adapted = make_adapter(loaded(twin), tmp_path / "adapter", **everything("qwen3_moe"))
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(
            tmp_path, placement, 500_000 * (placement == "split"), "auto", adapter_room=AdapterRoom(1, 4)
        )
        assert {v.format for v in exe.plan.values if v.type.layout.endswith("act_order")} == {form}
        before = differences(loaded(twin), ids, exe(ids[0].tolist()))
        exe.load_adapter(tmp_path / "adapter")
        changed = exe(ids[0].tolist(), adapter="adapter")
        exe.runtime.close()
    assert np.median(before) < bound
    assert np.median(differences(adapted, ids, changed)) < bound
    assert np.median(differences(loaded(twin), ids, changed)) > 2 * bound  # the adapter matters


def errors(model: torch.nn.Module, exe: hetcomp.Executable) -> np.ndarray:
    """As :func:`differences`, of a prompt."""
    ids = token_ids(model, 33)
    return differences(model, ids, exe(ids[0].tolist()))


@torch.no_grad()
def differences(model: torch.nn.Module, ids: torch.Tensor, logits: np.ndarray) -> np.ndarray:
    """Of each position the largest error of a logit, relative to the largest logit."""
    want = model(input_ids=ids, use_cache=False).logits[0].numpy()
    return np.abs(logits - want).max(-1) / np.abs(want).max()


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
