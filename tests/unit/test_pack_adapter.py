"""Packed adapters: the pairs of every weight stand for the delta that merging would add, or the folder is refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from hetcomp.adapters.base_model import ARTIFACT_FILE, BaseModel
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import AdaptedWeight
from hetcomp.adapters.pack_adapter import artifact_base, pack_adapter
from hetcomp.backends.adapted_ops import AdaptableWeight, adaptable_weights
from hetcomp.backends.program import ProgramLayout
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.ir.plan import WeightSource
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.plan_wishes import PlanWishes
from tests.reference.pair_numbers import pair_numbers
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import build, save_tiny


def documents(model: Path, out: Path, formats: str = "f32", nodes: int = 1) -> Path:
    """Of a compiled model what packing needs: its plan and its base."""
    planned = plan_model(model, hw_profile=avx2_machine(nodes), context_length=64, formats=formats)
    out.mkdir()
    (out / "plan.json").write_text(to_json(planned.plan))
    (out / ARTIFACT_FILE).write_text(BaseModel.of(planned.imported).to_json())
    return out


def read_packed(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The header and the data, whose hashes are right."""
    raw = path.read_bytes()
    length, hashed = struct.unpack("<QQ", raw[8:24])
    header = raw[24 : 24 + length]
    assert raw[:8] == b"HETLORA\x01" and (24 + length) % 64 == 0
    assert xxhash.xxh3_64(header).intdigest() == hashed
    document = json.loads(header)
    data = np.frombuffer(raw, np.uint8, offset=24 + length)
    assert document["bytes"] == data.size
    assert xxhash.xxh3_64(data.tobytes()).hexdigest() == document["xxh3_64"]
    return document, data


def delta_of(entry: dict[str, Any], data: np.ndarray, shape: AdaptableWeight) -> np.ndarray:
    """f32 [matrices, rows, columns]: what the packed pairs of a weight add."""
    assert entry["a"] % 64 == 0 and entry["b"] % 64 == 0
    a, b = pair_numbers(data[entry["a"] :], data[entry["b"] :], entry["rank"], shape)
    return entry["scale"] * np.einsum("nor,nri->noi", b, a)


def viewed_delta(weight: AdaptedWeight, view: WeightSource) -> np.ndarray:
    """f32 [matrices, rows, columns]: the delta of the weight that ``view`` cuts out of the parameter."""
    delta = np.stack([weight.pair(e).delta() for e in range(len(weight.factors))])
    if view.deinterleave:
        delta = np.concatenate([delta[:, ::2], delta[:, 1::2]], axis=1)
    if view.head_split is not None:
        heads, start, stop = view.head_split
        delta = delta.reshape(heads, -1, delta.shape[-1])[:, start:stop]
        delta = delta.swapaxes(1, 2) if view.head_transpose else delta
    if view.row_runs:
        delta = np.concatenate([delta[:, start:stop] for start, stop in view.row_runs], axis=1)
    return delta


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "odd", "formats"),
    [
        ("qwen3_moe", True, "f32"),
        ("qwen3_moe", False, "q4"),
        ("mixtral", False, "f32"),
        ("deepseek_v3", False, "f32"),
        ("deepseek_v3", True, "f32"),
        ("gpt_oss", True, "f32"),
        ("qwen3_next", True, "f32"),
    ],
)
def test_pairs_stand_for_the_deltas(family, odd, formats, tmp_path):
    """Of heads that are cut, rows that lie in turn, matrices that lie the other way round; in 8 bits but for rounding:
    of each a and b by half of a 127th of the row's greatest, in the mean over the ranks of less."""
    save_tiny(family, tmp_path / "hf", odd=odd)
    make_adapter(build(family, odd=odd), tmp_path / "adapter", **everything(family))
    artifact = documents(tmp_path / "hf", tmp_path / "documents", formats)
    packed = pack_adapter(artifact, tmp_path / "adapter", tmp_path / "a.hetlora")
    plan = from_json((artifact / "plan.json").read_text())
    layout = ProgramLayout.of(plan)
    shapes = adaptable_weights(plan, layout.weights, layout.cuts)
    adapter = read_adapter(tmp_path / "adapter", artifact_base(artifact))
    header, data = read_packed(tmp_path / "a.hetlora")
    assert (packed.weights, packed.bytes) == (len(header["weights"]), header["bytes"])
    changed = set()
    for entry in header["weights"]:
        value = layout.weights[entry["weight"]]
        weight = adapter.weights[value.fqn or ""]
        view = value.view or WeightSource("plain", ())
        want = viewed_delta(weight, view)
        shape = shapes[entry["weight"]]
        got = delta_of(entry, data, shape)
        assert shape.number_bytes == (1 if formats == "q4" and value.format != "f32" else 4)
        allowed = (2**-6 if shape.number_bytes == 1 else 1e-5) * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=allowed, err_msg=entry["name"])
        changed.add(value.fqn)
    assert changed == set(adapter.weights)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model, documents of it and an adapter for it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("qwen3_moe", folder / "hf")
    make_adapter(build("qwen3_moe"), folder / "adapter", **everything("qwen3_moe"))
    documents(folder / "hf", folder / "documents")
    return folder


def refused(match: str, artifact: Path, adapter: Path, out: Path, **options: bool) -> None:
    """Expects a refusal that leaves nothing behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(HetcompError, match=match):
        pack_adapter(artifact, adapter, out, **options)  # type: ignore[arg-type]
    assert set(out.parent.iterdir()) == before


def test_the_artifacts_base_is_the_models(tiny):
    planned = plan_model(tiny / "hf", hw_profile=avx2_machine(1), context_length=64, formats="f32")
    want, got = BaseModel.of(planned.imported), artifact_base(tiny / "documents")
    assert dict(got.weights) == dict(want.weights)
    assert (got.name, got.model_type, got.layers, got.parameters) == (
        want.name,
        want.model_type,
        want.layers,
        want.parameters,
    )


def test_what_cannot_be_packed_is_refused(tiny, tmp_path):
    out = tmp_path / "a.hetlora"
    artifact = tiny / "documents"
    refused("no folder", artifact, tmp_path / "none", out)
    refused(f"is no compiled model that adapters can be packed for: {ARTIFACT_FILE}", tiny, tiny / "adapter", out)
    make_adapter(build("qwen3_moe"), tmp_path / "router", target_modules=["q_proj"], target_parameters=["gate.weight"])
    refused("changes a router", artifact, tmp_path / "router", out)
    pack_adapter(artifact, tmp_path / "router", tmp_path / "router.hetlora", allow_router=True)
    make_adapter(build("qwen3_moe", hidden_size=32), tmp_path / "other", **everything("qwen3_moe"))
    refused("Is qwen3_moe|Is hf", artifact, tmp_path / "other", out)
    pack_adapter(artifact, tiny / "adapter", out, name="first")
    assert read_packed(out)[0]["name"] == "first"
    refused("exists and is left alone", artifact, tiny / "adapter", out)


def test_an_alpha_of_zero_changes_nothing(tiny, tmp_path):
    make_adapter(build("qwen3_moe"), tmp_path / "zero", target_modules=["q_proj"], lora_alpha=0)
    pack_adapter(tiny / "documents", tmp_path / "zero", tmp_path / "zero.hetlora")
    header, _ = read_packed(tmp_path / "zero.hetlora")
    assert [entry["scale"] for entry in header["weights"]] == [0.0] * 3


def test_damaged_documents_are_refused(tiny, tmp_path):
    (tmp_path / "plan.json").write_text((tiny / "documents" / "plan.json").read_text())
    out = tmp_path / "out" / "a.hetlora"
    out.parent.mkdir()
    refused(f"{ARTIFACT_FILE} cannot be read", tmp_path, tiny / "adapter", out)
    for text in ("", "[]", "{}", '{"weights": [{}]}'):
        (tmp_path / ARTIFACT_FILE).write_text(text)
        refused("is damaged", tmp_path, tiny / "adapter", out)


@pytest.mark.slow
def test_parts_of_numa_nodes_have_parts_of_pairs(tmp_path):
    """Rows of linears are cut, and columns of experts' down, whose sums the nodes add up."""
    sizes = {"moe_intermediate_size": 96, "tie_word_embeddings": False}
    save_tiny("qwen3_moe", tmp_path / "hf", **sizes)
    make_adapter(build("qwen3_moe", **sizes), tmp_path / "adapter", **everything("qwen3_moe"))
    deltas: dict[str, np.ndarray] = {}
    for nodes in (1, 2):
        artifact = documents(tmp_path / "hf", tmp_path / f"on{nodes}", nodes=nodes)
        pack_adapter(artifact, tmp_path / "adapter", tmp_path / f"{nodes}.hetlora")
        plan = from_json((artifact / "plan.json").read_text())
        layout = ProgramLayout.of(plan)
        shapes = adaptable_weights(plan, layout.weights, layout.cuts)
        header, data = read_packed(tmp_path / f"{nodes}.hetlora")
        parts: dict[str, list[np.ndarray]] = {}
        cuts = 0
        for entry in header["weights"]:
            value = layout.weights[entry["weight"]]
            whole, cut = layout.cuts.get(value.id, (value, None))
            delta = delta_of(entry, data, shapes[entry["weight"]])
            parts.setdefault(whole.fqn or "", []).append(delta)
            if cut is None:
                continue
            cuts += 1
            along = np.moveaxis(deltas[whole.fqn or ""], cut.axis, 0)
            want = np.moveaxis(np.concatenate([along[start:stop] for start, stop in cut.runs]), 0, cut.axis)
            np.testing.assert_allclose(delta, want, atol=1e-6, err_msg=entry["name"])
        if nodes == 1:
            deltas = {fqn: found[0] for fqn, found in parts.items()}
        else:
            assert cuts > 0 and parts.keys() == deltas.keys()


def test_what_a_gpu_has_no_room_for_is_refused(tiny, tmp_path):
    """Without any room; without room for routed experts; of a greater rank."""
    machine = avx2_machine(1).model_copy(update={"gpus": (gpu(),)})
    artifact, out = tmp_path / "documents", tmp_path / "a.hetlora"
    shutil.copytree(tiny / "documents", artifact)
    for room, match in (
        (None, "gpu:0 computes a part or all, .* without room for adapters there; compile it with --adapters N"),
        (AdapterRoom(2, 16, experts=False), "room for adapters of routed experts there; compile it with --adapter-exp"),
        (AdapterRoom(2, 1), "on gpu:0 at most 4 is possible .hetcomp compile --adapter-rank"),
    ):
        wishes = PlanWishes(pins=("*=gpu:0",), adapter_room=room)
        planned = plan_model(tiny / "hf", hw_profile=machine, context_length=32, wishes=wishes)
        (artifact / "plan.json").write_text(to_json(planned.plan))
        if room is None or not room.experts:
            refused(match, artifact, tiny / "adapter", out)
            continue
        make_adapter(build("qwen3_moe"), tmp_path / "rank5", target_modules=["q_proj"], r=5)
        refused(match, artifact, tmp_path / "rank5", out)
