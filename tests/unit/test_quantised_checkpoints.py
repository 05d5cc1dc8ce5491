"""Quantised safetensors: packed weights are bit for bit the reference's numbers, or off by what the plan says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hetcomp import frontend
from hetcomp.backends import packing
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.cli.plan_weights import weight_classes
from hetcomp.compiler import plan_model
from hetcomp.frontend.quantisation_config import parse_quantisation
from hetcomp.ir.plan import ValueKind
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.planned import Planned
from tests.reference import quantised_checkpoints as made
from tests.reference.plan_builder import profile

# Sizes that are no multiples of 128, and experts whose two halves end within a block.
SMALL = {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 96, "head_dim": 32}
BLOCKS = {"hidden_size": 256, "moe_intermediate_size": 160, "intermediate_size": 192, "head_dim": 64}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": ["gate"]}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    ignore = ["lm_head", "re:.*mlp.gate$"]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def gptq(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, **more}


def int_pack(bits: int, group: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return compressed("pack-quantized", num_bits=bits, type="int", **strategy, symmetric=symmetric, **more)


def planned(folder: Path, formats: str | Mapping[str, str] = "auto") -> Planned:
    return plan_model(folder, hw_profile=profile(), context_length=64, formats=formats)


def differences(quantised: Planned, twin: Path) -> dict[str, list[float]]:
    """By format: relative RMS distances of the packed matrices of quantised weights from the twin's numbers."""
    values = [
        v for v in quantised.plan.values if v.kind is ValueKind.WEIGHT and v.source and v.source.tensors[0].quantised
    ]
    checkpoint = quantised.imported.checkpoint
    assert checkpoint is not None
    packer = WeightPacker(checkpoint)
    chunks: dict[str, list[np.ndarray]] = {}
    for value, chunk in packer.chunks(values):
        chunks.setdefault(value.id, []).append(chunk)
    assert not packer.not_finite
    assert not packer.rounded
    floats = frontend.load(twin, context_length=64, max_batch=1, max_tokens=32, max_logit_rows=8)
    assert floats.checkpoint is not None
    known, out = floats.plan.value_map(), {}
    for value in values:
        got = packing.unpack(np.concatenate(chunks[value.id]), value)
        want = packing.to_f32(floats.checkpoint.read(known[value.id]))
        assert want.any()
        out.setdefault(str(value.format), []).append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return out


def rewrite(folder: Path, change: Callable[[made.Tensors], made.Tensors], **config: Any) -> None:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(raw))


MLA = {
    "hidden_size": 256,
    "moe_intermediate_size": 160,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
EXACT: dict[str, tuple[str, str, Mapping[str, Any], made.Quantiser, Mapping[str, Any]]] = {
    "fp8": ("fp8", "qwen3_moe", FP8, made.fp8(), BLOCKS),
    "fp8, bf16 scales": ("fp8", "qwen3_moe", FP8, made.fp8(dtype=torch.bfloat16), BLOCKS),
    "fp8, absorbed attention": ("fp8", "deepseek_v3", FP8, made.fp8(), MLA),
    "fp8, a tensor": ("fp8", "qwen3_moe", {"quant_method": "fp8"}, made.fp8(None, flat=True), SMALL),
    "compressed fp8, a tensor": (
        "fp8",
        "qwen3_moe",
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        made.fp8(None, torch.bfloat16, "weight_scale", True),
        SMALL,
    ),
    "compressed fp8, blocks": (
        "fp8",
        "qwen3_moe",
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        made.fp8(scale_name="weight_scale"),
        BLOCKS,
    ),
    "compressed int4": ("q4", "qwen3_moe", int_pack(4, 32), made.packed_quantized(4, 32), SMALL),
    "compressed int4, a row": ("q4", "mixtral", int_pack(4, 0), made.packed_quantized(4, 0), {}),
    "compressed int4, zero points": (
        "q4z",
        "qwen3_moe",
        int_pack(4, 32, False),
        made.packed_quantized(4, 32, False),
        SMALL,
    ),
    "compressed int8, packed": ("q8", "qwen3_moe", int_pack(8, 32), made.packed_quantized(8, 32), SMALL),
    "compressed int8": (
        "q8",
        "qwen3_moe",
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        made.int8(),
        SMALL,
    ),
    "compressed int8, a tensor": (
        "q8",
        "llama",
        compressed("int-quantized", num_bits=8, type="int", strategy="tensor"),
        made.int8(whole=True),
        {},
    ),
    "compressed mxfp4": (
        "mxfp4",
        "qwen3_moe",
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        made.mxfp4_packed,
        SMALL,
    ),
    "gptq": ("q4", "qwen3_moe", gptq(), made.gptq(), SMALL),
    "gptq, groups of 64": ("q4", "llama", gptq(group=64), made.gptq(group=64), {"intermediate_size": 128}),
    "gptq, a row, order": ("q4", "qwen3_moe", gptq(group=-1, desc_act=True), made.gptq(group=0, act_order=True), SMALL),
    "gptq, order": ("q4", "qwen3_moe", gptq(desc_act=True), made.gptq(act_order=True), SMALL),
    "gptq, order, zero points": (
        "q4z",
        "qwen3_moe",
        gptq(group=64, sym=False, desc_act=True),
        made.gptq(group=64, symmetric=False, act_order=True),
        SMALL | {"moe_intermediate_size": 128},
    ),
    "gptq, order, 8 bits": ("q8", "llama", gptq(8, desc_act=True), made.gptq(8, act_order=True), {}),
    "gptq, order of runs": ("q4", "llama", gptq(desc_act=True), made.gptq(), {}),
    "compressed int4, order": (
        "q4",
        "qwen3_moe",
        int_pack(4, 32, actorder="group"),
        made.packed_quantized(4, 32, act_order=True),
        SMALL,
    ),
    "gptq, zero points": ("q4z", "qwen3_moe", gptq(sym=False), made.gptq(symmetric=False), SMALL),
    "gptq v2": (
        "q4z",
        "qwen3_moe",
        gptq(sym=False, checkpoint_format="gptq_v2"),
        made.gptq(symmetric=False, version=2),
        SMALL,
    ),
    "gptq, 8 bits": ("q8", "qwen3_moe", gptq(8), made.gptq(8), SMALL),
    "awq": ("q4z", "qwen3_moe", AWQ, made.awq(), SMALL),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_a_format_holds_is_taken_over_bit_for_bit(case, tmp_path):
    form, family, config, quantiser, sizes = EXACT[case]
    quantised, twin = made.write(tmp_path, family, config, quantiser, **sizes)
    plan = planned(quantised)
    found = differences(plan, twin)
    assert set(found) == {form}
    assert not any(found[form])
    assert not any("converted" in note for note in plan.plan.notes)
    assert plan.imported.unused == ()
    assert from_json(to_json(plan.plan)) == plan.plan


@pytest.mark.parametrize("intermediate", [64, 96])
def test_gpt_oss_experts_are_taken_over_bit_for_bit(intermediate, tmp_path):
    quantised, twin = made.write_gpt_oss(tmp_path, intermediate_size=intermediate)
    plan = planned(quantised)
    found = differences(plan, twin)
    assert set(found) == {"mxfp4"}
    assert not any(found["mxfp4"])
    # Gate and up come in alternate rows, and were put apart.
    assert any(v.view is not None and v.view.deinterleave for v in plan.plan.values)


def test_fp8_experts_in_one_tensor_are_those_in_many(tmp_path):
    """Blocks count from the first row of gate: those of up stay whole if gate ends with one."""
    sizes = BLOCKS | {"moe_intermediate_size": 128}
    quantised, twin = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **sizes)
    rewrite(quantised, made.with_fused_experts)
    plan = planned(quantised)
    found = differences(plan, twin)
    assert set(found) == {"fp8"}
    assert not any(found["fp8"])
    assert plan.imported.unused == ()


CONVERTED: dict[str, tuple[str, Mapping[str, Any], made.Quantiser, float]] = {
    # q8's step is 1/127 of a group's largest number: an RMS error of 1/127 * 2.2 / sqrt(12) for normal numbers.
    "fp8, a row": (
        "do not share a scale",
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        made.fp8((1, 10**6), torch.bfloat16, "weight_scale"),
        7e-3,
    ),
    "gptq, order, groups of 16": ("no runs", gptq(group=16, desc_act=True), made.gptq(group=16, act_order=True), 7e-3),
    "gptq, 8 bits, zero points": ("need 9", gptq(8, sym=False), made.gptq(8, symmetric=False), 7e-3),
    # Rounding a scale to fp16: at most 2^-11 of it.
    "int8, f32 scales": (
        "fp16",
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        made.int8(torch.float32),
        2**-11,
    ),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_what_no_format_holds_goes_into_q8_and_the_plan_says_at_what_cost(case, tmp_path):
    why, config, quantiser, bound = CONVERTED[case]
    quantised, twin = made.write(tmp_path, "qwen3_moe", config, quantiser, **SMALL)
    plan = planned(quantised)
    found = differences(plan, twin)
    assert set(found) == {"q8"}
    assert 0 < max(found["q8"]) < bound
    notes = [note for note in plan.plan.notes if "converted to q8" in note]
    assert {note.split()[1] for note in notes} == {"attention", "experts"}
    for note in notes:
        assert why in note
        measured = float(note.split("is ")[-1].split()[0])
        assert max(found["q8"]) / 3 < measured < max(found["q8"]) * 3


def test_gate_and_up_in_different_orders_of_columns_become_q8(tmp_path):
    """They are one matrix here, which has one order; every other matrix keeps its own."""
    each = made.gptq(act_order=True, seed=lambda weight: int(weight.abs().sum() * 1e6))
    quantised, twin = made.write(tmp_path, "qwen3_moe", gptq(desc_act=True), each, **SMALL)
    plan = planned(quantised)
    found = differences(plan, twin)
    assert 0 < max(found["q8"]) < 7e-3
    assert not any(found["q4"])
    forms = {v.fqn: (v.format, v.type.layout) for v in plan.plan.values if v.kind is ValueKind.WEIGHT}
    assert forms["model.layers.0.mlp.experts.gate_up_proj"] == ("q8", "panels16_glu")
    assert forms["model.layers.0.mlp.experts.down_proj"] == ("q4", "panels16_act_order")
    (note,) = [note for note in plan.plan.notes if "converted" in note]
    assert "several orders" in note


@pytest.mark.parametrize(("scattered", "layout"), [(True, "panels16_act_order"), (False, "panels16")])
def test_an_order_of_columns_is_in_the_plan_only_where_groups_are_scattered(scattered, layout, tmp_path):
    """Whatever the config says: what it leaves open, the groups of the columns answer. In formats other than the
    checkpoint's there is none."""
    quantised, twin = made.write(tmp_path, "llama", gptq(desc_act=True), made.gptq(act_order=scattered))
    for formats, expected in (("auto", layout), ("q8", "panels16"), ("f32", "panels16")):
        plan = planned(quantised, formats)
        weight = plan.plan.value_map()["model.layers.0.mlp.down_proj.weight"]
        assert weight.type.layout == expected
        assert (layout in print_plan(plan.plan)) == (layout == expected)
    assert not any(differences(plan, twin)["f32"])


def test_a_layer_with_scattered_groups_shares_no_code_with_others(tmp_path):
    quantised, _ = made.write(tmp_path, "llama", gptq(desc_act=True), made.gptq())
    scattered = "model.layers.0.self_attn.q_proj.g_idx"
    rewrite(quantised, lambda tensors: tensors | {scattered: tensors[scattered].flip(0)})
    plan = planned(quantised).plan
    layouts = [plan.value_map()[f"model.layers.{i}.self_attn.q_proj.weight"].type.layout for i in (0, 1)]
    assert layouts == ["panels16_act_order", "panels16"]
    assert len({call.template for call in plan.calls if call.layer is not None}) == 2


def test_another_format_only_where_asked_for_and_with_a_note(tmp_path):
    quantised, twin = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    plan = planned(quantised, {"experts": "q4"})
    found = differences(plan, twin)
    assert set(found) == {"q4", "fp8"}
    assert not any(found["fp8"])
    (note,) = [note for note in plan.plan.notes if "converted to q4" in note]
    assert "experts" in note
    assert "FP8, blocks of 128 x 128" in note
    exact = planned(quantised, "f32")
    assert not any(differences(exact, twin)["f32"])
    assert all("is exact" in note for note in exact.plan.notes if "converted" in note)


def test_the_report_names_what_weights_are_stored_and_computed_in(tmp_path):
    quantised, _ = made.write(tmp_path, "qwen3_moe", AWQ, made.awq(), **SMALL)
    classes = {one.role: one for one in weight_classes(planned(quantised).plan)}
    experts = classes["experts"]
    assert (experts.source, experts.format, experts.exact) == ("AWQ int4, groups of 32, zero points", "q4z", True)
    assert experts.source_bits == 4 + (16 + 4) / 32
    assert experts.bits == pytest.approx(4.75, rel=0.02)  # panels are whole cache lines
    assert (classes["embedding"].source, classes["embedding"].format) == ("F32", "f32")
    requantised = {one.role: one for one in weight_classes(planned(quantised, {"experts": "q4"}).plan)}
    assert not requantised["experts"].exact


def test_short_memory_takes_no_larger_format_than_the_checkpoints(tmp_path):
    """Where memory is short, auto goes from the checkpoint's formats to coarser ones: FP8 does not become q8."""
    quantised, _ = made.write(tmp_path, "qwen3_moe", FP8, made.fp8(), **BLOCKS)
    sizes = {}
    for memory in (1 << 30, 7 << 20):
        plan = plan_model(quantised, hw_profile=profile(memory=memory), context_length=32).plan
        sizes[memory] = {v.format for v in plan.values if v.kind is ValueKind.WEIGHT and ".experts." in v.id}
    assert sizes[1 << 30] == {"fp8"}
    assert sizes[7 << 20] <= {"fp8", "q4"}


def test_modules_that_stay_float_do(tmp_path):
    """Of layer 0 the attention is excluded: it shares no code with the others, and is read as it is."""
    chosen: Callable[[str], bool] = lambda name: name.endswith("_proj.weight") and "layers.0.self_attn" not in name  # noqa: E731
    config = gptq(modules_to_not_convert=["model.layers.0.self_attn.q_proj"])
    quantised, _ = made.write(tmp_path, "qwen3_moe", config, made.gptq(), chosen, **SMALL)
    plan = planned(quantised).plan
    forms = {v.id: v.format for v in plan.values if v.kind is ValueKind.WEIGHT}
    assert forms["model.layers.0.self_attn.q_proj.weight"] == "f32"
    assert forms["model.layers.1.self_attn.q_proj.weight"] == "q4"
    assert forms["model.layers.0.mlp.experts.down_proj"] == "q4"
    assert len({call.template for call in plan.calls if call.layer is not None}) == 2


def test_spellings_of_configs():
    """GPTQModel's exceptions, both spellings of compressed-tensors' blocks, orders that leave groups as they are."""
    excluding = gptq(dynamic={"-:.*mlp\\.gate$": {}})
    found = parse_quantisation({"quantization_config": excluding}, "here")
    assert found is not None
    assert found.excludes("model.layers.3.mlp.gate")
    assert not found.excludes("model.layers.3.mlp.gate_proj")
    block = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure="128x64")
    found = parse_quantisation({"quantization_config": block}, "here")
    assert found is not None
    stored = found.stored("model.layers.0.self_attn.q_proj")
    assert stored is not None
    assert stored.block == (128, 64)
    for order, scattered in (("group", True), ("dynamic", True), ("weight", False), ("static", False), (None, False)):
        config = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder=order)
        found = parse_quantisation({"quantization_config": config}, "here")
        assert found is not None
        stored = found.stored("m")
        assert stored is not None
        assert stored.act_order == scattered


def test_groups_of_a_config_are_told_apart_by_module():
    """A name or pattern goes before a class."""
    config = compressed("pack-quantized", num_bits=4, type="int", strategy="channel")
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["re:.*self_attn.*", "lm_head"], "weights": eight, "format": "float-quantized"}
    config["config_groups"]["group_1"] = group
    found = parse_quantisation({"quantization_config": config}, "here")
    assert found is not None
    kinds = {name: found.stored(name) for name in ("layers.0.self_attn.q_proj", "lm_head", "layers.0.mlp.up_proj")}
    assert [stored.kind for stored in kinds.values() if stored] == [
        "float-quantized",
        "float-quantized",
        "pack-quantized",
    ]
