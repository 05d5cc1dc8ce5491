"""Experts that are streamed to the GPU in steps of a prompt give what resident ones give: whole artifacts on the
emulated GPU against transformers in float32, with rates by which all, some or none are streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import hetcomp
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.ir.annotations import StreamRates
from hetcomp.ir.plan import Plan
from hetcomp.lane_trace import traced_steps
from hetcomp.passes import stream_experts
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.parity.test_gguf_files import WIDE, mixed
from tests.parity.test_gpu_families import BF16_TOLERANCE
from tests.reference import gguf_models, tiny_models
from tests.reference import quantised_checkpoints as made
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids
from tests.unit.test_quantised_checkpoints import SMALL, gptq

TOKENS, CONTEXT = 40, 64
# An expert costs the CPU a hundred times as much as a copy; as much; next to nothing.
ALL = StreamRates(1.0, 100.0, ((1, 5000.0), (64, 5000.0)), ((1, 1.0), (64, 1.0)))
SOME = StreamRates(1.0, 100.0, ((1, 20.0), (64, 40.0)), ((1, 1.0), (64, 1.0)))
NONE = StreamRates(1e-3, 100.0, ((1, 0.001), (64, 0.001)), ((1, 1.0), (64, 1.0)))


@dataclass(frozen=True)
class Case:
    """``slots``: None for as many as the pass gives; ``pins`` beside everything's on the one GPU, or all."""

    family: str
    rates: StreamRates
    slots: int | None = None
    pins: tuple[str, ...] = ("moe.experts=cpu",)
    name: str = ""
    gpus: int = 1

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


CASES = [
    Case("qwen3_moe", ALL, name="all"),
    Case("qwen3_moe", SOME, name="some"),
    Case("qwen3_moe", NONE, name="none"),
    Case("qwen3_moe", ALL, slots=3, name="all in waves"),
    Case("gpt_oss", ALL, slots=3, name="all in waves with biases"),
    Case("gpt_oss", SOME, slots=2, name="some with biases"),
    Case("deepseek_v3", ALL, slots=2, name="all in waves beside shared experts"),
    Case("qwen3_moe", ALL, pins=("moe.experts@0=cpu", "moe.experts@2=cpu"), name="a resident layer between"),
    Case("qwen3_moe", ALL, pins=("*@0=gpu:0", "*@1-2=gpu:1", "moe.experts=cpu"), name="layers on two GPUs", gpus=2),
    Case("gpt_oss", SOME, 2, ("*@1=gpu:1", "*@0=gpu:0", "*@2=gpu:0", "moe.experts=cpu"), "there and back", gpus=2),
]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch):
    """Sets what the plan says of streaming."""

    def put(wanted: StreamRates, slots: int | None) -> None:
        real = stream_experts.stream_experts.function

        def function(plan: Plan, context: stream_experts.Context) -> Plan:
            made = real(plan, context)
            assert made.stream is not None
            return replace(made, stream=replace(made.stream, slots=slots or made.stream.slots, rates=wanted))

        patched = replace(stream_experts.stream_experts, function=function)
        from hetcomp.passes import pipeline

        passes = tuple(patched if p.name == "stream_experts" else p for p in pipeline.PIPELINE)
        monkeypatch.setattr(pipeline, "PIPELINE", passes)

    return put


def build(
    folder: Path, family: str, pins: tuple[str, ...], gpus: int = 1, formats: str = "f32"
) -> tuple[object, Executable]:
    return save_tiny(family, folder / "hf", odd=False), compiled(folder / "hf", folder, pins, gpus, formats)


def compiled(source: Path, folder: Path, pins: tuple[str, ...], gpus: int = 1, formats: str = "f32") -> Executable:
    plain = avx2_machine(1)
    slow = BandwidthPoint(threads=4, gb_per_s=0.01)
    nodes = tuple(node.model_copy(update={"read_bandwidth": (slow,)}) for node in plain.nodes)
    machine = plain.model_copy(update={"gpus": (gpu(),) * gpus, "nodes": nodes})
    return hetcomp.compile(
        source,
        machine,
        formats=formats,
        context_length=CONTEXT,
        max_batch=2,
        out=folder / "tiny.hetc",
        isa=("avx2",),
        wishes=PlanWishes(pins=pins if gpus > 1 else ("*=gpu:0", *pins)),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streamed_experts_give_the_logits_of_transformers(case: Case, tmp_path: Path, rates):
    rates(case.rates, case.slots)
    with emulated_gpu(compute_capability=89, devices=case.gpus):
        model, exe = build(tmp_path, case.family, case.pins, case.gpus)
        ids = token_ids(model, TOKENS)
        expected = reference_logits(model, ids)
        session = exe.runtime.session()
        # Two steps: in the second the slots still hold what the first has left.
        first = session.forward(ids[0, :22].tolist())
        second = session.forward(ids[0, 22:].tolist())
        streamed = exe.stats["gpu"]["streamed"]
        cpu_ms = exe.stats["prefill"]["timers_ms"]["moe.experts"]
        session.close()
        exe.runtime.close()
    assert relative_error(np.concatenate([first, second]), expected) < TOLERANCE
    if case.rates is NONE:
        assert streamed["experts_copied"] == 0
    elif case.rates is ALL:  # however few slots there are
        assert streamed["experts_copied"] >= streamed["experts_wanted"] > 0 and cpu_ms == 0
    else:
        assert 0 < streamed["experts_copied"] < streamed["experts_wanted"]


@pytest.mark.parametrize("formats", ["f32", "q4, order"])
def test_waves_give_the_bytes_of_resident_experts(formats: str, tmp_path: Path, rates):
    """Of columns in an order of their own (GPTQ) that comes with each expert."""
    found = []
    model = save_tiny("qwen3_moe", tmp_path / "f32")
    if formats != "f32":
        quantised, _ = made.write(tmp_path, "qwen3_moe", gptq(desc_act=True), made.gptq(act_order=True), **SMALL)
        quantised.rename(tmp_path / formats)
    with emulated_gpu(compute_capability=89):
        for folder, pins in ((tmp_path / "resident", ()), (tmp_path / "waves", ("moe.experts=cpu",))):
            if pins:
                rates(ALL, 3)
            exe = compiled(tmp_path / formats, folder, pins, formats=formats if formats == "f32" else "auto")
            found.append(exe(token_ids(model, TOKENS)[0].tolist()).tobytes())
            streamed = exe.stats["gpu"].get("streamed")
            exe.runtime.close()
            assert (streamed is None) == (not pins)
    assert streamed["experts_copied"] >= streamed["experts_wanted"] > 3 * 6  # of three layers, in waves of three
    assert found[0] == found[1]


def test_k_blocks_of_a_gguf_file_resident_and_in_waves(tmp_path: Path, rates):
    """Gate and up in Q4_K, down in Q6_K. Decoding, the numbers are those of the file; in a prompt they and the
    activations are rounded to bf16."""
    model = tiny_models.build("qwen3_moe", **WIDE | {"num_hidden_layers": 1})
    path, found = gguf_models.write(tmp_path / "m.gguf", model, mixed), []
    ids = token_ids(model, TOKENS)
    expected = reference_logits(model, ids)
    with emulated_gpu(compute_capability=89):
        for folder, pins in ((tmp_path / "resident", ()), (tmp_path / "waves", ("moe.experts=cpu",))):
            if pins:
                rates(ALL, 3)
            exe = compiled(path, folder, pins, formats="auto")
            assert {v.format for v in exe.plan.values if v.fqn and ".experts." in v.fqn} == {"q4k", "q6k"}
            session = exe.runtime.session()
            found.append(session.forward(ids[0, : TOKENS - 2].tolist()).tobytes())
            if not pins:
                decoded = [exe.runtime.decode([session], [int(i)]) for i in ids[0, TOKENS - 2 :]]
            session.close()
            exe.runtime.close()
    assert found[0] == found[1]
    prompt = np.frombuffer(found[0], np.float32).reshape(TOKENS - 2, -1)
    assert relative_error(prompt, expected[: TOKENS - 2]) < BF16_TOLERANCE
    # The cache is of bf16 numbers.
    assert relative_error(np.concatenate(decoded), expected[TOKENS - 2 :]) < BF16_TOLERANCE


def test_the_same_prompt_gives_the_same_bytes_and_copies(tmp_path: Path, rates):
    rates(SOME, None)
    with emulated_gpu(compute_capability=89):
        model, exe = build(tmp_path, "qwen3_moe", ("moe.experts=cpu",))
        ids = token_ids(model, TOKENS)[0].tolist()
        found = []
        for _ in range(3):
            exe.runtime.reset_stats()
            found.append((exe(ids).tobytes(), exe.stats["gpu"]["streamed"]))
        exe.runtime.close()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("rate", [ALL, SOME], ids=["all", "some"])
def test_through_the_ring_come_the_bytes_of_pinned_memory(rate: StreamRates, tmp_path: Path, rates):
    rates(rate, None)
    found = []
    with emulated_gpu(compute_capability=89):
        model, exe = build(tmp_path, "qwen3_moe", ("moe.experts=cpu",))
        path, ids = exe.path, token_ids(model, TOKENS)[0].tolist()
        exe.runtime.close()
    for refuse in (False, True):
        with emulated_gpu(compute_capability=89, refuse_pinning=refuse):
            exe = hetcomp.load(path)
            with traced_steps(exe.runtime) as steps:
                found.append((exe(ids).tobytes(), exe.stats["gpu"]["streamed"]))
            copied = sum(e.bytes for e in steps[0].gpu_events)
            notes = [note for note in exe.stats["notes"] if "cannot be pinned" in note]
            exe.runtime.close()
        assert copied == found[-1][1]["bytes"] > 0
        assert len(notes) == refuse and all("A thread copies weights to the GPU through 16" in note for note in notes)
    assert found[0] == found[1]


def test_without_pinned_memory_for_the_ring_the_cpu_computes_all(tmp_path: Path, rates):
    rates(ALL, None)
    with emulated_gpu(compute_capability=89, refuse_pinning=True, most_pinned=1 << 20):
        model, exe = build(tmp_path, "qwen3_moe", ("moe.experts=cpu",))
        ids = token_ids(model, TOKENS)
        assert relative_error(exe(ids[0]), reference_logits(model, ids)) < TOLERANCE
        stats = exe.stats
        exe.runtime.close()
    assert stats["gpu"]["streamed"]["experts_copied"] == 0
    assert any("not streamed" in note and "refuses 16" in note for note in stats["notes"])
