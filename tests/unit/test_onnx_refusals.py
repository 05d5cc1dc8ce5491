"""ONNX files that are damaged, incomplete or compute something else: named in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.model_file import open_model
from tests.reference import onnx_models, tiny_models

BOUNDS = {"context_length": 32, "max_batch": 1, "max_tokens": 8, "max_logit_rows": 8}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> onnx.ModelProto:
    model = tiny_models.build("llama", num_hidden_layers=1)
    return onnx.load(onnx_models.export(tmp_path_factory.mktemp("onnx") / "m.onnx", model))


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def refusal(path: Path) -> str:
    with pytest.raises(HetcompError) as caught:
        frontend.load(path, **BOUNDS)
    text = str(caught.value)
    assert "\n" not in text
    return text


def refused(tmp_path: Path, model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None]) -> str:
    made = copied(model)
    change(made)
    path = tmp_path / "changed.onnx"
    onnx.save(made, path)
    return refusal(path)


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


# ---------------------------------------------------------------- external data


@pytest.fixture
def external(exported, tmp_path) -> Path:
    made = copied(exported)
    path = tmp_path / "m.onnx"
    onnx.save_model(made, path, save_as_external_data=True, location="m.data", size_threshold=1024)
    return path


def relocated(path: Path, **facts: str) -> str:
    """The name of a tensor whose external data was given other facts."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        entry.value = facts.get(entry.key, entry.value)
    onnx.save(model, path)
    return str(tensor.name)


def test_external_data_is_read(external):
    assert frontend.load(external, **BOUNDS).unused == ()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"location": "other.data"}, "is missing"),
        ({"location": "../m.data"}, "expected a file in the model's folder"),
        ({"location": "/etc/passwd"}, "expected a file in the model's folder"),
        ({"location": ""}, "has no location"),
        ({"offset": "4503599627370496"}, "which has"),
        ({"offset": "-4"}, "expected a whole number"),
        ({"length": "12"}, "has 12 bytes; expected"),
        ({"length": "9" * 30}, "bytes; expected"),
    ],
)
def test_external_data_elsewhere(facts, says, external):
    name = relocated(external, **facts)
    text = refusal(external)
    assert name in text and says in text


def test_external_data_behind_a_link_to_outside(external, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "m.data"
    (external.parent / "m.data").rename(outside)
    (external.parent / "m.data").symlink_to(outside)
    assert "a link to outside of the model's folder" in refusal(external)


def test_truncated_external_data(external):
    data = external.parent / "m.data"
    data.write_bytes(data.read_bytes()[:-100])
    assert "download it again" in refusal(external)


# ---------------------------------------------------------------- the file


def test_the_files_own_numbers_stay_in_it(exported, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(exported, path)
    file = open_model(path)
    assert max(map(len, file.inline.values())) <= 4096
    for tensor in exported.graph.initializer:
        found = file.graph.initialisers[tensor.name]
        np.testing.assert_array_equal(file.numbers(found), numpy_helper.to_array(tensor))
        assert bool(found.file) == (found.bytes > 4096)


def test_no_onnx_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x07garbage" * 100)
    assert "no ONNX file that can be read" in refusal(path)


def test_truncated_file(exported, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(exported.SerializeToString()[:-5000])
    assert str(path) in refusal(path)


def test_damaged_files(exported, tmp_path):
    """Bytes changed, lost or added: read as they are then, or refused."""
    rng = np.random.default_rng(1)
    whole, path, refusals = exported.SerializeToString(), tmp_path / "m.onnx", 0
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, len(data) - 8, rng.integers(1, 6)):
            change, some = rng.integers(3), bytes(rng.integers(0, 256, rng.integers(1, 8), np.uint8))
            data[at : at + (0, len(some), 1)[change]] = b"" if change == 1 else some[: 1 if change else None]
        path.write_bytes(data)
        try:
            frontend.load(path, **BOUNDS)
        except HetcompError as error:
            refusals += "\n" not in str(error)
    assert refusals > 100


def test_what_the_checker_finds(exported, tmp_path):
    def change(model):
        node_of(model, "Softmax").input[0] = "nowhere"

    assert "no valid ONNX model" in refused(tmp_path, exported, change)


def test_tensors_with_other_sizes_than_their_shapes(exported, tmp_path):
    def change(model):
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
        tensor.dims[0] = 1 << 60

    assert "expected" in refused(tmp_path, exported, change)


# ---------------------------------------------------------------- what is computed


def test_unknown_op(exported, tmp_path):
    def change(model):
        node = node_of(model, "Sigmoid")
        node.domain, node.op_type = "com.example", "Sigmund"
        model.opset_import.append(helper.make_opsetid("com.example", 1))

    text = refused(tmp_path, exported, change)
    assert "act_fn/Sigmoid (com.example.Sigmund) is of a kind that hetcomp does not know" in text


def test_attention_that_is_not_causal(exported, tmp_path):
    """Its mask is never added."""

    def change(model):
        softmax = node_of(model, "Softmax")
        add = next(n for n in model.graph.node if softmax.input[0] in n.output)
        softmax.input[0] = next(i for i in add.input if "MatMul" in i or "Mul" in i or "Div" in i)

    text = refused(tmp_path, exported, change)
    assert "Softmax" in text and "does not compute softmax(q k) v over the positions up to the token's own" in text


def test_sizes_that_no_model_has(exported, tmp_path):
    """A mask of more numbers than memory has."""

    def change(model):
        node = node_of(model, "Softmax")
        huge = numpy_helper.from_array(np.array([1 << 40], np.int64), "huge")
        model.graph.initializer.append(huge)
        at = list(model.graph.node).index(node)
        made = helper.make_node("ConstantOfShape", ["huge"], ["zeros"], name="absurd")
        added = helper.make_node("Add", [node.input[0], "zeros"], ["masked"], name="masked")
        node.input[0] = "masked"
        for new in (added, made):
            model.graph.node.insert(at, new)

    assert "node absurd (ConstantOfShape) makes 1,099,511,627,776 numbers" in refused(tmp_path, exported, change)


@pytest.mark.parametrize("name", ["input_ids", "past_key_values.0.key"])
def test_inputs_for_one_length_only(name, exported, tmp_path):
    def change(model):
        shape = next(i for i in model.graph.input if i.name == name).type.tensor_type.shape
        shape.dim[1 if name == "input_ids" else 2].dim_value = 128

    text = refused(tmp_path, exported, change)
    assert f"input {name} has the shape" in text and "with a dynamic sequence" in text


def test_an_input_that_is_no_decoders(exported, tmp_path):
    def change(model):
        given = next(i for i in model.graph.input if i.name == "position_ids")
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == "position_ids":
                    node.input[i] = "pixel_values"
        given.name = "pixel_values"

    assert "input pixel_values" in refused(tmp_path, exported, change)


def test_linear_attention_is_named_with_its_layer(exported, tmp_path):
    """As genai's builder writes Qwen3.5's layers for several sequences in one row."""

    def change(model):
        state = helper.make_tensor_value_info("past.1.recurrent", TensorProto.FLOAT, ["batch_size", 4, 16, 16])
        model.graph.input.append(state)
        operands = ["logits_", "past.1.recurrent"]
        made = helper.make_node(
            "VarlenCausalConvWithState",
            operands,
            ["logits"],
            "/model/layers.1/linear_attn/Conv",
            domain="com.microsoft",
        )
        last = next(n for n in model.graph.node if "logits" in n.output)
        last.output[:] = ["logits_"]
        model.graph.node.append(made)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    text = refused(tmp_path, exported, change)
    assert "node /model/layers.1/linear_attn/Conv (com.microsoft.VarlenCausalConvWithState) keeps the state" in text
    assert "past.1.recurrent" in text


def test_a_graph_without_attention(tmp_path):
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 8])
    table = numpy_helper.from_array(np.ones((8, 8), np.float32), "table")
    graph = helper.make_graph([helper.make_node("Gather", ["table", "input_ids"], ["logits"])], "g", [ids], [logits])
    graph.initializer.append(table)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    assert "is no language model" in refusal(path)
