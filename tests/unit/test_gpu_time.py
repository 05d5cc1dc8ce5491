"""Times on a GPU: by its measured curves where there are any, and streams through the two halves of the ring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetcomp.hardware.figures import Gpu
from hetcomp.ir.plan import Op
from hetcomp.passes.device_time import gpu_time, launch_us
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.phases import Phase
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.work import work_of
from hetcomp.what_if import apply_change, parse_change
from tests.reference.plan_builder import HandTarget, context, tiny_plan

RECORDED = next((Path(__file__).parents[2] / "benchmarks" / "results").glob("gpu_profile-*.json"))
DECODE = Phase("decode", 1, 1, 50)


def recorded_gpu() -> Gpu:
    return Gpu.model_validate(json.loads(RECORDED.read_text())["gpu"])


def us(op_id: str, gpu: Gpu, form: str = "bf16", step: Phase = DECODE) -> tuple[float, bool]:
    template = run_pipeline(tiny_plan(), context(form), stop_after="choose_formats").template("layer_0")
    op: Op = next(o for o in template.ops if o.id == op_id)
    time = gpu_time(op, work_of(op, template.value_map(), step, HandTarget()), step, gpu)
    return time.us, time.measured


def test_a_measured_curve_is_read():
    gpu = recorded_gpu()
    curve = next(c for c in gpu.curves if c.kernel == "linear")
    assert us("q", gpu) == (pytest.approx(64 * 64 / (curve.rate(1) * 1e3) + launch_us(gpu)), True)


@pytest.mark.parametrize(("op", "form"), [("q", "f32"), ("experts", "bf16"), ("norm", "bf16")])
def test_without_a_curve_of_kernel_and_format_the_roofline_is_taken(op, form):
    gpu = recorded_gpu()
    assert us(op, gpu, form) == us(op, gpu.model_copy(update={"curves": ()}), form)


@pytest.mark.parametrize("change", ["gpu_bandwidth=2x", "gpu_flops=2x"])
@pytest.mark.parametrize("tokens", [1, 512, 4096])
def test_a_better_gpu_is_never_slower_by_its_curves(change, tokens):
    ctx = context(gpus=(recorded_gpu(),))
    better = apply_change(ctx.profile, parse_change(change)).gpus[0]
    step = Phase("any", tokens, 1, max(50, tokens))
    for op in ("q", "attend", "experts"):
        assert us(op, better, step=step)[0] <= us(op, recorded_gpu(), step=step)[0] * (1 + 1e-9)


def test_the_plan_says_what_its_gpu_times_rest_on():
    small = recorded_gpu().model_copy(update={"free_bytes": GPU_RESERVE + (8 << 20)})
    ctx = replace(context(gpus=(small,)), use_gpus=True, planning=True, pins=(parse_pin("*=gpu:0"),))
    (note,) = (n for n in run_pipeline(tiny_plan(), ctx).notes if n.startswith("gpu:0"))
    assert "linear bf16 by measured curves" in note and "moe_experts bf16 estimated" in note
    bare = small.model_copy(update={"curves": ()})
    ctx = replace(ctx, profile=ctx.profile.model_copy(update={"gpus": (bare,)}))
    assert any("all times are estimated" in n for n in run_pipeline(tiny_plan(), ctx).notes)
