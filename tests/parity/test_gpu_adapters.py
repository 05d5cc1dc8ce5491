"""Adapters that are loaded at run time where a GPU computes a part, against peft in float32: whole artifacts on the
emulated GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hetcomp
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.ir.plan import Plan
from hetcomp.passes import pipeline, placement_groups, stream_experts, stream_weights
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_adapters import TENSORS, logits_of
from tests.parity.test_expert_stream import ALL
from tests.parity.test_families import TOLERANCE, relative_error
from tests.parity.test_gpu_families import BF16_TOLERANCE, CONTEXT, PINS, SLOW
from tests.reference.deferral_reference import deferred_logits
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import build, save_tiny, token_ids

BATCH, LAYERS = 3, 2
ROOM = AdapterRoom(2, 8)
TOKENS = 9
_PINS = {
    **PINS,
    "two gpus": ("*@0=gpu:0", "*@1=gpu:1", "moe.experts@1=cpu"),
    "linears on the cpu": ("*=gpu:0", "attn.q=cpu", "attn.o=cpu"),
}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@dataclass(frozen=True)
class Loaded:
    """A model on the emulated GPU, its folder, ids, and by name of an adapter that is loaded peft's logits of them;
    those of the base by ``None``."""

    exe: hetcomp.Executable
    folder: Path
    ids: list[int]
    wanted: dict[str | None, np.ndarray]

    def decoded(self, name: str | None, prompt: int = 4) -> np.ndarray:
        """Logits of a prompt's last token and of all that follow, one step each."""
        with self.exe.runtime.session(name) as session:
            rows = [session.prefill(self.ids[:prompt])]
            rows += [self.exe.runtime.decode([session], [i])[0] for i in self.ids[prompt:]]
        return np.stack(rows)


@contextmanager
def compiled(
    folder: Path,
    placement: str,
    *,
    family: str = "qwen3_moe",
    layers: int = LAYERS,
    gpus: int = 1,
    vram: int = 0,
    room: AdapterRoom | None = ROOM,
    formats: str = "f32",
    adapters: dict[str, dict[str, Any]] | None = None,
    **wishes: Any,
) -> Iterator[Loaded]:
    """The tiny model of ``family`` with adapters of these LoraConfig fields, which are in ``folder`` by their names."""
    model = save_tiny(family, folder / "hf", num_hidden_layers=layers)
    ids = token_ids(model, TOKENS)[0].tolist()
    wanted: dict[str | None, np.ndarray] = {None: logits_of(model, ids)}
    for seed, (name, fields) in enumerate((adapters or {"whole": everything(family)}).items()):
        base = build(family, num_hidden_layers=layers)
        wanted[name] = logits_of(make_adapter(base, folder / name, seed=seed, **fields), ids)
    plain = avx2_machine(1)
    slow = tuple(node.model_copy(update={"read_bandwidth": (SLOW,)}) for node in plain.nodes)
    limit = GPU_RESERVE + vram if vram else None
    with emulated_gpu(compute_capability=89, devices=gpus):
        exe = hetcomp.compile(
            folder / "hf",
            plain.model_copy(update={"gpus": (gpu(),) * gpus, "nodes": slow}),
            formats=formats,
            context_length=CONTEXT,
            max_batch=BATCH,
            out=folder / "tiny.hetc",
            isa=("avx2",),
            wishes=PlanWishes(pins=_PINS[placement], vram=limit, adapter_room=room, **wishes),
        )
        yield Loaded(exe, folder, ids, wanted)
        exe.runtime.close()


def check(model: Loaded, name: str, tolerance: float = TOLERANCE) -> None:
    """A loaded adapter gives peft's logits, in prompts and token by token, and the base is as before."""
    before = model.exe(model.ids)
    assert relative_error(model.wanted[None], model.wanted[name]) > 0.05  # the adapter matters
    model.exe.load_adapter(model.folder / name)
    assert relative_error(model.exe(model.ids, adapter=name), model.wanted[name]) < tolerance
    assert relative_error(model.decoded(name), model.wanted[name][3:]) < tolerance
    np.testing.assert_array_equal(model.exe(model.ids), before)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """All of it on the GPU; room for two adapters of four."""
    adapters = {
        "whole": everything("qwen3_moe"),
        "attention": {"target_modules": ["q_proj", "o_proj"], "r": 8},
        "down": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 5, "use_rslora": True},
        "large": {"target_modules": ["q_proj"], "r": 9},
    }
    with compiled(tmp_path_factory.mktemp("gpu"), "gpu", adapters=adapters) as model:
        yield model


@pytest.mark.slow
def test_everything_on_the_gpu(on_gpu):
    check(on_gpu, "whole")
    on_gpu.exe.unload_adapter("whole")


@pytest.mark.slow
def test_a_batch_with_adapters_is_single_runs(on_gpu):
    """Also while another adapter comes and goes; what others have changes nothing."""
    exe = on_gpu.exe
    for name in ("whole", "attention"):
        exe.load_adapter(on_gpu.folder / name)
    names = ["attention", None, "whole"]
    single = [on_gpu.decoded(name, prompt=7) for name in names]
    sessions = [exe.runtime.session(name) for name in names]
    rows = [[session.prefill(on_gpu.ids[:7])] for session in sessions]
    for i in on_gpu.ids[7:]:
        with pytest.raises(HetcompError, match="no room for the adapter down: all 2 adapters"):
            exe.load_adapter(on_gpu.folder / "down")
        for row, logits in zip(rows, exe.runtime.decode(sessions, [i] * 3), strict=True):
            row.append(logits)
    for row, alone, name in zip(rows, single, names, strict=True):
        assert relative_error(np.stack(row), alone) < 1e-5, name
        assert relative_error(np.stack(row), on_gpu.wanted[name][6:]) < TOLERANCE, name
    for session in sessions:
        session.close()
    # Now the one whose use is longest ago makes room, and comes back when it is wanted.
    exe.load_adapter(on_gpu.folder / "down")
    assert [a["name"] for a in exe.runtime.adapters() if not a["resident"]] == ["attention"]
    assert relative_error(exe(on_gpu.ids, adapter="down"), on_gpu.wanted["down"]) < TOLERANCE
    assert relative_error(exe(on_gpu.ids, adapter="attention"), on_gpu.wanted["attention"]) < TOLERANCE
    for adapter in exe.runtime.adapters():
        exe.unload_adapter(adapter["name"])


@pytest.mark.slow
def test_a_permuted_adapter_gives_other_logits(on_gpu, tmp_path):
    bad = tmp_path / "permuted"
    shutil.copytree(on_gpu.folder / "whole", bad)

    def turned(name: str, tensor: Any) -> Any:
        if ".experts." not in name or "lora_B" not in name:
            return tensor
        out, columns = tensor.shape
        return tensor.reshape(out, columns // 8, 8).transpose(1, 2).reshape(out, columns).contiguous()

    save_file({n: turned(n, t) for n, t in load_file(bad / TENSORS).items()}, bad / TENSORS)
    on_gpu.exe.load_adapter(bad)
    assert relative_error(on_gpu.exe(on_gpu.ids, adapter="permuted"), on_gpu.wanted["whole"]) > 100 * TOLERANCE
    on_gpu.exe.unload_adapter("permuted")


@pytest.mark.slow
def test_ranks_beyond_the_room_are_refused(on_gpu):
    with pytest.raises(HetcompError, match=r"large has rank 9 at .*q_proj.*at most 8 .*--adapter-rank"):
        on_gpu.exe.load_adapter(on_gpu.folder / "large")
    assert on_gpu.exe.runtime.adapters() == []


@contextmanager
def streaming_all(slots: int) -> Iterator[None]:
    """Plans by which prompts stream all experts that are on the CPU, in waves."""
    real = stream_experts.stream_experts.function

    def function(plan: Plan, context: stream_experts.Context) -> Plan:
        made = real(plan, context)
        assert made.stream is not None
        return replace(made, stream=replace(made.stream, slots=slots, rates=ALL))

    patched = replace(stream_experts.stream_experts, function=function)
    with pytest.MonkeyPatch.context() as patch:
        passes = tuple(patched if p.name == "stream_experts" else p for p in pipeline.PIPELINE)
        patch.setattr(pipeline, "PIPELINE", passes)
        yield


@pytest.mark.slow
def test_experts_on_the_cpu_and_streamed(tmp_path):
    """The same experts are computed by the CPU in decode, and by the GPU in prompts."""
    with streaming_all(3), compiled(tmp_path, "experts") as model:
        check(model, "whole")
        assert model.exe.stats["gpu"]["streamed"]["experts_copied"] > 0


@pytest.mark.slow
def test_experts_on_both_sides(tmp_path):
    with compiled(tmp_path, "split", layers=3, vram=700_000) as model:
        placed = [p for call in model.exe.plan.calls for _, p in call.placements]
        assert any(len({run.device for run in p.experts}) > 1 for p in placed)
        check(model, "whole")


@pytest.mark.slow
def test_layers_on_two_gpus(tmp_path):
    """Each has the pairs of its own layers; the experts of one of them are the CPU's."""
    with compiled(tmp_path, "two gpus", gpus=2) as model:
        check(model, "whole")


@pytest.mark.slow
def test_experts_in_slots_of_a_cache(tmp_path):
    with compiled(tmp_path, "experts", expert_cache="lru") as model:
        check(model, "whole")
        assert model.exe.stats["gpu"]["cache"]["hits"] > 0


@pytest.mark.slow
def test_deferred_experts_add_their_pairs_one_layer_later(tmp_path):
    """Against the definition of deferral on the model that peft has merged the adapter into."""
    with compiled(tmp_path, "experts", deferral=1) as model:
        wrapped = make_adapter(
            build("qwen3_moe", num_hidden_layers=LAYERS), tmp_path / "again", **everything("qwen3_moe")
        )
        ids = torch.tensor([model.ids])
        want = deferred_logits(wrapped.merge_and_unload(), ids, model.exe.plan, range(4, CONTEXT))[3:]
        assert relative_error(want, model.wanted["whole"][3:]) > 100 * TOLERANCE  # deferral matters
        model.exe.load_adapter(model.folder / "whole")
        assert relative_error(model.decoded("whole"), want) < TOLERANCE


@pytest.mark.slow
def test_latent_attention_and_shared_experts(tmp_path):
    with compiled(tmp_path, "gpu", family="deepseek_v3") as model:
        check(model, "whole")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_pairs_in_bf16_beside_q8(tmp_path):
    """Token by token the products are f32's, in prompts bf16's, which changes the choice of experts where the router's
    logits are nearly equal: of one token at most. Weights of 8 bits are near those of the whole model."""
    with compiled(tmp_path, "gpu", formats="q8") as model:
        model.exe.load_adapter(model.folder / "whole")
        prompt, decoded = model.exe(model.ids, adapter="whole"), model.decoded("whole", prompt=1)

        def by_token(got: np.ndarray, want: np.ndarray) -> list[float]:
            return sorted(np.abs(got - want).max(axis=1) / np.abs(want).max())

        assert by_token(prompt, decoded)[-2] < BF16_TOLERANCE
        assert by_token(decoded, model.wanted["whole"])[-2] < 3 * BF16_TOLERANCE
        assert by_token(model.exe(model.ids), model.wanted["whole"])[1] > 10 * BF16_TOLERANCE


@pytest.mark.slow
def test_without_room_for_what_a_gpu_computes(tmp_path):
    """An adapter of experts that only the CPU computes needs none: prompts do not stream then."""
    attention = {"target_modules": ["q_proj"]}
    adapters = {"experts": EXPERTS, "attention": attention}
    with streaming_all(8), compiled(tmp_path, "experts", room=None, adapters=adapters) as model:
        with pytest.raises(HetcompError, match=r"q_proj.*gpu:0 computes.*without room for adapters.*--adapters N"):
            model.exe.load_adapter(model.folder / "attention")
        copied = model.exe.stats["gpu"]["streamed"]["experts_copied"]
        model.exe.load_adapter(model.folder / "experts")
        got = model.exe(model.ids, adapter="experts")
        assert relative_error(got, model.wanted["experts"]) < TOLERANCE
        assert model.exe.stats["gpu"]["streamed"]["experts_copied"] == copied == 0
        assert relative_error(model.decoded("experts"), model.wanted["experts"][3:]) < TOLERANCE
        model.exe(model.ids)
        assert model.exe.stats["gpu"]["streamed"]["experts_copied"] > 0


@pytest.fixture
def linears_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placed apart from what makes their input, which such small ones are not."""
    for module in (placement_groups, stream_weights):
        monkeypatch.setattr(module, "SMALL_BYTES", 512)


def test_linears_that_are_streamed_in_prompts_of_the_base_alone(tmp_path: Path, linears_by_themselves: None):
    adapters = {"whole": everything("qwen3_moe"), "out": {"target_modules": ["o_proj"], "r": 4}}
    with compiled(tmp_path, "linears on the cpu", adapters=adapters) as model:
        assert model.exe.plan.weight_stream is not None
        for name in adapters:  # one of both sides, one of the CPU alone
            check(model, name)
            streamed = model.exe.stats["gpu"]["streamed_weight_bytes"]
            model.exe(model.ids, adapter=name)
            assert model.exe.stats["gpu"]["streamed_weight_bytes"] == streamed > 0
        model.exe(model.ids)
        assert model.exe.stats["gpu"]["streamed_weight_bytes"] == streamed + model.exe.plan.weight_stream.bytes


def test_without_room_linears_that_are_streamed_cannot_be_changed(tmp_path: Path, linears_by_themselves: None):
    adapters = {"out": {"target_modules": ["o_proj"], "r": 4}}
    with compiled(tmp_path, "linears on the cpu", room=None, adapters=adapters) as model:
        with pytest.raises(HetcompError, match=r"o_proj.*without room for adapters there"):
            model.exe.load_adapter(model.folder / "out")
