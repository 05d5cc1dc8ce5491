"""Checkpoints: recipes, reading, both on-disk layouts, damaged files."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.folder_checkpoint import FolderCheckpoint
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.ir.plan import ValueKind
from hetcomp.ir.types import DType
from tests.reference import tiny_models
from tests.sampled_cases import rest

BOUNDS = {"context_length": 64, "max_batch": 1, "max_tokens": 8, "max_logit_rows": 8}


def load(model):
    return frontend.load(model, **BOUNDS)


def weights(imported):
    return [v for v in imported.plan.values if v.kind is ValueKind.WEIGHT]


@pytest.fixture
def folder(tmp_path):
    tiny_models.save_tiny("qwen3_moe", tmp_path / "tiny", max_shard_size="100KB")
    return tmp_path / "tiny"


def rewrite(folder, change):
    """Applies ``change`` to all tensors and writes them back as one model.safetensors."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", [*tiny_models.EACH_OP, *rest(tiny_models.OTHERS)])
def test_a_saved_folder_gives_the_numbers_of_the_module(name, tmp_path):
    model = tiny_models.save_tiny(name, tmp_path, odd=True)
    on_disk, in_memory = load(tmp_path), load(model)
    assert on_disk.unused == ()
    pairs = list(zip(weights(on_disk), weights(in_memory), strict=True))
    assert len(pairs) > 10
    for value, twin in pairs:
        got = on_disk.checkpoint.read(value)
        assert got.shape == tuple(value.type.shape)
        np.testing.assert_array_equal(got, in_memory.checkpoint.read(twin))


def test_experts_are_found_in_both_layouts(folder):
    """save_pretrained writes one tensor an expert; transformers 5 models may also be stored stacked."""
    split = load(folder)
    recipes = {split.checkpoint.source(v).recipe for v in weights(split)}
    assert recipes == {"plain", "stack", "stack_pair"}
    before = {v.id: split.checkpoint.read(v) for v in weights(split)}
    state = tiny_models.build("qwen3_moe").state_dict()
    state.pop("lm_head.weight")
    rewrite(folder, lambda _: state)
    stacked = load(folder)
    assert {stacked.checkpoint.source(v).recipe for v in weights(stacked)} == {"plain"}
    for value in weights(stacked):
        np.testing.assert_array_equal(stacked.checkpoint.read(value), before[value.id])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_one_expert_is_the_slice_of_the_whole(name, tmp_path):
    model = tiny_models.save_tiny(name, tmp_path, odd=True)
    for source in (tmp_path, model):
        imported = load(source)
        experts = [v for v in weights(imported) if ".experts." in v.id and len(v.type.shape) == 3]
        assert experts
        for value in experts:
            whole = imported.checkpoint.read(value)
            for expert in range(len(whole)):
                np.testing.assert_array_equal(imported.checkpoint.read_expert(value, expert), whole[expert])


def test_bf16_comes_as_bits_and_f16_as_f16(folder):
    def halve(tensors):
        types = {"norm": torch.float16}
        return {k: v.to(types["norm"] if "norm" in k else torch.bfloat16) for k, v in tensors.items()}

    rewrite(folder, halve)
    imported = load(folder)
    tensors = load_file(folder / "model.safetensors")
    for value in weights(imported):
        got = imported.checkpoint.read(value)
        assert got.dtype == (np.float16 if "norm" in value.id else np.uint16)
        assert value.type.dtype is DType.F32
    embed = imported.checkpoint.read(imported.plan.value_map()["model.embed_tokens.weight"])
    np.testing.assert_array_equal(embed, tensors["model.embed_tokens.weight"].view(torch.uint16).numpy())


def test_names_without_the_base_prefix_are_found(folder):
    rewrite(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    imported = load(folder)
    assert imported.unused == ()
    assert imported.checkpoint.read(weights(imported)[0]).shape == (256, 64)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_in_a_model_that_takes_images_are_found(folder, prefix):
    """Of families for which transformers has no rule of its own."""
    rewrite(folder, lambda t: {k.replace("model.", prefix, 1): v for k, v in t.items()})
    imported = load(folder)
    assert imported.unused == ()
    assert all(imported.checkpoint.source(value).tensors[0].name.startswith(prefix) for value in weights(imported))


def test_a_tied_head_may_be_stored_under_its_own_name(folder):
    rewrite(folder, lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()})
    imported = load(folder)
    value = imported.plan.value_map()["model.embed_tokens.weight"]
    assert imported.checkpoint.source(value).tensors[0].name == "lm_head.weight"


def test_unused_tensors_are_listed(folder):
    extra = {"model.layers.9.mtp.weight": torch.zeros(3), "model.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(folder, lambda t: t | extra)
    assert load(folder).unused == ("model.layers.9.mtp.weight",)


def refused(model, *words: str):
    with pytest.raises(HetcompError) as caught:
        imported = load(model)
        for value in weights(imported):
            imported.checkpoint.source(value)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_missing_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    refused(folder, shard.name, "truncated")


def test_missing_tensor(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != name})
    refused(folder, name, "[32, 64]")


def test_missing_expert(folder):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != name})
    refused(folder, "model.layers.1.mlp.experts.gate_up_proj", "15 tensors")


def test_wrong_number_of_experts(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".experts.7." not in k})
    refused(folder, "[7, 64, 64]", "[8, 64, 64]")


def test_wrong_shape(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda t: t | {name: torch.zeros(32, 63)})
    refused(folder, name, "[32, 63]", "[32, 64]", "model.safetensors")


def test_one_expert_of_another_shape(folder):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(folder, lambda t: t | {name: torch.zeros(31, 64)})
    refused(folder, name, "[31, 64]")


def test_unusable_dtype(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda t: t | {name: torch.zeros(32, 64, dtype=torch.float8_e4m3fn)})
    refused(folder, name, "F8_E4M3", "BF16")


def test_index_that_names_what_is_not_there(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    refused(folder, "model.ghost")
    content["weight_map"]["model.ghost"] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    refused(folder, "../outside.safetensors")
    index.write_text("{")
    refused(folder, index.name)


def test_weights_in_another_format_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "pytorch_model.bin", "safetensors")


def test_config_without_weights_has_no_checkpoint(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert load(folder).checkpoint is None


def header(path, entries, data=b"", length=None):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


DAMAGED = {
    "empty": (b"", b"", 0, "JSON"),
    "longer than the file": ({}, b"", 1 << 40, "truncated"),
    "no json": (b"{x", b"", None, "JSON"),
    "not an object": (b"[1]", b"", None, "object"),
    "entry without fields": ({"a": 3}, b"", None, "a"),
    "unknown dtype": ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, b"1234", None, "Q9"),
    "negative shape": (
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        b"1234",
        None,
        "shape",
    ),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234", None, "off"),
    "too few bytes": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        b"1234",
        None,
        "8 bytes",
    ),
    "behind the end": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        b"1234",
        None,
        "truncated",
    ),
    "overlap": (
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        },
        b"123456",
        None,
        "overlaps",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_refused(case, tmp_path):
    entries, data, length, word = DAMAGED[case]
    path = header(tmp_path / "m.safetensors", entries, data, length)
    with pytest.raises(HetcompError, match=word) as caught:
        read_header(path)
    assert "m.safetensors" in str(caught.value)


def test_headers_agree_with_safetensors(folder):
    for path in folder.glob("*.safetensors"):
        ours = read_header(path)
        raw = path.read_bytes()
        with safe_open(path, framework="pt") as theirs:
            assert set(ours) == set(theirs.keys())
            for name, tensor in ours.items():
                want = theirs.get_tensor(name)
                got = np.frombuffer(raw, np.float32, count=want.numel(), offset=tensor.offset)
                np.testing.assert_array_equal(got.reshape(tensor.shape), want.numpy())


def test_a_file_that_shrinks_between_header_and_reading(folder):
    imported = load(folder)
    value = next(v for v in weights(imported) if "lm_head" in v.id or "embed" in v.id)
    file = folder / imported.checkpoint.source(value).tensors[0].file
    shutil.copy(file, folder / "copy")
    with file.open("r+b") as handle:
        handle.truncate(64)
    with pytest.raises(HetcompError, match="truncated"):
        imported.checkpoint.read(value)


def test_several_files_without_an_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(HetcompError, match="index"):
        FolderCheckpoint(folder, [], "qwen3_moe")
