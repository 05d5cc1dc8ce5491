"""Damaged or unknown models: one clear sentence that names the thing, exit code 1, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hetcomp
from hetcomp import build_artifact
from hetcomp.errors import HetcompError
from tests.e2e.command_line import listing, refusal, run

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def _shard_of(checkpoint: Path, tensor: str) -> Path:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return checkpoint / index["weight_map"][tensor]


def _change_tensor(checkpoint: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = _shard_of(checkpoint, tensor)
    tensors = load_file(shard)
    tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


def _change_config(checkpoint: Path, change: Callable[[dict], None]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _refused(checkpoint: Path, tmp_path: Path, *options: str) -> str:
    before = listing(tmp_path)
    sentence = refusal("compile", checkpoint, "-o", tmp_path / "out.hetc", "--formats", "f32", *options)
    assert listing(tmp_path) == before
    return sentence


def test_missing_shard(checkpoint, tmp_path):
    shard = _shard_of(checkpoint, EXPERT)
    shard.unlink()
    assert shard.name in _refused(checkpoint, tmp_path)


def test_truncated_shard(checkpoint, tmp_path):
    shard = _shard_of(checkpoint, EXPERT)
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) - 100])
    sentence = _refused(checkpoint, tmp_path)
    assert shard.name in sentence and "truncated" in sentence


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_shard_truncated_within_its_header(checkpoint, tmp_path, kept):
    shard = _shard_of(checkpoint, EXPERT)
    shard.write_bytes(shard.read_bytes()[:kept])
    assert shard.name in _refused(checkpoint, tmp_path)


def test_no_weights_at_all(checkpoint, tmp_path):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    assert "safetensors" in _refused(checkpoint, tmp_path)


def test_tensor_missing(checkpoint, tmp_path):
    shard = _shard_of(checkpoint, EXPERT)
    tensors = load_file(shard)
    del tensors[EXPERT]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert EXPERT in _refused(checkpoint, tmp_path)


def test_tensor_of_wrong_shape(checkpoint, tmp_path):
    _change_tensor(checkpoint, EXPERT, lambda t: t[:-1])
    sentence = _refused(checkpoint, tmp_path)
    assert EXPERT in sentence and "[63, 32]" in sentence and "[64, 32]" in sentence


def test_tensor_of_wrong_dtype(checkpoint, tmp_path):
    _change_tensor(checkpoint, EXPERT, lambda t: t.to(torch.int32))
    sentence = _refused(checkpoint, tmp_path)
    assert EXPERT in sentence and "I32" in sentence


def test_nan_weight_is_a_warning_with_the_tensors_name(checkpoint, tmp_path):
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[7, 5] = float("nan")
        return tensor

    _change_tensor(checkpoint, EXPERT, poison)
    outcome = run("compile", checkpoint, "-o", tmp_path / "out.hetc", "--formats", "f32", "--context", "64")
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert any("model.layers.1.mlp.experts" in line and "NaN" in line for line in warnings), outcome.err
    assert (tmp_path / "out.hetc" / "manifest.json").is_file()


def test_config_without_architecture(checkpoint, tmp_path):
    _change_config(checkpoint, lambda config: config.pop("architectures"))
    sentence = _refused(checkpoint, tmp_path)
    assert "config.json" in sentence and "architectures" in sentence


def test_unknown_architecture(checkpoint, tmp_path):
    _change_config(checkpoint, lambda config: config.update(architectures=["NoSuchForCausalLM"]))
    assert "NoSuchForCausalLM" in _refused(checkpoint, tmp_path)


def test_unknown_model_type(checkpoint, tmp_path):
    _change_config(checkpoint, lambda config: config.update(model_type="no_such_type"))
    assert "no_such_type" in _refused(checkpoint, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_config_that_is_no_config(checkpoint, tmp_path, text):
    (checkpoint / "config.json").write_text(text)
    assert "config.json" in _refused(checkpoint, tmp_path)


def test_folder_without_config_and_no_folder_at_all(checkpoint, tmp_path):
    (checkpoint / "config.json").unlink()
    assert "config.json" in _refused(checkpoint, tmp_path)
    assert "demo-moe" in _refused(tmp_path / "nowhere", tmp_path)


def test_config_without_weights_can_be_planned_only(tmp_path):
    assert "qwen3moe-1b" in _refused(Path("qwen3moe-1b"), tmp_path)


@pytest.mark.parametrize("options", [("--context", "64", "--batch", "50000000"), ("--batch", "90000000")])
def test_larger_than_memory_is_refused_before_a_weight_is_read(checkpoint, tmp_path, monkeypatch, options):
    def no_reading(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(build_artifact, "write_weights", no_reading)
    before = listing(tmp_path)
    outcome = run("compile", checkpoint, "-o", tmp_path / "out.hetc", "--formats", "f32", *options)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert listing(tmp_path) == before
    table = outcome.err.lower()
    for row in ("weights, experts", "kv cache", "needed", "free on", "missing"):
        assert row in table, outcome.err


def test_importance_for_another_model(checkpoint, tmp_path):
    path = tmp_path / "importance.safetensors"
    assert str(path) in _refused(checkpoint, tmp_path, "--importance", str(path))
    save_file({"model.elsewhere.weight": torch.ones(64)}, path)
    assert "model.elsewhere.weight" in _refused(checkpoint, tmp_path, "--importance", str(path))


def test_context_beyond_the_models_positions(checkpoint, tmp_path):
    assert "512" in _refused(checkpoint, tmp_path, "--context", "100000")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--formats", "kv=q4"), "q4"),
        (("--formats", "banana"), "banana"),
        (("--formats", "experts=f32,cellar=bf16"), "cellar"),
        (("--isa", "mmx"), "mmx"),
        (("--hw", "preset:abacus"), "abacus"),
        (("--hw", "no/such/file.json"), "no/such/file.json"),
    ],
)
def test_options_that_do_not_exist(checkpoint, tmp_path, options, named):
    before = listing(tmp_path)
    sentence = refusal("compile", checkpoint, "-o", tmp_path / "out.hetc", *options)
    assert named in sentence and listing(tmp_path) == before


def test_output_that_is_something_else(checkpoint, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("It was a dark night.")
    sentence = refusal("compile", checkpoint, "-o", precious, "--formats", "f32")
    assert "thesis" in sentence and (precious / "chapter1.txt").read_text() == "It was a dark night."


def test_module_that_is_no_language_model():
    with pytest.raises(HetcompError, match="Linear"):
        hetcomp.compile(torch.nn.Linear(2, 2))
