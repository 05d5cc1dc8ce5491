"""Adapters that are loaded at run time, against peft's own model in float32."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import xxhash
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import hetcomp
from hetcomp.adapters.pack_adapter import pack_adapter
from hetcomp.backends.packing import unpack
from hetcomp.errors import HetcompError
from hetcomp.models_zoo import find
from tests.parity.test_adapters import FIRST, MORE, TENSORS, logits_of
from tests.parity.test_families import CONTEXT, TOLERANCE, relative_error
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import build, save_tiny, token_ids
from tests.sampled_cases import rest

BATCH = 8


def compiled(folder: Path, out: Path, formats: str = "f32", **options: object) -> hetcomp.Executable:
    options = {"isa": ["avx2"], **options}
    return hetcomp.compile(folder, formats=formats, context_length=CONTEXT, max_batch=BATCH, out=out, **options)  # type: ignore[arg-type]


def decoded(exe: hetcomp.Executable, ids: Sequence[int], adapter: str | None, prompt: int = 5) -> np.ndarray:
    """Logits of a prompt's last token and of all that follow, one step each."""
    with exe.runtime.session(adapter) as session:
        logits = [session.prefill(ids[:prompt])]
        logits += [exe.runtime.decode([session], [id])[0] for id in ids[prompt:]]
    return np.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FIRST, *rest(MORE)], ids=str)
def test_logits_as_peft_has_them(case, tmp_path):
    family, odd = case
    model = save_tiny(family, tmp_path / "hf", odd=odd)
    ids = token_ids(model, 17)[0].tolist()
    base = logits_of(model, ids)
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", **everything(family)), ids)
    assert relative_error(base, wanted) > 0.05  # the adapter matters
    exe = compiled(tmp_path / "hf", tmp_path / "tiny.hetc")
    before = exe(ids)
    assert exe.load_adapter(tmp_path / "adapter") == "adapter"
    assert relative_error(exe(ids, adapter="adapter"), wanted) < TOLERANCE
    assert relative_error(decoded(exe, ids, "adapter"), wanted[4:]) < TOLERANCE
    np.testing.assert_array_equal(exe(ids), before)
    exe.unload_adapter("adapter")
    np.testing.assert_array_equal(exe(ids), before)
    with pytest.raises(HetcompError, match="no adapter adapter"):
        exe(ids, adapter="adapter")


@pytest.mark.slow
def test_output_layer_and_router(tmp_path):
    """The output layer has rows of its own; a changed router changes which experts a token gets."""
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=True)
    ids = token_ids(model, 17)[0].tolist()
    fields = {"target_modules": ["lm_head", "k_proj"], "target_parameters": ["mlp.gate.weight"]}
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", **fields), ids)
    tensors = tmp_path / "adapter" / TENSORS  # to which peft adds the base's output layer, unless told otherwise
    save_file({n: t for n, t in load_file(tensors).items() if "base_layer.weight" not in n}, tensors)
    exe = compiled(tmp_path / "hf", tmp_path / "tiny.hetc")
    assert relative_error(exe(ids), wanted) > 0.05
    with pytest.raises(HetcompError, match="changes a router"):
        exe.load_adapter(tmp_path / "adapter")
    exe.load_adapter(tmp_path / "adapter", allow_router=True)
    assert relative_error(exe(ids, adapter="adapter"), wanted) < TOLERANCE
    assert relative_error(decoded(exe, ids, "adapter"), wanted[4:]) < TOLERANCE


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny model on all formats' base, its folder, five adapters of different ranks and targets, and ids."""
    folder = tmp_path_factory.mktemp("qwen")
    model = save_tiny("qwen3_moe", folder / "hf")
    whole = everything("qwen3_moe")
    for i, fields in enumerate(
        (
            whole,
            whole | {"r": 8, "lora_alpha": 4},
            {"target_modules": ["q_proj", "o_proj"], "r": 16},
            {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "r": 5, "use_rslora": True},
        )
    ):
        make_adapter(build("qwen3_moe"), folder / f"adapter{i}", seed=i, **fields)
    return folder, token_ids(model, 24)[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["f32", "q4"])
def test_a_batch_with_four_adapters_is_eight_runs(formats, qwen, tmp_path):
    """As near as eight tokens in a step are to one without adapters, where kernels for more rows sum in another order.
    Bit for bit if a step has as many tokens: the others' adapters do not matter."""
    folder, ids = qwen
    exe = compiled(folder / "hf", tmp_path / "tiny.hetc", formats)
    for i in range(4):
        exe.load_adapter(folder / f"adapter{i}", f"a{i}")
    names = ["a0", "a1", None, "a2", "a3", "a0", None, "a1"]
    prompts = [ids[i : i + 3 + i % 4] for i in range(BATCH)]
    steps = [[ids[(5 * i + s) % len(ids)] for i in range(BATCH)] for s in range(4)]

    def single(i: int, name: str | None) -> np.ndarray:
        with exe.runtime.session(name) as session:
            first = session.prefill(prompts[i])
            return np.stack([first, *(exe.runtime.decode([session], [step[i]])[0] for step in steps)])

    def together(names: Sequence[str | None]) -> list[np.ndarray]:
        sessions = [exe.runtime.session(name) for name in names]
        rows = [[s.prefill(prompt)] for s, prompt in zip(sessions, prompts, strict=True)]
        for step in steps:
            for row, logits in zip(rows, exe.runtime.decode(sessions, step), strict=True):
                row.append(logits)
        with pytest.raises(HetcompError, match="in use by"):
            exe.unload_adapter(str(names[0]))
        for session in sessions:
            session.close()
        return [np.stack(row) for row in rows]

    mixed = together(names)
    for i, name in enumerate(names):
        assert relative_error(mixed[i], single(i, name)) < 1e-5, name
    for name in ("a0", "a1"):
        alike = together([name] * BATCH)
        for i in (i for i in range(BATCH) if names[i] == name):
            np.testing.assert_array_equal(mixed[i], alike[i])
    assert len({single(0, name)[-1].tobytes() for name in ("a0", "a1", None, "a2", "a3")}) == 5


@pytest.mark.slow
def test_transposed_and_permuted_adapters_give_other_logits(qwen, tmp_path):
    """Whether A and B or their experts were read in the wrong place would show also where every size fits."""
    folder, ids = qwen
    exe = compiled(folder / "hf", tmp_path / "tiny.hetc")
    right = logits_of(make_adapter(build("qwen3_moe"), tmp_path / "again", seed=0, **everything("qwen3_moe")), ids)

    def turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".experts." in name and "lora_B" in name:
            out, columns = tensor.shape
            return tensor.reshape(out, columns // 8, 8).transpose(1, 2).reshape(out, columns).contiguous()
        return tensor

    def swapped(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flip(1).contiguous() if "q_proj.lora_A" in name else tensor

    for change in (turned, swapped):
        bad = tmp_path / change.__name__
        shutil.copytree(folder / "adapter0", bad)
        save_file({n: change(n, t) for n, t in load_file(bad / TENSORS).items()}, bad / TENSORS)
        exe.load_adapter(bad)
        assert relative_error(exe(ids, adapter=bad.name), right) > 100 * TOLERANCE
    exe.load_adapter(folder / "adapter0", "right")
    assert relative_error(exe(ids, adapter="right"), right) < TOLERANCE


@pytest.mark.slow
def test_cut_over_two_numa_nodes(tmp_path):
    """Rows of linears and columns of experts are cut, and so are the pairs."""
    model = save_tiny("qwen3_moe", tmp_path / "hf", moe_intermediate_size=96, tie_word_embeddings=False)
    ids = token_ids(model, 17)[0].tolist()
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", **everything("qwen3_moe")), ids)
    exe = compiled(tmp_path / "hf", tmp_path / "two.hetc", hw_profile=avx2_machine(2), isa=None)
    exe.load_adapter(tmp_path / "adapter")
    assert relative_error(exe(ids, adapter="adapter"), wanted) < TOLERANCE
    assert relative_error(decoded(exe, ids, "adapter"), wanted[4:]) < TOLERANCE


@torch.no_grad()
def with_weights_of(exe: hetcomp.Executable) -> torch.nn.Module:
    """demo-moe in float32 with the numbers that the artifact's packed weights stand for."""
    model = transformers.AutoModelForCausalLM.from_pretrained(find("demo-moe"), dtype=torch.float32)
    packed = {name: data for path in exe.path.glob("weights-*") for name, data in load_numpy(path).items()}
    parameters = dict(model.named_parameters())
    for value in exe.plan.values:
        if value.fqn in packed and value.fqn in parameters:
            parameters[value.fqn].copy_(torch.from_numpy(unpack(packed[value.fqn], value)))
    return model.eval()


def spoiled(packed: Path, exe: hetcomp.Executable, out: Path) -> Path:
    """The packed adapter with a NaN among the scales of the first weight's a, and with hashes that fit."""
    raw = bytearray(packed.read_bytes())
    begin = 24 + struct.unpack("<Q", raw[8:16])[0]
    header = json.loads(raw[24:begin])
    first = header["weights"][0]
    columns = next(int(v.type.shape[-1]) for v in exe.plan.values if v.fqn == first["name"])
    struct.pack_into("<f", raw, begin + first["a"] + first["rank"] * (-(-columns // 16) * 16), float("nan"))
    hashed = xxhash.xxh3_64(raw[begin:]).hexdigest()
    raw[24:begin] = raw[24:begin].replace(header["xxh3_64"].encode(), hashed.encode())
    struct.pack_into("<Q", raw, 16, xxhash.xxh3_64(raw[24:begin]).intdigest())
    out.write_bytes(raw)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["q8", "q4"])
def test_demo_moe_adds_to_quantised_weights(formats, tmp_path):
    """Beside peft on the weights that the format made of the model's: what remains is that activations are rounded to 8
    bits before they meet the base's weights, and the adapter's numbers, which have 8 bits and a scale for each row (and
    meet activations that are not rounded). That is two errors of like size instead of one: sqrt(2), and some room."""
    exe = compiled(find("demo-moe"), tmp_path / "demo.hetc", formats)
    model = with_weights_of(exe)
    ids = token_ids(model, 40)[0].tolist()
    base = logits_of(model, ids)
    wanted = logits_of(make_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16, **everything("qwen3_moe")), ids)
    pack_adapter(exe.path, tmp_path / "adapter", tmp_path / "demo.hetlora")
    exe.load_adapter(tmp_path / "demo.hetlora")

    def error(got: np.ndarray, want: np.ndarray) -> float:
        """Of most tokens: of one in ten the rounding changes an expert, which tells nothing of the adapter."""
        rows = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
        return float(np.median(rows))

    rounding = error(exe(ids), base)
    assert rounding < 0.03
    assert error(base, wanted) > 0.3
    assert error(exe(ids, adapter="demo"), wanted) < 1.75 * rounding
    assert error(decoded(exe, ids, "demo"), wanted[4:]) < 1.75 * rounding
    with pytest.raises(HetcompError, match="NaN"):
        exe.load_adapter(spoiled(tmp_path / "demo.hetlora", exe, tmp_path / "bad.hetlora"))
