"""Packing reads every byte of a file at most once, and of routed experts one at a time, in all formats of files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Type

from hetcomp import row_pieces
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.frontend import checkpoint
from hetcomp.frontend.file_bytes import read_bytes
from hetcomp.ir.plan import ValueKind
from tests.reference import gguf_models, onnx_genai_models, tiny_models
from tests.reference import quantised_checkpoints as made
from tests.unit.test_quantised_checkpoints import SMALL, gptq, planned

WHOLE_BLOCKS = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256}  # of 256 columns


def gptq_folder(folder: Path) -> Path:
    return made.write(folder, "qwen3_moe", gptq(), made.gptq(), **SMALL)[0]


def k_blocks(folder: Path) -> Path:
    """As Q4_K_M mixes them."""
    model = tiny_models.build("qwen3_moe", num_hidden_layers=1, num_experts=4, **WHOLE_BLOCKS)

    def kind(name: str) -> Type:
        return Type.Q6_K if "ffn_down" in name else Type.Q4_K

    return gguf_models.write(folder / "m.gguf", model, kind)


def genai(folder: Path) -> Path:
    """MatMulNBits and QMoE; what is larger than a kilobyte is beside the graph."""
    model = tiny_models.build("qwen3_moe", num_hidden_layers=1, moe_intermediate_size=64)
    path = onnx_genai_models.write(folder / "m.onnx", model, bits=4, zeros=True)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    return path


@pytest.mark.parametrize("write", [gptq_folder, k_blocks, genai])
@pytest.mark.parametrize("pieces", [False, True])
def test_everything_is_read_once_and_an_expert_at_a_time(write, pieces, tmp_path, monkeypatch):
    """No read is longer than the largest matrix of one expert, or than the largest other tensor; of tensors that have
    all experts none is longer than one of them. Of matrices in pieces of 128 rows none is longer than these."""
    if pieces:
        monkeypatch.setattr(row_pieces, "_NUMBERS", 1)
    plan, reads = planned(write(tmp_path)), []

    def watched(path: Path, offset: int, size: int) -> np.ndarray:
        reads.append((path.name, offset, size))
        return read_bytes(path, offset, size)

    monkeypatch.setattr(checkpoint, "read_bytes", watched)
    assert plan.imported.checkpoint is not None
    weights = [v for v in plan.plan.values if v.kind is ValueKind.WEIGHT]
    for _ in WeightPacker(plan.imported.checkpoint).chunks(weights):
        pass
    reads.sort()
    for (file, start, size), (next_file, next_start, _) in itertools.pairwise(reads):
        assert file != next_file or next_start >= start + size
    tensors = {t.name: t for v in weights if v.source for t in v.source.tensors}
    largest = max(t.bytes // (t.shape[0] if len(t.shape) == 3 else 1) for t in tensors.values())
    assert max(size for *_, size in reads) == largest or pieces
    if pieces:
        vocabulary = [t for t in tensors.values() if t.shape[0] == tiny_models.VOCAB and len(t.shape) == 2]
        within = [[n for file, at, n in reads if file == t.file and 0 <= at - t.offset < t.bytes] for t in vocabulary]
        assert all(max(sizes) <= t.bytes // 2 for t, sizes in zip(vocabulary, within, strict=True)) and within
    for tensor in (t for t in tensors.values() if t.quantised and len(t.shape) == 3):
        for part in dict(tensor.quantised.parts).values():
            within = [n for file, at, n in reads if file == part.file and 0 <= at - part.offset < part.bytes]
            assert max(within, default=0) <= part.bytes // tensor.shape[0], part  # none: it is in the graph itself
