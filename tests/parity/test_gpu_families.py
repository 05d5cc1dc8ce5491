"""Families with a GPU in the plan against transformers in float32: the kernels run in Triton's interpreter, the CPU's
part, the graphs and all hand-overs are real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

import hetcomp
from hetcomp.backends import packing
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference import gguf_models, tiny_models
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids
from tests.sampled_cases import rest

pytestmark = pytest.mark.spread("pair")

CONTEXT = 32
MAX_BATCH = 3  # sequences; the graphs of exact rows are then for 1, 2 and 4
# The CPU's memory takes so long to read that what is not pinned goes to the GPU as long as it fits.
SLOW = BandwidthPoint(threads=4, gb_per_s=0.01)


PINS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("*=cpu",),
    "gpu": ("*=gpu:0",),  # all of it
    "experts": ("*=gpu:0", "moe.experts=cpu"),
    "layer": ("*@0=gpu:0", "*@1=cpu", "*@2=gpu:0"),
    "split": (),  # about half of the experts, as much as there is room for
}
# Every format in the decode kernels of two roles.
MIXTURES = (
    {"experts": "q4", "attention": "q8", "dense": "mxfp4", "router": "fp8", "embedding": "bf16", "kv": "f32"},
    {"experts": "mxfp4", "attention": "fp8", "dense": "bf16", "router": "q8", "embedding": "q4", "kv": "f32"},
)
# GEMMs round activations to bf16, 8 bits: a product is off by 2^-9 at most, a logit by a few times that.
BF16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """A tiny model, where it is (``PINS``), bytes of the GPU's memory, 0: enough, and the CPU's NUMA nodes."""

    family: str
    odd: bool
    placement: str
    vram: int = 0
    nodes: int = 1

    def __str__(self) -> str:
        nodes = f"-{self.nodes}nodes" if self.nodes > 1 else ""
        return f"{self.family}{'-odd' if self.odd else ''}-{self.placement}{nodes}"


def compile_tiny(
    folder: Path,
    placement: str,
    vram: int = 0,
    formats: str | Mapping[str, str] = "f32",
    max_batch: int = MAX_BATCH,
    nodes: int = 1,
    adapter_room: AdapterRoom | None = None,
    model: str = "hf",
    **options: Any,
) -> Executable:
    """``folder``/``model`` for CPUs with AVX2 and one GPU. options: of compile."""
    plain = avx2_machine(nodes)
    slow = tuple(node.model_copy(update={"read_bandwidth": (SLOW,)}) for node in plain.nodes)
    machine = plain.model_copy(update={"gpus": (gpu(),), "nodes": slow})
    wishes = PlanWishes(pins=PINS[placement], vram=GPU_RESERVE + vram if vram else None, adapter_room=adapter_room)
    return hetcomp.compile(
        folder / model,
        machine,
        formats=formats,
        context_length=CONTEXT,
        max_batch=max_batch,
        out=folder / "tiny.hetc",
        isa=("avx2",),
        wishes=wishes,
        **options,
    )


CASES = [
    Case("qwen3_moe", False, "gpu"),
    Case("gpt_oss", True, "gpu"),
    Case("deepseek_v3", True, "gpu"),
    Case("phimoe", False, "gpu"),
    Case("qwen3_moe", True, "experts"),
    Case("deepseek_v3", False, "experts"),
    Case("qwen3_next", True, "experts"),
    Case("qwen3_5", True, "layer"),
    Case("gpt_oss", False, "split", 900_000, nodes=2),  # of some experts each node has a slice, biases too
]
# Other families with the same ops in the same places.
MORE = [
    Case("mixtral", True, "gpu"),
    Case("llama", True, "gpu"),
    Case("qwen3_next", False, "gpu"),
    Case("qwen3_5_moe", False, "gpu"),
    Case("glm4_moe", True, "experts"),
    Case("qwen3", False, "layer"),
    Case("qwen2_moe", False, "split", 900_000),
    Case("gpt_oss", False, "split", 900_000),
]


@pytest.fixture(scope="module", params=[*CASES, *rest(MORE)], ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Executable]]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(str(case))
    model = save_tiny(case.family, folder / "hf", odd=case.odd)
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(folder, case.placement, case.vram, nodes=case.nodes)
        if case.placement == "split":
            assert any(_is_split(exe, call) for call in range(len(exe.plan.calls)))
        yield model, exe
        exe.runtime.close()


def _is_split(exe: Executable, call: int) -> bool:
    placed = [p for _, p in exe.plan.calls[call].placements]
    return any(len({e.device for e in p.experts}) > 1 for p in placed)


@pytest.mark.slow
def test_a_prompt_of_several_tokens(pair):
    model, exe = pair
    ids = token_ids(model, 9)
    assert relative_error(exe(ids[0].tolist()), reference_logits(model, ids)) < TOLERANCE


@pytest.mark.slow
def test_decode_behind_a_prompt_and_prompts_behind_what_is_left(pair):
    model, exe = pair
    ids = token_ids(model, 11, seed=3)
    want = reference_logits(model, ids)
    with exe.runtime.session() as session:
        rows = [session.prefill(ids[0, :4].tolist())]
        rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 4:7]]
        assert relative_error(np.stack(rows), want[3:7]) < TOLERANCE
        session.truncate(2)
        rows = [session.prefill(ids[0, part].tolist()) for part in (slice(2, 8), slice(8, 11))]
    assert relative_error(np.stack(rows), want[[7, 10]]) < TOLERANCE


@pytest.mark.slow
def test_sessions_of_different_lengths_in_one_batch(pair):
    """Three sessions in the graph of four rows, twice: what the fourth row writes shows in the second step."""
    model, exe = pair
    texts = [token_ids(model, n + 2, seed=n) for n in (1, 4, 7)]
    sessions = [exe.runtime.session() for _ in texts]
    for session, ids in zip(sessions, texts, strict=True):
        session.prefill(ids[0, :-2].tolist())
    for step in (-2, -1):
        rows = exe.runtime.decode(sessions, [int(ids[0, step]) for ids in texts])
        want = np.stack([reference_logits(model, ids)[step] for ids in texts])
        assert relative_error(rows, want) < TOLERANCE
    for session in sessions:
        session.close()


@pytest.mark.slow
@pytest.mark.parametrize("formats", MIXTURES, ids=lambda formats: formats["experts"])
def test_formats_are_the_numbers_that_their_codes_stand_for(formats, tmp_path):
    model = save_tiny("qwen2_moe", tmp_path / "hf")
    ids = token_ids(model, 9)
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(tmp_path, "gpu", formats=formats, max_batch=1)
        prompt = exe(ids[0].tolist())
        with exe.runtime.session() as session:
            decoded = np.concatenate([exe.runtime.decode([session], [int(i)]) for i in ids[0]])
        exe.runtime.close()
    decode_weights(model, exe)
    want = reference_logits(model, ids)
    assert relative_error(decoded, want) < TOLERANCE
    assert relative_error(prompt, want) < BF16_TOLERANCE


@pytest.mark.slow
def test_k_blocks_of_a_gguf_file_on_both_sides(tmp_path):
    """As Q4_K_M mixes them, some of the routed experts on the GPU, the others on the CPU. Beside float32's order of
    summation, decoding rounds what the CPU multiplies to int8 by group of 32: by up to 1/254 of its largest number
    before each of an expert's two products, which is some 1 % of a layer's sum. A prompt's GEMMs round to bf16 on top.
    """
    q6k = ("ffn_down", "attn_v", "token_embd")
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 8, "num_hidden_layers": 1}
    model = tiny_models.build("qwen3_moe", **wide)
    kind = lambda name: Type.Q6_K if any(part in name for part in q6k) else Type.Q4_K  # noqa: E731
    gguf_models.write(tmp_path / "m.gguf", model, kind)
    ids = token_ids(model, 6)
    with emulated_gpu(compute_capability=89) as machine:
        exe = compile_tiny(tmp_path, "split", 1_500_000, "auto", max_batch=1, model="m.gguf")
        assert any(_is_split(exe, call) for call in range(len(exe.plan.calls)))
        experts = {v.fqn.split(".")[-1]: v.format for v in exe.plan.values if v.fqn and ".experts." in v.fqn}
        assert experts == {"gate_up_proj": "q4k", "down_proj": "q6k"}
        with exe.runtime.session() as session:
            rows = [session.prefill(ids[0, :3].tolist())]
            rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 3:]]
        launched = set(machine.launches)
        exe.runtime.close()
    for kernel in ("gate_up", "down", "gate_up_tile16", "down_tile16"):  # of a step of one token, of a prompt
        assert f"experts_q4k_q6k_5x256x256_{kernel}" in launched  # five of the eight experts
    assert relative_error(np.stack(rows), reference_logits(model, ids)[2:]) < BF16_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", *rest(["qwen3"])])
def test_fp8_caches_hold_on_the_gpu_what_they_do_on_the_cpu(family, tmp_path):
    """Beside them the GPU rounds queries and probabilities to bf16; the CPU does not."""
    formats = {"experts": "f32", "attention": "f32", "dense": "f32", "embedding": "f32", "kv": "fp8"}
    rows = {}
    for where in ("cpu", "gpu"):
        model = save_tiny(family, tmp_path / where / "hf", num_hidden_layers=2)
        ids = token_ids(model, 9)[0].tolist()
        with emulated_gpu(compute_capability=89):
            exe = compile_tiny(tmp_path / where, where, formats=formats, max_batch=1)
            with exe.runtime.session() as session:
                rows[where] = [session.prefill(ids[:6])]
                rows[where] += [exe.runtime.decode([session], [i])[0] for i in ids[6:]]
            exe.runtime.close()
    assert relative_error(np.stack(rows["gpu"]), np.stack(rows["cpu"])) < BF16_TOLERANCE


@pytest.mark.slow
def test_linear_attention_in_chunks_behind_weights_that_are_rounded(tmp_path):
    """Prompts against the same tokens one by one, which nothing rounds: products with weights and chunks both are off
    by up to six roundings to bf16 a layer (tests/unit/test_gpu_kernels_linear_attention.py). No router, which they
    could tip where two experts are nearly equal."""
    model = save_tiny("qwen3_5", tmp_path / "hf")
    ids = token_ids(model, 11)[0].tolist()
    formats = {"attention": "bf16", "dense": "bf16", "embedding": "f32", "kv": "f32"}
    with emulated_gpu(compute_capability=89):
        exe = compile_tiny(tmp_path, "gpu", formats=formats, max_batch=1)
        with exe.runtime.session() as session:
            decoded = np.concatenate([exe.runtime.decode([session], [i]) for i in ids])
            session.truncate(0)
            prompts = np.stack([session.prefill(ids[:6]), session.prefill(ids[6:])])
        exe.runtime.close()
    layers = len(model.config.layer_types)
    assert 1e-4 < relative_error(prompts, decoded[[5, 10]]) < 2 * layers * 6 * 2.0**-9


@torch.no_grad()
def decode_weights(model: PreTrainedModel, exe: Executable) -> None:
    """Makes the model's weights what is left of them in the executable's formats."""
    parameters = dict(model.named_parameters())
    packed = [v for v in exe.plan.values if v.fqn in parameters and v.format is not None]
    assert {v.format for v in packed} >= {"q4", "q8", "mxfp4", "fp8", "bf16"}
    for value in packed:
        parameter = parameters[value.fqn]
        if parameter.dim() > 1:
            data, _ = packing.pack(parameter.numpy(), value)
            parameter.copy_(torch.from_numpy(packing.unpack(data, value)).reshape(parameter.shape))
