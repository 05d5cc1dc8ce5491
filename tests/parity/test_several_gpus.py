"""Families whose layers are on two GPUs, some of them with experts on the CPU, against transformers in float32: kernels
run in Triton's interpreter, each on its GPU's own memory; graphs, hand-overs and the CPU's part are real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

import hetcomp
from hetcomp.compiler import plan_model
from hetcomp.executable import Executable
from hetcomp.ir.annotations import ExpertPlacement, Placement
from hetcomp.ir.hand_overs import hand_overs
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.ops import MoeExperts
from hetcomp.ir.plan import Call, Plan
from hetcomp.ir.serialise import to_json
from hetcomp.passes.insert_transfers import insert_transfers
from hetcomp.passes.placement_problem import GPU_RESERVE
from hetcomp.passes.plan_memory import plan_memory
from hetcomp.passes.schedule import schedule
from hetcomp.passes.simulate import simulate
from hetcomp.plan_wishes import PlanWishes
from hetcomp.runtime import Runtime, RuntimeRefusal
from hetcomp.runtime_abi import Status
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.parity.test_gpu_families import CONTEXT, MAX_BATCH, SLOW
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids

pytestmark = pytest.mark.spread("pair")
_LAYERS = ("*@0=gpu:0", "*@1-2=gpu:1")
PINS: Mapping[str, tuple[str, ...]] = {
    "layers": _LAYERS,
    "experts": (*_LAYERS, "moe.experts=cpu"),  # of both GPUs' layers
    "there and back": ("*@0=gpu:1", "*@1=gpu:0", "*@2=gpu:1", "moe.experts@2=cpu"),
    "around the CPU": ("*@0=gpu:0", "*@1=cpu", "*@2=gpu:1"),
    "split": (),  # as many layers as there is room for, and of their experts
}


@dataclass(frozen=True)
class Case:
    """A tiny model, where it is (``PINS``), and bytes of each GPU's memory, 0: enough."""

    family: str
    placement: str
    vram: int = 0
    odd: bool = False

    def __str__(self) -> str:
        return f"{self.family}{'-odd' if self.odd else ''}-{self.placement}".replace(" ", "-")


CASES = [
    Case("qwen3_moe", "layers", odd=True),
    Case("gpt_oss", "experts", odd=True),
    Case("gpt_oss", "split", 700_000),
    Case("deepseek_v3", "there and back", odd=True),
    Case("glm4_moe", "around the CPU"),
]


def compile_tiny(folder: Path, case: Case) -> Executable:
    """The model in ``folder``/hf for a CPU with AVX2, whose memory is slow, and two GPUs."""
    plain = avx2_machine(1)
    slow = tuple(node.model_copy(update={"read_bandwidth": (SLOW,)}) for node in plain.nodes)
    machine = plain.model_copy(update={"gpus": (gpu(), gpu()), "nodes": slow})
    return hetcomp.compile(
        folder / "hf",
        machine,
        formats="f32",
        context_length=CONTEXT,
        max_batch=MAX_BATCH,
        out=folder / "tiny.hetc",
        isa=("avx2",),
        wishes=PlanWishes(pins=PINS[case.placement], vram=GPU_RESERVE + case.vram if case.vram else None),
    )


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Executable]]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(str(case))
    model = save_tiny(case.family, folder / "hf", odd=case.odd)
    with emulated_gpu(compute_capability=89, devices=2):
        exe = compile_tiny(folder, case)
        assert on_gpu(exe.plan) == ("gpu:0", "gpu:1")
        experts = {run.device for call in exe.plan.calls for _, p in call.placements for run in p.experts}
        assert ("cpu:0" in experts) == (case.placement != "layers")
        yield model, exe
        exe.runtime.close()


@pytest.mark.slow
def test_a_prompt_and_decode_behind_it(pair):
    model, exe = pair
    ids = token_ids(model, 11, seed=3)
    with exe.runtime.session() as session:
        rows = [session.prefill(ids[0, :8].tolist())]
        rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 8:]]
    want = reference_logits(model, ids)
    assert relative_error(np.stack(rows), want[7:]) < TOLERANCE
    assert relative_error(exe(ids[0].tolist()), want) < TOLERANCE


@pytest.mark.slow
def test_sessions_of_different_lengths_in_one_batch(pair):
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
def test_greedy_tokens_and_what_is_reported_of_each_gpu(pair):
    model, exe = pair
    ids = token_ids(model, 5, seed=8)[0].tolist()
    token = next(iter(exe.generate(ids, max_new_tokens=1, ignore_eos=True)))
    assert token.id == int(exe(ids)[-1].argmax())
    info = exe.runtime.info
    assert [g.name for g in info.gpus] == ["Fake GPU", "Fake GPU 2"] and all(g.bytes > 0 for g in info.gpus)
    assert info.gpu == "Fake GPU, Fake GPU 2" and info.gpu_bytes == sum(g.bytes for g in info.gpus)
    devices = exe.stats["gpu"]["devices"]
    assert devices == [{"name": g.name, "number": g.number, "bytes": g.bytes} for g in info.gpus]


@pytest.mark.slow
def test_layers_with_attention_on_one_gpu_and_experts_on_another(tmp_path):
    """An edited plan: of every layer the attention is on gpu:0, the rest on gpu:1, the last layer's experts on the
    CPU."""
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    machine = avx2_machine(1).model_copy(update={"gpus": (gpu(), gpu())})
    wanted = {"formats": "f32", "isa": ("avx2",), "context_length": CONTEXT, "max_batch": MAX_BATCH}
    found = plan_model(tmp_path / "hf", hw_profile=machine, planning=False, stop_after="slice_numa", **wanted)
    plan = replace(found.plan, calls=tuple(_attention_apart(call, found.plan) for call in found.plan.calls))
    for step in (insert_transfers, schedule, plan_memory, simulate):
        plan = step(plan, found.context)
    (tmp_path / "plan.json").write_text(to_json(plan))
    ids = token_ids(model, 7)
    with emulated_gpu(compute_capability=89, devices=2):
        exe = hetcomp.compile(tmp_path / "hf", machine, plan=tmp_path / "plan.json", **wanted)
        crossings = {(h.giver, h.taker) for h in hand_overs(exe.plan)}
        assert crossings == {("gpu:0", "gpu:1"), ("gpu:1", "gpu:0"), ("gpu:1", "cpu")}
        with exe.runtime.session() as session:
            rows = [session.prefill(ids[0, :5].tolist())]
            rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 5:]]
        exe.runtime.close()
    assert relative_error(np.stack(rows), reference_logits(model, ids)[4:]) < TOLERANCE


def _attention_apart(call: Call, plan: Plan) -> Call:
    placements = []
    for op in plan.template(call.template).ops:
        device = "gpu:0" if call.layer is None or op.role.startswith("attn") else "gpu:1"
        home = "cpu:0" if call.layer == 2 else device
        experts = (ExpertPlacement(0, op.attrs.experts - 1, home),) if isinstance(op.attrs, MoeExperts) else ()
        placements.append((op.id, Placement(device, experts)))
    return replace(call, placements=tuple(placements))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a program for each of two GPUs."""
    folder = tmp_path_factory.mktemp("layers")
    save_tiny("qwen3_moe", folder / "hf")
    with emulated_gpu(compute_capability=89, devices=2):
        return compile_tiny(folder, Case("qwen3_moe", "layers")).path


@pytest.mark.slow
def test_machines_that_do_not_have_what_two_gpus_need(layers):
    with emulated_gpu(compute_capability=89):
        with pytest.raises(RuntimeRefusal, match="no GPU 1: the driver shows 1") as refused:
            Runtime.load(layers)
        assert refused.value.status is Status.MISSING_ISA
    with emulated_gpu(compute_capability=89, devices=2, free_bytes=1 << 30, taken_of_others=(1 << 30) - 1000):
        with pytest.raises(RuntimeRefusal, match=r"Fake GPU 2 \(GPU 1\) has 1.0 KB free") as refused:
            Runtime.load(layers)
        assert refused.value.status is Status.OUT_OF_MEMORY
        with pytest.raises(RuntimeRefusal, match="no GPU 2"):
            Runtime.load(layers, gpus=(0, 2))
        with pytest.raises(RuntimeRefusal, match="compiled for 2 GPUs, 1 are given"):
            Runtime.load(layers, gpus=(0,))


@pytest.mark.slow
def test_gpus_of_the_users_choice(layers):
    with emulated_gpu(compute_capability=89, devices=3):
        for gpus in ((2, 1), (1, 1)):
            runtime = Runtime.load(layers, gpus=gpus, threads=1)
            assert [g.number for g in runtime.info.gpus] == list(gpus)
            assert np.isfinite(runtime.forward([3, 4, 5])).all()
            runtime.close()
