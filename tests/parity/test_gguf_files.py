"""GGUF files, compiled, against transformers in float32 with the numbers that they stand for. That configs and weights
are those of the models, in every family, tests/unit/test_gguf_models.py shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

import hetcomp
from hetcomp.artifact.text_library import NativeTokenizer
from hetcomp.artifact.tokenizer import compile_tokenizer
from hetcomp.cli.main import app
from hetcomp.models_zoo import find
from tests.parity.test_quantised_checkpoints import errors
from tests.reference import gguf_models, tiny_models

CONTEXT = 64
WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 4, "num_hidden_layers": 2}


def mixed(name: str) -> Type:
    """As llama.cpp mixes types in Q4_K_M."""
    if "ffn_down" in name or "attn_v" in name:
        return Type.Q6_K if "blk.0" in name else Type.Q5_K
    return Type.Q8_0 if "token_embd" in name else Type.Q4_K


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "choose", "options"),
    [("deepseek_v3", lambda name: Type.F32, {}), ("qwen3_moe", mixed, WIDE)],
    ids=["deepseek_v3", "mixed types"],
)
def test_in_f32_the_logits_are_those_of_float32(family, choose, options, tmp_path):
    """Another order of summation, as tests/parity/test_families.py."""
    model = tiny_models.build(family, **options)
    path = gguf_models.write(tmp_path / "m.gguf", model, choose, facts=gguf_models.add_words)
    exe = hetcomp.compile(path, formats="f32", context_length=CONTEXT, out=tmp_path / "m.hetc")
    assert errors(model, exe).max() < 1e-4
    with NativeTokenizer((tmp_path / "m.hetc" / "tokenizer.hetc.json").read_bytes()) as words:
        assert words.encode("ab ") == [255, ord(" ")]
    assert len(list(exe.generate("ab", max_new_tokens=3, ignore_eos=True))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "choose", "forms", "options"),
    [
        ("gpt_oss", lambda name: Type.MXFP4, {"mxfp4"}, {}),
        ("mixtral", lambda name: Type.Q4_0, {"q4"}, {}),
        ("qwen3_moe", mixed, {"q4k", "q5k", "q6k"}, WIDE),  # gate_up and down of an expert in two formats
    ],
    ids=["mxfp4", "q4_0", "K blocks"],
)
def test_as_they_are_the_logits_are_off_by_the_arithmetic_alone(family, choose, forms, options, tmp_path):
    """As the test of that name in test_quantised_checkpoints.py."""
    model = tiny_models.build(family, **options)
    path = gguf_models.write(tmp_path / "m.gguf", model, choose)
    exe = hetcomp.compile(path, context_length=CONTEXT, tokenizer=find("demo-moe"), out=tmp_path / "m.hetc")
    experts = {v.format for v in exe.plan.values if v.fqn and ".experts." in v.fqn and len(v.type.shape) == 3}
    assert experts == forms
    assert np.median(errors(model, exe)) < 0.1
    words = (tmp_path / "m.hetc" / "tokenizer.hetc.json").read_bytes()
    assert words == compile_tokenizer(find("demo-moe")).data
    assert_inspected(tmp_path / "m.hetc", forms)


def assert_inspected(artifact: Path, forms: set[str]) -> None:
    """``inspect`` and ``plan`` say the same of what an artifact's weights are stored and computed in."""

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, str(artifact)])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(said("inspect", "--json"))
    assert found["matrices"] == json.loads(said("plan", "--json"))["matrices"]
    experts = {one["format"] for one in found["matrices"] if one["role"] == "experts"}
    assert experts == forms
    assert found["packed"] >= sum(one["bytes"] for one in found["matrices"])
    text = said("inspect")
    for one in found["matrices"]:
        row = (one["role"], one["source"], f"{one['source_bits']:.2f}", one["format"], f"{one['bits']:.2f}")
        cells = r"\s+".join(map(re.escape, (*row, f"{one['bytes']:,}")))
        assert re.search(cells, text) and re.search(cells, said("plan")), row
    assert "weights: " in text
