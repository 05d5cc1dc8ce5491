"""Weights of linear layers that are streamed to the GPU in long steps of a prompt give what resident ones give: whole
artifacts on the emulated GPU against transformers in float32, and against plans with everything on the GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import hetcomp
from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.lane_trace import traced_steps
from hetcomp.passes import placement_groups, stream_weights
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids
from tests.sampled_cases import rest

TOKENS, CONTEXT = 40, 64
MLP = ("mlp.gate=cpu", "mlp.up=cpu", "mlp.down=cpu")


@dataclass(frozen=True)
class Case:
    """``pins`` behind everything's on the one GPU, or all of them."""

    family: str
    name: str
    pins: tuple[str, ...]
    gpus: int = 1

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


CASES = [
    Case("qwen3_moe", "one linear a layer", ("attn.o=cpu",)),
    Case("qwen3_moe", "to the residual", ("attn.q=cpu", "attn.o=cpu", "residual=cpu", "moe.norm=cpu", "attn.norm=cpu")),
    Case("deepseek_v3", "beside streamed experts", ("attn.q_a=cpu", "attn.kv_a=cpu", *MLP, "moe.experts=cpu")),
    Case("gpt_oss", "with biases", ("attn.q=cpu", "attn.v=cpu", "attn.o=cpu")),
    Case("qwen3_moe", "on two GPUs", ("*@0=gpu:0", "*@1-2=gpu:1", "attn.o=cpu", "attn.k=cpu"), gpus=2),
]


@pytest.fixture(autouse=True)
def linears_by_themselves(monkeypatch: pytest.MonkeyPatch):
    """Placed apart from what makes their input, which such small ones are not."""
    for module in (placement_groups, stream_weights):
        monkeypatch.setattr(module, "SMALL_BYTES", 512)


def build(folder: Path, case: Case, formats: str = "f32", slow: bool = True) -> tuple[object, Executable]:
    """``slow``: the CPU, so that copies gain in all prompts; else none do."""
    model = save_tiny(case.family, folder / "hf", odd=False)
    plain = avx2_machine(1)
    reads = BandwidthPoint(threads=4, gb_per_s=0.01 if slow else 1e6)
    nodes = tuple(node.model_copy(update={"read_bandwidth": (reads,)}) for node in plain.nodes)
    machine = plain.model_copy(update={"gpus": (gpu(),) * case.gpus, "nodes": nodes})
    pins = case.pins if case.gpus > 1 else ("*=gpu:0", *case.pins)
    exe = hetcomp.compile(
        folder / "hf",
        machine,
        formats=formats,
        context_length=CONTEXT,
        max_batch=2,
        out=folder / "tiny.hetc",
        isa=("avx2",),
        wishes=PlanWishes(pins=pins),
    )
    return model, exe


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_of_transformers_in_prompts_and_in_decode(case: Case, tmp_path: Path):
    with emulated_gpu(compute_capability=89, devices=case.gpus):
        model, exe = build(tmp_path, case)
        stream = exe.plan.weight_stream
        assert stream is not None and stream.tokens <= 18
        ids = token_ids(model, TOKENS)
        expected = reference_logits(model, ids)
        session = exe.runtime.session()
        found = [session.forward(ids[0, :18].tolist()), session.forward(ids[0, 18:38].tolist())]
        streamed = exe.stats["gpu"]["streamed_weight_bytes"]
        found += [session.forward(ids[0, 38:39].tolist()), session.forward(ids[0, 39:].tolist())]
        after_decode = exe.stats["gpu"]["streamed_weight_bytes"]
        session.close()
        exe.runtime.close()
    assert relative_error(np.concatenate(found), expected) < TOLERANCE
    assert streamed == after_decode == 2 * stream.bytes  # of the two prompts alone


@pytest.mark.parametrize("formats", ["q4", *rest(["f32"])])
def test_the_bytes_of_resident_weights(formats: str, tmp_path: Path):
    found = []
    with emulated_gpu(compute_capability=89):
        for name, pins in (("resident", ()), ("streamed", CASES[1].pins)):
            model, exe = build(tmp_path / name, Case("qwen3_moe", name, pins), formats)
            found.append(exe(token_ids(model, TOKENS)[0].tolist()).tobytes())
            assert ("streamed_weight_bytes" in exe.stats["gpu"]) == bool(pins)
            exe.runtime.close()
    assert found[0] == found[1]


def test_the_cpu_keeps_what_it_does_faster(tmp_path: Path):
    with emulated_gpu(compute_capability=89):
        model, exe = build(tmp_path, CASES[0], slow=False)
        assert exe.plan.weight_stream is None
        ids = token_ids(model, TOKENS)
        assert relative_error(exe(ids[0].tolist()), reference_logits(model, ids)) < TOLERANCE
        exe.runtime.close()


def test_through_the_ring_of_pinned_memory_and_in_traces(tmp_path: Path):
    found = []
    with emulated_gpu(compute_capability=89):
        model, exe = build(tmp_path, CASES[1])
        path, ids = exe.path, token_ids(model, TOKENS)[0].tolist()
        exe.runtime.close()
    for refuse in (False, True):
        with emulated_gpu(compute_capability=89, refuse_pinning=refuse):
            exe = hetcomp.load(path)
            with traced_steps(exe.runtime) as steps:
                found.append(exe(ids).tobytes())
            assert sum(e.bytes for e in steps[0].gpu_events) == exe.stats["gpu"]["streamed_weight_bytes"] > 0
            exe.runtime.close()
    assert found[0] == found[1]
    with emulated_gpu(compute_capability=89, refuse_pinning=True, most_pinned=1 << 20):
        with pytest.raises(HetcompError, match="Prompts need weights of the CPU on the GPU"):
            hetcomp.load(path)


def test_every_copy_waits_for_the_readers_of_its_place(tmp_path: Path):
    """Portions that lie in one place of the ring, one after the other."""
    with emulated_gpu(compute_capability=89):
        _, exe = build(tmp_path, CASES[1])
        exe.runtime.close()
    program = json.loads((exe.path / "gpu/program-0.json").read_text())
    (ring,) = (b["bytes"] for b in program["buffers"] if b["name"] == program["weight_stream"]["buffer"])
    portions = next(g["portions"] for g in program["graphs"] if "portions" in g)
    assert len(portions) > 4
    spans: list[tuple[int, int]] = []
    for i, portion in enumerate(portions):
        start = min(c["to"] for c in portion["copies"])
        stop = max(c["to"] + c["bytes"] for c in portion["copies"])
        assert stop <= ring
        overlapping = [j for j, (a, b) in enumerate(spans) if a < stop and start < b]
        waits = portion["after"] - portions[0]["flag"] if "after" in portion else -1
        assert waits >= max(overlapping, default=-1) and waits < i
        spans.append((start, stop))
    assert any("after" in portion for portion in portions)
