"""The routing that a run is recorded with is that of transformers: on the CPU alone, and beside an emulated GPU whose
cache and streams take choices away from the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hetcomp
from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.passes.expert_statistics import check_statistics, parse_statistics
from hetcomp.plan_wishes import PlanWishes
from hetcomp.record_routing import record_text, recorded_steps
from hetcomp.routing_trace import RoutingTrace
from tests.e2e.command_line import refusal, run
from tests.parity.test_deferral import EXPERTS_ON_CPU
from tests.parity.test_expert_cache import machine
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import save_tiny, token_ids

CONTEXT, TOKENS = 24, 20


def build(folder: Path, *, on_gpu: bool, threads: int = 0, **wishes: object) -> Executable:
    exe = hetcomp.compile(
        folder / "hf",
        machine() if on_gpu else avx2_machine(1),
        formats="f32",
        context_length=CONTEXT,
        max_batch=2,
        out=folder / "tiny.hetc",
        isa=("avx2",),
        wishes=PlanWishes(**wishes),
    )
    return Executable(exe.path, threads=threads)


def expected(model: torch.nn.Module, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Experts and normalised weights, [T, layers, top_k]."""
    with torch.inference_mode():
        logits = model(ids[None] if ids.ndim == 1 else ids, output_router_logits=True).router_logits
    chosen = [layer.softmax(-1).topk(model.config.num_experts_per_tok, dim=-1) for layer in logits]
    weights = torch.stack([c.values for c in chosen], dim=1)
    if model.config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.stack([c.indices for c in chosen], dim=1).numpy(), weights.numpy()


def check(trace: RoutingTrace, experts: np.ndarray, weights: np.ndarray) -> None:
    """Choices of a token in whatever order."""
    order, wanted = np.argsort(trace.experts, axis=2), np.argsort(experts, axis=2)
    np.testing.assert_array_equal(np.take_along_axis(trace.experts, order, 2), np.take_along_axis(experts, wanted, 2))
    got = np.take_along_axis(trace.weights.astype(np.float32), order, 2)
    # f16 has 11 bits; the routers' own sums differ by some units of f32.
    np.testing.assert_allclose(got, np.take_along_axis(weights, wanted, 2), rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("odd", [False, True])
def test_of_the_cpu_alone(tmp_path, threads, odd):
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=odd)
    exe = build(tmp_path, on_gpu=False, threads=threads)
    ids = token_ids(model, TOKENS)[0]
    with recorded_steps(exe.runtime) as steps, exe.runtime.session() as session:
        session.prefill(ids[:7].tolist())
        for token in ids[7:].tolist():
            exe.runtime.decode([session], [token])
    trace = RoutingTrace.of_steps("tiny", "ids", model.config.num_experts, steps)
    check(trace, *expected(model, ids))
    assert trace.position.tolist() == list(range(TOKENS)) and not trace.sequence.any()
    assert trace.decode.tolist() == [0] * 7 + [1] * (TOKENS - 7)
    assert trace.step.tolist() == [0] * 7 + list(range(1, TOKENS - 6))
    exe.runtime.forward(ids.tolist())  # nobody asks any more
    assert len(steps) == TOKENS - 6


@pytest.mark.slow
def test_logits_are_the_same_while_it_is_recorded_and_sequences_are_told_apart(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    exe = build(tmp_path, on_gpu=False, threads=2)
    first, second = (token_ids(model, TOKENS, seed=seed)[0].tolist() for seed in (1, 2))
    plain = [exe.runtime.forward(ids) for ids in (first, second)]
    with recorded_steps(exe.runtime) as steps:
        np.testing.assert_array_equal(exe.runtime.forward(first), plain[0])
        np.testing.assert_array_equal(exe.runtime.forward(second), plain[1])
        with exe.runtime.session() as one, exe.runtime.session() as other:
            exe.runtime.decode([one, other], [first[0], second[0]])
    trace = RoutingTrace.of_steps("tiny", "ids", model.config.num_experts, steps)
    assert trace.sequence.tolist() == [0] * TOKENS + [1] * TOKENS + [2, 3]
    check_counts(exe, model, first, second)


def check_counts(exe: Executable, model: torch.nn.Module, first: list[int], second: list[int]) -> None:
    """Of all tokens and of each session, fading or not: those of what transformers' routers choose."""
    with pytest.raises(HetcompError, match="No token's experts were counted"):
        exe.expert_statistics()
    for half_life in (0, 8):
        exe.count_experts(half_life)
        with exe.runtime.session() as one, exe.runtime.session() as other:
            exe.runtime.decode([one, other], [first[0], second[0]])
            one.prefill(first[1:])
            found = [json.loads(of.expert_statistics()) for of in (exe.runtime, one, other)]
        of_first, of_second = counts_of(model, first, half_life), counts_of(model, second[:1], half_life)
        # The other session's token came second of all.
        faded = 0.5 ** ((len(first) - 1) / half_life) if half_life else 1.0
        extra = 0.5 ** (1 / half_life) if half_life else 1.0
        together = of_first + faded * of_second - (1 - extra) * faded * counts_of(model, first[:1], half_life)
        for counts, wanted in zip(found, (together, of_first, of_second), strict=True):
            np.testing.assert_allclose(counts["frequency"], wanted, rtol=1e-6)
            assert counts["half_life"] == half_life
        assert [counts["tokens"] for counts in found] == [len(first) + 1, len(first), 1]
        check_statistics(parse_statistics(json.dumps(found[0]), "counts"), exe.plan)
    exe.runtime.reset_stats()
    with pytest.raises(HetcompError, match="No token's experts were counted"):
        exe.expert_statistics()


def counts_of(model: torch.nn.Module, ids: list[int], half_life: int) -> np.ndarray:
    """f64 [layers, experts]; the last token counts 1."""
    experts, _ = expected(model, torch.tensor(ids))
    ages = np.arange(len(ids) - 1, -1, -1)
    weights = 0.5 ** (ages / half_life) if half_life else np.ones(len(ids))
    table = np.zeros((experts.shape[1], model.config.num_experts))
    for token, layers in enumerate(experts):
        for layer, chosen in enumerate(layers):
            table[layer, chosen] += weights[token]
    return table


@pytest.mark.slow
@pytest.mark.parametrize("wishes", [{"expert_cache": "lru", "pins": ("*=gpu:0",)}, {"pins": EXPERTS_ON_CPU}], ids=str)
def test_beside_a_gpu(tmp_path, wishes):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    ids = token_ids(model, TOKENS)[0]
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, on_gpu=True, **wishes)
        with recorded_steps(exe.runtime) as steps, exe.runtime.session() as session:
            session.prefill(ids[:7].tolist())
            for token in ids[7:].tolist():
                exe.runtime.decode([session], [token])
        exe.runtime.close()
    trace = RoutingTrace.of_steps("tiny", "ids", model.config.num_experts, steps)
    check(trace, *expected(model, ids))


@pytest.mark.slow
def test_what_stays_on_the_gpu_is_refused(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, on_gpu=True, pins=("*=gpu:0",))
        with pytest.raises(HetcompError, match=r"3 of the 3 MoE layers .* stays on the GPU.*--vram 0"):
            record_text(exe, token_ids(model, 4)[0].tolist(), "ids")
        with pytest.raises(HetcompError, match="stays on the GPU"):
            exe.count_experts()
        exe.runtime.close()


@pytest.mark.slow
def test_of_the_command_line(tmp_path):
    exe = hetcomp.compile("demo-moe", avx2_machine(1), context_length=64, out=tmp_path / "m.hetc", isa=("avx2",))
    text = tmp_path / "text.txt"
    text.write_text("The court shall appoint a receiver. " * 20)
    out = tmp_path / "trace.safetensors"
    said = run("trace", exe.path, "--routing", out, "--text", text, "--tokens", 100, "-n", 5)
    assert said.code == 0 and "104 tokens, 6 MoE layers, top-4 of 32" in said.out, said
    trace = RoutingTrace.read(out)
    assert (trace.model, trace.source) == (exe.plan.model.name, "text.txt")
    # 59 positions of the prompt leave room for the answer; the last token is not computed on.
    assert np.bincount(trace.sequence).tolist() == [59, 45]
    counts = tmp_path / "counts.json"
    said = run("trace", exe.path, "--expert-stats", counts, "--half-life", 50, "--text", text, "--tokens", 40)
    assert said.code == 0 and "experts of 40 tokens" in said.out, said
    assert run("plan", "demo-moe", "--hw", "preset:9950x-64gb", "--stats", counts).code == 0
    message = refusal("trace", exe.path, "--routing", tmp_path / "none" / "t", "--prompt", "Hello")
    assert "none/t cannot be written" in message
    assert "exactly one of" in refusal("trace", exe.path, "--routing", out)
    assert "Say what to write" in refusal("trace", exe.path, "--prompt", "Hello")
    assert "There are no tokens to run" in refusal("trace", exe.path, "--routing", out, "--prompt", "")
    assert "do not fit behind a prompt" in refusal("trace", exe.path, "--routing", out, "--prompt", "A", "-n", 64)
