"""Weights that stay in the files of a checkpoint: the runtime makes of their rows the bytes that compiling makes, hash
by hash, or refuses to load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

import hetcomp
from hetcomp.artifact.external_weights import ExternalWeights
from hetcomp.artifact.inspection import inspect_artifact
from hetcomp.errors import HetcompError
from hetcomp.export_onnx import export_onnx
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.plan_wishes import PlanWishes
from hetcomp.stored_rows import StoredRows, StoredScales, places, runs_of
from tests.reference import external_artifact, gguf_models, onnx_genai_models, quantised_checkpoints, tiny_models
from tests.unit.test_quantised_checkpoints import AWQ, BLOCKS, FP8, SMALL, gptq, int_pack

Make = Callable[[Path], Path]
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4, "num_hidden_layers": 2}


def q4_k_m(name: str) -> Type:
    """As llama.cpp mixes types, and Q5_0 and Q5_K."""
    if "attn_output" in name:
        return Type.Q5_K
    if "ffn_down" in name or "attn_v" in name:
        return Type.Q6_K if "blk.0" in name else Type.Q5_0
    return Type.Q8_0 if "token_embd" in name else Type.Q4_K


def gguf_file(family: str, kind: Type | Callable[[str], Type], **options: Any) -> Make:
    choose = kind if callable(kind) else lambda name: kind
    return lambda folder: gguf_models.write(folder / "m.gguf", tiny_models.build(family, **options), choose)


def folder_of(family: str, dtype: torch.dtype, **options: Any) -> Make:
    def make(folder: Path) -> Path:
        tiny_models.build(family, **options).to(dtype).save_pretrained(folder / "hf")
        return folder / "hf"

    return make


def quantised(*args: Any, **options: Any) -> Make:
    return lambda folder: quantised_checkpoints.write(folder, *args, **options)[0]


def genai(**choices: Any) -> Make:
    """With scales in fp16, as in files for GPUs, and weights beside the graph."""

    def make(folder: Path) -> Path:
        model = tiny_models.build("qwen3_moe", moe_intermediate_size=64)
        path = onnx_genai_models.write(folder / "m.onnx", model, **choices)
        graph = onnx.load(path)
        for tensor in graph.graph.initializer:
            if tensor.name.endswith("scales"):
                halves = onnx.numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(onnx.numpy_helper.from_array(halves, tensor.name))
        onnx.save(graph, path, save_as_external_data=True, location="m.data", size_threshold=0)
        return path

    return make


def exported(folder: Path) -> Path:
    return export_onnx(folder_of("qwen3_moe", torch.bfloat16)(folder), folder / "m.onnx")


CASES: dict[str, tuple[Make, dict[str, Any], set[str], set[str]]] = {
    # what, options, formats of matrices, and the reasons why weights are packed besides constants
    "Q4_0, rows of llama's heads": (gguf_file("mixtral", Type.Q4_0), {}, {"q4"}, set()),
    "Q8_0": (
        gguf_file("qwen2_moe", Type.Q8_0, moe_intermediate_size=64, shared_expert_intermediate_size=64),
        {},
        {"q8"},
        set(),
    ),
    "Q4_K_M over nodes": (gguf_file("qwen3_moe", q4_k_m, **WIDE), {"nodes": 2}, {"q4k", "q5k", "q6k", "q8"}, set()),
    "MXFP4 over nodes, biases": (gguf_file("gpt_oss", Type.MXFP4), {"nodes": 2}, {"mxfp4"}, {"zeros"}),
    "F16 as f32": (gguf_file("deepseek_v3", Type.F16), {"formats": "f32"}, set(), set()),
    "BF16, interleaved gate and up": (gguf_file("gpt_oss", Type.BF16), {"formats": "bf16"}, {"bf16"}, set()),
    "bf16 safetensors": (folder_of("deepseek_v3", torch.bfloat16), {}, {"bf16"}, {"their transpose is stored"}),
    "f32 safetensors of odd sizes as bf16": (
        folder_of("qwen3_moe", torch.float32, odd=True),
        {"formats": "bf16"},
        {"bf16"},
        set(),
    ),
    "FP8": (quantised("qwen3_moe", FP8, quantised_checkpoints.fp8(), **BLOCKS), {}, {"fp8"}, set()),
    "MXFP4 safetensors": (lambda folder: quantised_checkpoints.write_gpt_oss(folder)[0], {}, {"mxfp4"}, set()),
    "compressed int4": (
        quantised(
            "qwen2_moe",
            int_pack(4, 32),
            quantised_checkpoints.packed_quantized(),
            **(SMALL | {"shared_expert_intermediate_size": 64}),
        ),
        {},
        {"q4"},
        set(),
    ),
    "GPTQ, words of columns, over nodes": (
        quantised("qwen3_moe", gptq(), quantised_checkpoints.gptq(), **SMALL),
        {"nodes": 2},
        {"q4"},
        set(),
    ),
    "ONNX, 4 bits, over nodes": (
        genai(bits=4, quantised_embedding=True),
        {"nodes": 2},
        {"q4"},
        {"converted from ONNX int4, blocks of 32 to f32"},
    ),
    "ONNX, 8 bits, gate and up apart": (
        genai(bits=8, apart=True),
        {},
        {"q8"},
        {"converted from ONNX int8, blocks of 32 to f32"},  # the router
    ),
    "ONNX, zero points": (
        genai(bits=4, zeros=True),
        {"formats": {"embedding": "f32"}},
        {"q4z"},
        {
            "zero points lie apart from the codes of ONNX int4, blocks of 32, zero points",
            "converted from ONNX int4, blocks of 32, zero points to f32",
        },
    ),
    "ONNX, exported": (exported, {}, {"bf16"}, set()),
    "AWQ": (
        quantised("llama", AWQ, quantised_checkpoints.awq(), intermediate_size=96),
        {},
        {"q4z"},
        {"zero points lie apart from the codes of AWQ int4, groups of 32, zero points"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_made_at_load_is_what_compiling_makes(name, tmp_path):
    make, options, formats, reasons = CASES[name]
    plan, external = external_artifact.write(tmp_path / "a", make(tmp_path), **options)
    assert {v.format for v in plan.values} - {"f32", None} == formats
    assert set(external.packed) - {"computed when compiling"} == reasons
    for weights in ("ram", "mmap"):
        external_artifact.load(tmp_path / "a", weights)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an artifact, with the file that it refers to."""
    folder = tmp_path_factory.mktemp("external")
    model = tiny_models.build("qwen3_moe", moe_intermediate_size=64)
    facts = lambda writer: writer.add_custom_alignment(64)  # noqa: E731
    gguf_models.write(folder / "m.gguf", model, lambda name: Type.Q8_0, facts)
    external_artifact.write(folder / "a", folder / "m.gguf")
    return folder


def test_a_byte_of_any_tensor_that_changed_is_found(small):
    file = small / "m.gguf"
    manifest = json.loads((small / "a" / "fake.hetc" / "manifest.json").read_text())
    whole = file.read_bytes()
    rng = np.random.default_rng(3)
    for weight in rng.choice(manifest["weights"], 5, replace=False):
        _, offset, _, _ = weight["stored"]["matrices"][-1][-1]
        changed = bytearray(whole)
        changed[offset + 1] ^= 0x10
        file.write_bytes(changed)
        with pytest.raises(HetcompError, match=r"in .*m\.gguf is not what it was when the model was compiled"):
            external_artifact.load(small / "a", verify=False)  # its time says that it must be looked at
    file.write_bytes(whole)
    external_artifact.load(small / "a", verify=False)


def test_a_file_that_was_cut_or_is_gone_is_named(small):
    file = small / "m.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(HetcompError, match=rf"m\.gguf has {len(whole) - 1} bytes, and had {len(whole)}"):
        external_artifact.load(small / "a")
    assert inspect_artifact(small / "a" / "fake.hetc").sources[0].state == f"of {len(whole) - 1} bytes now"
    file.unlink()
    with pytest.raises(HetcompError, match=r"m\.gguf, which cannot be read .*--weights packed"):
        external_artifact.load(small / "a")
    assert inspect_artifact(small / "a" / "fake.hetc").sources[0].state == "missing"
    file.write_bytes(whole)
    assert inspect_artifact(small / "a" / "fake.hetc").sources[0].state == "touched since"


def test_norms_are_mapped_where_they_lie(small):
    os.utime(small / "m.gguf", (1, 1))
    found = inspect_artifact(small / "a" / "fake.hetc")
    manifest = json.loads((small / "a" / "fake.hetc" / "manifest.json").read_text())
    norms = [w for w in manifest["weights"] if "norm" in w["name"] and w["bytes"] == 4 * w["stored"]["rows"]]
    at_lines = [w for w in norms if w["stored"]["matrices"][0][0][1] % 64 == 0]
    assert found.mapped == sum(w["bytes"] for w in at_lines) > 0
    assert (found.packed, found.repacked) == (0, sum(w["bytes"] for w in manifest["weights"]) - found.mapped)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1 << 40), st.integers(1, 20), st.integers(0, 1000)), min_size=1
    )
)
def test_runs_are_the_rows_in_order(runs):
    rows = np.concatenate([places(file, offset, stride, (count,)) for file, offset, count, stride in runs])
    found = list(runs_of(rows))
    again = [places(file, offset, stride, (count,)) for file, offset, count, stride in found]
    np.testing.assert_array_equal(np.concatenate(again), rows)
    assert len(found) <= len(runs) * 2


def test_columns_are_cut_between_blocks_and_groups():
    rows = StoredRows("Q4_0", (Path("/m"),), places(0, 1000, 72, (4, 1)), 128)
    cut = rows.cut(-1, ((32, 96),))
    assert cut is not None
    assert (cut.columns, cut.places[0, 0], cut.row_bytes) == (64, 1018, 36)
    assert rows.cut(-1, ((16, 128),)) is None
    assert rows.cut(-1, ((0, 32), (64, 96))) is None
    scales = StoredScales("BF16", 64, places(0, 0, 4, (4, 1)))
    apart = StoredRows("codes", (Path("/m"),), places(0, 1000, 128, (4, 1)), 128, scales)
    cut = apart.cut(-1, ((64, 128),))
    assert cut is not None
    assert cut.scales is not None
    assert (cut.places[1, 0], cut.scales.places[1, 0]) == (1192, 6)
    assert apart.cut(-1, ((32, 128),)) is None


def test_merged_weights_are_packed():
    rows = StoredRows("F32", (Path("/m"),), places(0, 64, 128, (16, 1)), 32)
    reader = SimpleNamespace(stored_rows=lambda value, by_number: rows)
    value = Value("w", TensorType(DType.F32, (16, 32), "panels16"), ValueKind.WEIGHT, "m.w", format="f32")
    external = ExternalWeights(reader, {}, frozenset({"m.w"}))
    assert external.stored(value) is None
    assert external.packed == {"merged with an adapter": 16 * 32 * 4}
    assert external.sources() == []


def test_wishes_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(HetcompError, match="--from-disk needs --weights packed"):
        hetcomp.compile(tmp_path, weights="external", wishes=PlanWishes(from_disk=True))
    with pytest.raises(HetcompError, match="'outside'; choose packed or external"):
        hetcomp.compile(tmp_path, weights="outside")
    with pytest.raises(HetcompError, match=r"MixtralForCausalLM in memory is no file .* would save nothing"):
        hetcomp.compile(tiny_models.build("mixtral"), weights="external", formats="f32", out=tmp_path / "m.hetc")
    assert not (tmp_path / "m.hetc").exists()
