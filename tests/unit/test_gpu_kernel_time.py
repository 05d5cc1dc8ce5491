"""Predicted prefill on a GPU against what was measured there, and how times follow rows and rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Gpu, Source
from hetcomp.hardware.presets import gpu_preset
from hetcomp.ir import ops
from hetcomp.ir.annotations import Mix
from hetcomp.ir.plan import Op
from hetcomp.passes.device_time import gpu_time
from hetcomp.passes.gpu_kernel_time import CUBLAS_PEAK, peak_tflops
from hetcomp.passes.phases import Phase
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.work import work_of
from hetcomp.plan_wishes import PlanWishes
from tests.reference.kernel_harness import activation, state
from tests.reference.plan_builder import HandTarget, context, tiny_plan
from tests.sampled_cases import rest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Qwen3-30B-A3B's shape in q4, everything on an H200.
RECORD = RESULTS / "gpu_e2e-20261126T015345-457233f.json"


def measured(length: int) -> float:
    series = json.loads(RECORD.read_text())["series"]
    return float(next(s["median"] for s in series if s["name"] == f"q30-gpu prefill {length}"))


@pytest.mark.parametrize("length", [4096, *rest((512, 16384))])
def test_prefill_on_an_h200_is_predicted_within_15_percent(length):
    planned = plan_model(
        "qwen3-30b-a3b",
        hw_profile="preset:8480-256gb+h200",
        context_length=20480,
        formats="q4",
        isa=["avx512"],
        wishes=PlanWishes(mix=Mix(length, 256, 1), vram=24 << 30, pins=("*=gpu:0",)),
    )
    predicted = next(t for t in planned.plan.timelines if t.phase == "prefill").tokens_per_s
    assert predicted == pytest.approx(measured(length), rel=0.15)


def us(op_id: str, tokens: int, gpu: Gpu, form: str = "bf16", sequences: int = 1) -> float:
    template = run_pipeline(tiny_plan(), context(form), stop_after="choose_formats").template("layer_0")
    op = next(o for o in template.ops if o.id == op_id)
    step = Phase("any", tokens, sequences, max(50, tokens))
    return gpu_time(op, work_of(op, template.value_map(), step, HandTarget()), step, gpu).us


@pytest.mark.parametrize(("tokens", "measured_us"), [(512, 299), (4096, 9730)])
def test_attention_on_latents_on_an_h200_is_predicted_within_10_percent(tokens, measured_us):
    heads, dim, values = 128, 576, 512
    a = ops.Attention(heads=heads, kv_heads=1, head_dim=dim, v_head_dim=values, scale=0.04, shared_kv=True)
    q, y = activation("q", "T", heads, dim), activation("y", "T", heads, values)
    cache = state("cache", 1, dim)
    op = Op("core", a, (q.id, cache.id), (y.id,))
    step = Phase("prefill", tokens, 1, tokens)
    work = work_of(op, {v.id: v for v in (q, cache, y)}, step, HandTarget())
    assert gpu_time(op, work, step, gpu_preset("h200").gpu).us == pytest.approx(measured_us, rel=0.1)


# us of Qwen3-Next's rule on an H200 (docs/decisions/linear-attention.md): rows, sequences.
RULE = {(1, 1): 4.0, (4, 4): 7.0, (16, 16): 23.0, (512, 1): 40.9, (2048, 1): 131, (4096, 1): 252}


@pytest.mark.parametrize(("rows", "sequences"), RULE, ids=str)
def test_the_gated_delta_rule_on_an_h200_is_predicted_within_30_percent(rows, sequences):
    attrs = ops.GatedDelta(16, 32, 128, 128, 128**-0.5, 1e-6)
    acts = {"qkv": ("T", 8192), "a": ("T", 32), "b": ("T", 32), "a_log": (32,), "dt_bias": (32,), "y": ("T", 4096)}
    values = {name: activation(name, *shape) for name, shape in acts.items()} | {"s": state("s", 32, 128, 128)}
    op = Op("rule", attrs, ("qkv", "a", "b", "a_log", "dt_bias", "s"), ("y",))
    step = Phase("any", rows, sequences, rows)
    predicted = gpu_time(op, work_of(op, values, step, HandTarget()), step, gpu_preset("h200").gpu).us
    assert predicted == pytest.approx(RULE[rows, sequences], rel=0.3)


@pytest.mark.parametrize("op", ["q", "attend", "experts"])
@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_more_tokens_never_take_less(op, form):
    gpu = gpu_preset("rtx4090").gpu
    times = [us(op, tokens, gpu, form) for tokens in (16, 64, 512, 4096)]
    assert times == sorted(times) and times[-1] > times[0]


def test_few_sequences_in_decode_wait_for_memory_alone():
    gpu = gpu_preset("rtx4090").gpu
    slow = gpu.model_copy(update={"rates": tuple(r.model_copy(update={"tflops": r.tflops / 2}) for r in gpu.rates)})
    assert us("q", 8, gpu, sequences=8) == us("q", 8, slow, sequences=8)
    assert us("experts", 16, gpu, sequences=16) < us("experts", 16, slow, sequences=16)


def test_a_rate_that_cublas_reached_is_part_of_a_peak():
    gpu = gpu_preset("h100-sxm").gpu
    rate = gpu.rates[0].model_copy(update={"source": Source.MEASURED})
    assert peak_tflops(gpu.model_copy(update={"rates": (rate,)})) == pytest.approx(rate.tflops / CUBLAS_PEAK)
    with pytest.raises(HetcompError, match="no rate of matrix products for NVIDIA H100"):
        peak_tflops(gpu.model_copy(update={"rates": ()}))
