"""Large matrices are packed in pieces of rows, out of all formats of files: the same bytes, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from hetcomp import row_pieces
from hetcomp.backends import packing
from hetcomp.backends.cut_weights import CutReader
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.build_artifact import all_cuts
from hetcomp.conversion_error import conversion_notes
from hetcomp.ir.node_parts import Cut, cut_value
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.planned import Planned
from hetcomp.quantised_numbers import QuantisedNumbers
from tests.reference import gguf_models, onnx_genai_models, tiny_models
from tests.reference import quantised_checkpoints as made
from tests.unit.test_quantised_checkpoints import AWQ, FP8, gptq, int_pack, planned

# Halves of experts and dense layers of more than 128 rows, whole blocks of 256 columns; the output layer is quantised.
SIZES = {"num_hidden_layers": 1, "hidden_size": 256, "head_dim": 64, "vocab_size": 320}
MOE = SIZES | {"moe_intermediate_size": 256, "num_experts": 2}
DENSE = SIZES | {"intermediate_size": 256, "tie_word_embeddings": False}


def quantised(config, quantiser, family="llama", **sizes: object) -> Callable[[Path], Path]:
    def chosen(name: str) -> bool:
        return name.endswith(("_proj.weight", "lm_head.weight"))

    config = {k: v for k, v in config.items() if k not in ("modules_to_not_convert", "ignore")}
    return lambda folder: made.write(folder, family, config, quantiser, chosen, **(sizes or DENSE))[0]


def in_bf16(folder: Path) -> Path:
    tiny_models.build("qwen3_moe", **MOE).to(torch.bfloat16).save_pretrained(folder / "hf")
    return folder / "hf"


def in_gguf(family: str, kind: Type, **sizes: object) -> Callable[[Path], Path]:
    return lambda folder: gguf_models.write(folder / "m.gguf", tiny_models.build(family, **sizes), lambda name: kind)


def in_onnx(**choices: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = tiny_models.build("qwen3_moe", **MOE, tie_word_embeddings=False)
        return onnx_genai_models.write(folder / "m.onnx", model, **choices)

    return write


FILES = {
    "bf16": in_bf16,
    "fp8": quantised(FP8, made.fp8()),
    "fp8, a row": quantised(FP8 | {"weight_block_size": None}, made.fp8(None)),
    "gptq": quantised(gptq(), made.gptq()),
    "gptq, order": quantised(gptq(desc_act=True), made.gptq(act_order=True)),
    "gptq, groups of 16": quantised(gptq(group=16, sym=False), made.gptq(group=16, symmetric=False)),
    "awq": quantised(AWQ, made.awq()),
    "int4, zero points": quantised(int_pack(4, 32, False), made.packed_quantized(4, 32, False)),
    "int8": quantised(int_pack(8, 0), made.packed_quantized(8, 0)),
    "gguf": in_gguf("qwen3_moe", Type.Q4_K, **MOE),
    "gguf, converted": in_gguf("llama", Type.Q4_1, **DENSE),
    "onnx": in_onnx(bits=4, zeros=True, quantised_embedding=True),
    "onnx, order": in_onnx(bits=4, scattered=True),
    "onnx, blocks of 16": in_onnx(bits=8, block=16),
}


def packed(planned: Planned, most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, list[np.ndarray]], list]:
    """The chunks of each weight, in pieces of at most so many numbers or 128 rows."""
    monkeypatch.setattr(row_pieces, "_NUMBERS", most)
    checkpoint = planned.imported.checkpoint
    assert checkpoint is not None
    packer = WeightPacker(CutReader(checkpoint, all_cuts(planned.plan)))
    chunks: dict[str, list[np.ndarray]] = {}
    for value, chunk in packer.chunks([v for v in planned.plan.values if v.kind is ValueKind.WEIGHT]):
        chunks.setdefault(value.id, []).append(chunk)
    return chunks, [packer.not_finite, packer.rounded]


@pytest.mark.parametrize("name", FILES)
def test_pieces_are_the_bytes_of_the_whole(name, tmp_path, monkeypatch):
    plan = planned(FILES[name](tmp_path))
    whole, names = packed(plan, 1 << 30, monkeypatch)
    pieces, others = packed(plan, 1, monkeypatch)
    assert names == others
    for weight, chunks in whole.items():
        np.testing.assert_array_equal(np.concatenate(pieces[weight]), np.concatenate(chunks), err_msg=weight)
    cut = [weight for weight in pieces if len(pieces[weight]) > len(whole[weight])]
    assert len(cut) >= 3  # the embedding, the output layer, gate and up


@pytest.mark.parametrize("formats", ["q4", "q8", "fp8", "mxfp4", "f32"])
def test_pieces_are_quantised_as_the_whole_is(formats, tmp_path, monkeypatch):
    plan = planned(in_bf16(tmp_path), formats)
    whole, _ = packed(plan, 1 << 30, monkeypatch)
    pieces, _ = packed(plan, 1, monkeypatch)
    for weight, chunks in whole.items():
        np.testing.assert_array_equal(np.concatenate(pieces[weight]), np.concatenate(chunks), err_msg=weight)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_those_of_the_whole_wherever_they_begin(name, tmp_path):
    """Within a block of scales, a word of zero points, a tensor that others are joined to."""
    plan = planned(FILES[name](tmp_path))
    checkpoint = plan.imported.checkpoint
    assert checkpoint is not None
    weights = [v for v in plan.plan.values if v.kind is ValueKind.WEIGHT and len(v.type.shape) > 1]
    for value in (v for v in weights if int(v.type.shape[-2]) >= 128):
        experts, rows = len(value.type.shape) > 2, int(value.type.shape[-2])
        whole = checkpoint.read_expert(value, 1) if experts else checkpoint.read(value)
        for starts in ((0, 37), (0, rows // 128 * 64), (5, rows // 2 + 3)):
            pieces = [((starts[0], starts[1]),), ((starts[1], rows - 1), (rows - 1, rows))]
            read = list(checkpoint.read_pieces(value, pieces, 1 if experts else None))
            for runs, got in zip(pieces, read, strict=True):
                want = row_pieces.take_rows(whole, runs)
                assert type(got) is type(want)
                np.testing.assert_array_equal(numbers_of(got), numbers_of(want))


def numbers_of(numbers) -> np.ndarray:
    return numbers.to_f32() if isinstance(numbers, QuantisedNumbers) else packing.to_f32(numbers)


LARGE = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 40_960, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: quantised(gptq(group=16), made.gptq(group=16), **LARGE)(folder),
        lambda folder: quantised(FP8, made.fp8(), **LARGE)(folder),
        lambda folder: in_gguf("llama", Type.Q4_1, **LARGE)(folder),
    ],
    ids=["gptq, converted", "fp8", "gguf, converted"],
)
def test_what_is_decoded_and_packed_lies_in_memory_in_pieces(write, tmp_path, monkeypatch):
    """The vocabulary's matrices have 2.6 million numbers, 10 MB in f32, pieces 32,768. What a file has is read into
    memory that tracemalloc does not see; numpy's it does. Converted numbers are measured for the plan, too."""
    path = write(tmp_path)
    monkeypatch.setattr(row_pieces, "_NUMBERS", 1 << 15)
    plan = planned(path)
    values = [v for v in plan.plan.values if v.kind is ValueKind.WEIGHT]
    assert plan.imported.checkpoint is not None
    tracemalloc.start()
    conversion_notes(plan.plan, plan.imported.checkpoint)
    for _ in WeightPacker(plan.imported.checkpoint).chunks(values):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5e6


WHOLE = Value("w", TensorType(DType.F32, (3, 512, 384), packing.PANELS_GLU), ValueKind.WEIGHT, fqn="w", format="q4")


@pytest.mark.parametrize(
    "cut",
    [
        Cut(-2, ((32, 200), (288, 456))),
        Cut(-2, ((32, 200), (288, 456)), experts=((0, 1), (2, 3))),
        Cut(-1, ((96, 384),)),
        Cut(0, ((1, 3),)),
        Cut(-2, ((0, 128),), zero=True),
    ],
)
def test_pieces_of_parts_are_those_of_the_part(cut):
    numbers = np.random.default_rng(0).normal(size=(3, 512, 384)).astype(np.float32)

    class Reader:
        def read(self, value):
            return numbers

        def read_expert(self, value, expert):
            return numbers[expert]

        def read_pieces(self, value, pieces, expert=None):
            yield from (row_pieces.take_rows(numbers[expert], runs) for runs in pieces)

    part = cut_value(WHOLE, cut, 1)
    reader = CutReader(Reader(), {part.id: (WHOLE, cut)})
    for expert in range(part.type.shape[0]):
        want = reader.read(part)[expert]
        half = len(want) // 2
        pieces = [((0, 30), (half, half + 30)), ((30, half), (half + 30, 2 * half))]
        for runs, got in zip(pieces, reader.read_pieces(part, pieces, expert), strict=True):
            np.testing.assert_array_equal(got, row_pieces.take_rows(want, runs))
