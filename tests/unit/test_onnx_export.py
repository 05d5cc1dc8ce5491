"""hetcomp export-onnx: the graph compiles to the plan and the weights of the model that it was made from."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.export_onnx import export_onnx
from hetcomp.frontend.onnx.model_facts import MODEL_KEY
from hetcomp.ir.plan import ValueKind
from tests.reference import tiny_models
from tests.sampled_cases import rest

BOUNDS = {"context_length": 32, "max_batch": 1, "max_tokens": 8, "max_logit_rows": 8}
FEW = {"gpt_oss": {}}  # layers of two kinds, listed


def same_weights(got, want) -> None:
    for value in (v for v in want.plan.values if v.kind is ValueKind.WEIGHT):
        np.testing.assert_array_equal(got.checkpoint.read(value), want.checkpoint.read(value), value.fqn)
        if len(value.type.shape) == 3 and (value.view is None or value.view.head_split is None):
            one = got.checkpoint.read_expert(value, 1)
            np.testing.assert_array_equal(one, want.checkpoint.read_expert(value, 1), value.fqn)


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe"),
        *rest(("qwen2_moe", "deepseek_v2", "glm4_moe", "minimax_m2", "llama")),
    ],
)
def test_same_plan_and_weights(family, tmp_path):
    model = tiny_models.build(family, odd=True, **FEW.get(family, {"num_hidden_layers": 2}))
    path = export_onnx(model, tmp_path / "m.onnx")
    got, want = frontend.load(path, **BOUNDS), frontend.load(model, **BOUNDS)
    assert got.plan == want.plan
    assert got.unused == ()
    same_weights(got, want)


def domains(path: Path) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        out.setdefault(node.domain, set()).add(node.op_type)
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tiny_models.build("qwen3_moe", num_hidden_layers=1)
    made = tmp_path / "hf"
    model.save_pretrained(made)
    (made / "tokenizer.json").write_text("{}")
    return made


def test_file_of_a_folder_elsewhere(folder, tmp_path):
    path = export_onnx(folder, tmp_path / "m.onnx")
    onnx.checker.check_model(str(path))
    found = domains(path)
    assert {"RmsNorm", "RopeTable", "Rope", "KvAppend", "Attention", "Route", "MoeExperts"} == found["hetcomp"]
    assert {"Gather", "MatMul", "Add"} <= found[""]
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    got, want = frontend.load(path, **BOUNDS), frontend.load(folder, **BOUNDS)
    assert got.plan == want.plan
    same_weights(got, want)


def test_scopes_of_modules_are_kept(folder, tmp_path):
    """Each node is named and labelled as torch.onnx.export does it: with the paths of the modules around it, then its
    own name."""
    graph = onnx.load(export_onnx(folder, tmp_path / "m.onnx"), load_external_data=False).graph
    scopes = {}
    for node in (n for n in graph.node if n.op_type != "Identity"):  # the result's name
        (entry,) = [p for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        outermost, module, own = ast.literal_eval(entry.value)
        assert (outermost, own) == ("", node.name)
        assert node.name.startswith("/" + module.replace(".", "/") + "/" + node.op_type)
        scopes[node.name] = module
    assert len(scopes) == len(graph.node) - 1
    layer = "model.layers.0"
    assert {
        "/model/embed_tokens/Gather": "model.embed_tokens",
        "/model/layers/0/input_layernorm/RmsNorm": f"{layer}.input_layernorm",
        "/model/layers/0/self_attn/q_proj/MatMul": f"{layer}.self_attn.q_proj",
        "/model/layers/0/self_attn/Attention": f"{layer}.self_attn",
        "/model/layers/0/mlp/gate/Route": f"{layer}.mlp.gate",
        "/model/layers/0/mlp/experts/MoeExperts": f"{layer}.mlp.experts",
        "/model/layers/0/Add_2": layer,
        "/lm_head/MatMul": "lm_head",
    }.items() <= scopes.items()


def test_in_the_checkpoints_folder_its_tensors_are_referred_to(folder):
    """The experts, which the checkpoint has one by one, are written."""
    path = export_onnx(folder, folder / "m.onnx")
    got, want = frontend.load(path, **BOUNDS), frontend.load(folder, **BOUNDS)
    same_weights(got, want)
    files = {t.name: e.value for t in onnx.load(path, load_external_data=False).graph.initializer
             for e in t.external_data if e.key == "location"}  # fmt: skip
    assert files["model.layers.0.self_attn.q_proj.weight"] == "model.safetensors"
    assert {n for n, f in files.items() if f == "m.onnx.data"} == {
        f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down")
    }


# ---------------------------------------------------------------- refusals


def refusal(model, out) -> str:
    with pytest.raises(HetcompError) as caught:
        export_onnx(model, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_exported(folder, tmp_path):
    config = tiny_models.build("llama", num_hidden_layers=1).config
    config.save_pretrained(tmp_path / "config")
    assert "has no weights" in refusal(tmp_path / "config", tmp_path / "m.onnx")
    assert "a name that ends in .onnx" in refusal(folder, tmp_path / "m.bin")
    (tmp_path / "there.onnx.data").write_text("")
    assert "is there already" in refusal(folder, tmp_path / "there.onnx")
    assert "cannot be written" in refusal(folder, tmp_path / "nowhere" / "m.onnx")
    path = export_onnx(folder, tmp_path / "m.onnx")
    assert "is a GGUF or ONNX file" in refusal(path, tmp_path / "again.onnx")
    left = {p.name for p in tmp_path.iterdir()} - {"hf", "config"}
    assert left == {"there.onnx.data", "m.onnx", "m.onnx.data", "tokenizer.json", "generation_config.json"}


def test_a_damaged_exported_file(folder, tmp_path):
    path = export_onnx(folder, tmp_path / "m.onnx")
    model = onnx.load(path, load_external_data=False)
    facts = next(p for p in model.metadata_props if p.key == MODEL_KEY)
    facts.value = json.dumps(json.loads(facts.value) | {"layers": "many"})
    onnx.save(model, path)
    with pytest.raises(HetcompError, match=r"the metadata hetcomp\.model is damaged"):
        frontend.load(path, **BOUNDS)
