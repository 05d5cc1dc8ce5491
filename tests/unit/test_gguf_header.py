"""Headers of GGUF files: what gguf-py reads, and one sentence for whatever is damaged."""

from __future__ import annotations

import io
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import hetcomp
from hetcomp import frontend
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.header import parse_header, read_header
from hetcomp.frontend.gguf.model_files import open_model
from hetcomp.importance_from_text import importance_from_text
from tests.reference import gguf_models, tiny_models

DATA = 3 * 32 * 4 + 4 * 2 * 34


def write_small(path: Path, **options: Any) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe", **options)
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_float64("x.f64", 0.1)
    writer.add_int64("x.i64", -5)
    writer.add_bool("x.bool", True)
    writer.add_token_list(["a", "Ġb", "<|x|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    raw = gguf.quants.quantize(np.ones((4, 64), np.float32), Type.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "small.gguf")


def test_agrees_with_gguf_py(small):
    header, reader = read_header(small), gguf.GGUFReader(small)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.facts.keys() == facts.keys()
    for key, fact in header.facts.items():
        if isinstance(fact, float):
            assert np.float32(fact) == np.float32(facts[key])
        else:
            assert (fact.tolist() if isinstance(fact, np.ndarray) else fact) == facts[key]
    assert header.facts["qwen3moe.attention.layer_norm_rms_epsilon"] == 1e-6  # not its nearest float32 in float64
    tensors = {t.name: (t.tensor_type.name, tuple(t.shape)[::-1], t.data_offset, t.n_bytes) for t in reader.tensors}
    assert {n: (t.dtype, t.shape, t.offset, t.bytes) for n, t in header.tensors.items()} == tensors


def test_no_mutation_of_a_header_crashes(small):
    """100,000 headers with bytes changed, inserted, left out and cut off are read or refused in one sentence."""
    data = small.read_bytes()
    header, numbers = len(data) - DATA, random.Random(0)
    refused = 0
    for _ in range(100_000):
        damaged = bytearray(data)
        for _ in range(numbers.choice((1, 1, 2, 8))):
            mutate(damaged, header, numbers)
        try:
            parse_header(io.BytesIO(damaged), len(damaged), small)
        except HetcompError as error:
            refused += 1
            text = str(error)
            assert text.startswith(str(small)) and text.isprintable() and len(text) < 1000
    assert 50_000 < refused < 100_000


def test_no_mutation_of_a_model_crashes(tmp_path):
    """2,000 files of a model with headers damaged like that, up to its config and its class in transformers."""
    data = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe", num_hidden_layers=1)).read_bytes()
    header = min(t.offset for t in read_header(tmp_path / "m.gguf").tensors.values())
    path, numbers, refused = tmp_path / "damaged.gguf", random.Random(1), 0
    for _ in range(2000):
        damaged = bytearray(data[:header])
        for _ in range(numbers.choice((1, 1, 2, 8))):
            mutate(damaged, header, numbers)
        with path.open("wb") as file:
            file.write(damaged)
            file.truncate(len(damaged) + len(data) - header)  # weights, which nobody reads yet
        try:
            frontend.find(path)
        except HetcompError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000
    assert 1000 < refused < 2000


def mutate(data: bytearray, header: int, numbers: random.Random) -> None:
    at = numbers.randrange(header)
    kind = numbers.randrange(6)
    if kind == 0:
        data[at : at + 1] = numbers.randbytes(1)
    elif kind == 1 and at < len(data):
        data[at] ^= 1 << numbers.randrange(8)
    elif kind == 2:
        size = numbers.choice((4, 8))
        data[at : at + size] = (numbers.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 256**size).to_bytes(
            size, "little"
        )
    elif kind == 3:
        del data[at : at + numbers.randrange(1, 16)]
    elif kind == 4:
        data[at:at] = numbers.randbytes(numbers.randrange(1, 16))
    elif numbers.random() < 0.1:
        del data[at:]


def changed(small: Path, folder: Path, *changes: tuple[bytes, bytes]) -> Path:
    data = small.read_bytes()
    for old, new in changes:
        assert data.count(old) == 1
        data = data.replace(old, new)
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    return path


START = b"GGUF" + struct.pack("<IQQ", 3, 2, 9)
EMBEDDING = b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 3, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((START, b"GGUX" + START[4:]), "no GGUF file"),
        ((START, b"GGUF" + struct.pack(">I", 3) + START[8:]), "big-endian"),
        ((START, b"GGUF" + struct.pack("<IQQ", 1, 2, 9)), "version 1"),
        ((START, b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 9)), "cannot hold the 1152921504606846976 tensors"),
        ((START, b"GGUF" + struct.pack("<IQQ", 3, 2, 1 << 40)), "cannot hold the 1099511627776 facts"),
        ((b"general.architecture", b"qwen3moe.block_count"), "the key qwen3moe.block_count is there twice"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 1 << 50, 0, 0)), "is truncated"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 3, 0, 1 << 40)), "is truncated"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 3, 0, 4)), "offset 4"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 3, 0, 32)), "overlaps"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 32, 3, 99, 0)), "unknown type 99"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 2, 33, 3, 8, 0)), "whole Q8_0 blocks"),
        ((EMBEDDING, b"token_embd.weight" + struct.pack("<IQQIQ", 9, 32, 3, 0, 0)), "has 9 axes"),
        ((b"token_embd.weight", b"blk.0.\xff\xfen.weight"), "not UTF-8"),
        ((b"token_embd.weight", b"token\nembd.weight"), "not 1 to 255 printable"),
    ],
)  # fmt: skip
def test_damage_is_named(small, tmp_path, change, message):
    path = changed(small, tmp_path, change)
    with pytest.raises(HetcompError, match=message) as error:
        open_model(path)
    assert str(path) in str(error.value)


def test_duplicate_tensors_are_named(tmp_path):
    path = tmp_path / "twice.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", np.zeros(32, np.float32))
    writer.add_tensor("b.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes().replace(b"b.weight", b"a.weight"))
    with pytest.raises(HetcompError, match=r"the tensor a\.weight is there twice"):
        open_model(path)


def test_truncated_data_and_a_big_endian_file(small, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[:-40])
    with pytest.raises(HetcompError, match=r"truncated: tensor blk\.0\.attn_q\.weight ends at byte"):
        open_model(cut)
    with pytest.raises(HetcompError, match="truncated"):
        hetcomp.compile(cut, out=tmp_path / "m.hetc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf"]
    with pytest.raises(HetcompError, match="big-endian"):
        open_model(write_small(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG))


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("split")
    gguf_models.write(folder / "m.gguf", tiny_models.build("qwen3_moe"), split_max_tensors=15)
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files[1].unlink(), r"1 of the model's 3 files are missing, the first is m-00002-of-00003\.gguf"),
        (lambda files: shutil.copyfile(files[2], files[1]), r"says that it is file 2 \(from 0\)"),
        (lambda files: files[0].rename(files[0].with_name("other.gguf")), "its name must end in -00001-of-"),
    ],
)
def test_split_files_that_do_not_belong_together(split, tmp_path, change, message):
    files = [Path(shutil.copy(path, tmp_path)) for path in split]
    change(files)
    given = files[0] if files[0].exists() else tmp_path / "other.gguf"
    with pytest.raises(HetcompError, match=message):
        open_model(given)


# ---------------------------------------------------------------- models


def bound(path: Path) -> frontend.Imported:
    """The model as far as its tensors are checked."""
    return plan_model(path, hw_profile="preset:9950x-64gb", context_length=64, stop_after="bind_weights").imported


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            lambda w: w.add_architecture_("mamba"),
            "architecture 'mamba' is not read from GGUF files; known are",
        ),
        (lambda w: w.add_type("adapter"), "holds no model: its general.type is 'adapter'"),
        (lambda w: w.drop("qwen3moe.context_length"), "has no qwen3moe.context_length"),
        (lambda w: w.drop("qwen3moe.expert_used_count"), "has no qwen3moe.expert_used_count"),
        (lambda w: w.add_string("qwen3moe.block_count", "3"), "block_count is '3'; expected a whole number"),
        (lambda w: w.add_block_count(4), r"has no tensor model\.layers\.3\.input_layernorm\.weight"),
        (lambda w: w.add_head_count_kv(4), r"attn_k\.weight in m\.gguf has shape \[32, 64\].*expected \[64, 64\]"),
        (lambda w: w.add_expert_count(7), r"expected \[7, 64\]"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type is 'longrope'"),
        (lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID), "expert_gating_func is 2; expected 1"),
    ],
)
def test_what_a_model_lacks_is_named(tmp_path, monkeypatch, facts, message):
    monkeypatch.setattr(gguf.GGUFWriter, "drop", lambda self, key: self.kv_data[0].pop(key), raising=False)
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_architecture_",
        lambda self, name: self.add_string("general.architecture", name),
        raising=False,
    )
    with pytest.raises(HetcompError, match=message):
        bound(gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe"), facts=facts))


def test_types_that_are_not_read_are_named(tmp_path):
    def facts(writer):
        writer.add_tensor("blk.0.x", np.zeros((1, 18), np.uint8), raw_dtype=Type.IQ4_NL)

    path = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe"), facts=facts)
    assert bound(path).unused == ("blk.0.x",)
    name = b"blk.0.attn_output.weight"
    entry = name + struct.pack("<IQQI", 2, 64, 64, int(Type.F32))
    assert path.read_bytes().count(entry) == 1
    path.write_bytes(path.read_bytes().replace(entry, name + struct.pack("<IQQI", 2, 64, 64, int(Type.IQ4_NL))))
    with pytest.raises(
        HetcompError, match=r"blk\.0\.attn_output\.weight in m\.gguf has dtype IQ4_NL; expected F32, F16"
    ):
        bound(path)


def test_a_file_cut_while_it_is_read(tmp_path):
    path = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe"))
    imported = bound(path)
    value = next(v for v in imported.plan.values if v.fqn == "model.norm.weight")
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(HetcompError, match=r"truncated while it was read: tensor output_norm\.weight"):
        imported.checkpoint.read(value)


def test_what_needs_a_checkpoint_refuses_a_file(tmp_path):
    path = gguf_models.write(tmp_path / "m.gguf", tiny_models.build("qwen3_moe", num_hidden_layers=1))
    with pytest.raises(HetcompError, match=r"m\.gguf is a GGUF file, but importance runs the model in transformers"):
        importance_from_text(path, tmp_path / "text", tmp_path / "out")
    with pytest.raises(HetcompError, match="Adapters are not merged into GGUF and ONNX files"):
        hetcomp.compile(path, hw_profile="preset:9950x-64gb", adapters=[tmp_path], merge=True, out=tmp_path / "m.hetc")
    with pytest.raises(HetcompError, match=r"words has no tokenizer\.json"):
        hetcomp.compile(path, tokenizer=tmp_path / "words", out=tmp_path / "m.hetc")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
