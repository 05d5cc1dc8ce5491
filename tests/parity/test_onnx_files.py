"""ONNX files, compiled: against onnxruntime, and against the checkpoint that one was exported from."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import hetcomp
from hetcomp.models_zoo import find
from tests.e2e.command_line import run
from tests.reference import onnx_genai_models, onnx_models, tiny_models

CONTEXT = 64


def hetcomp_command(*arguments: object) -> str:
    outcome = run(*(str(a) for a in arguments))
    assert outcome.code == 0, outcome.err
    return outcome.out


def beside(folder):
    """The tokenizer of a genai folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(find("demo-moe") / name, folder / name)


@pytest.mark.slow
def test_a_file_of_genai_from_the_command_line(tmp_path):
    """In f32 the arithmetic is another order of summation, as tests/parity/test_families.py."""
    model = tiny_models.build("qwen3_moe")
    path = onnx_genai_models.write(tmp_path / "model.onnx", model, bits=4, zeros=True)
    beside(tmp_path)
    out = tmp_path / "m.hetc"
    assert "aten" not in hetcomp_command("plan", path, "--hw", "preset:9950x-64gb", "--context", CONTEXT)
    hetcomp_command("compile", path, "-o", out, "--formats", "f32", "--context", CONTEXT)
    exe = hetcomp.load(out)
    ids = [int(t) for t in tiny_models.token_ids(model, 12)[0]]
    assert onnx_models.relative_error(exe(ids), onnx_models.reference_logits(path, ids, 5)) < 1e-4
    assert (out / "tokenizer.hetc.json").is_file()


@pytest.mark.slow
def test_an_exported_file_gives_the_checkpoints_logits(tmp_path):
    tiny_models.build("qwen3_moe").save_pretrained(tmp_path / "hf")
    path = tmp_path / "m.onnx"
    assert str(path) in hetcomp_command("export-onnx", tmp_path / "hf", "-o", path)
    logits = []
    for number, source in enumerate((tmp_path / "hf", path)):
        exe = hetcomp.compile(source, formats="f32", context_length=CONTEXT, out=tmp_path / f"{number}.hetc")
        logits.append(exe(list(range(1, 13))))
    np.testing.assert_array_equal(logits[1], logits[0])
