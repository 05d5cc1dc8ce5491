"""Changes of a machine, and what they do to predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import KernelCurve, KernelPoint, Source
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.what_if import apply_change, improvements, mix_seconds, parse_change, parse_size
from tests.reference.plan_builder import GIB, context, gpu, profile, tiny_plan


def changed(text: str, **machine: object):
    return apply_change(profile(gpus=(gpu(),), **machine), parse_change(text))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("16G", 16 * GIB), ("512M", GIB // 2), ("1.5T", 1536 * GIB), ("7", 7), ("2GiB", 2 * GIB)]
)
def test_sizes(text, size):
    assert parse_size(text, "--vram") == size


@pytest.mark.parametrize("text", ["", "-3G", "16X", "G", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(HetcompError, match=r"--vram .* is not a size"):
        parse_size(text, "--vram")


def test_factors_values_and_additions():
    assert changed("dram_bandwidth=2x").bandwidth() == 60.0
    assert changed("dram_bandwidth=45").bandwidth() == pytest.approx(45.0)
    assert changed("vram=+8G").gpus[0].memory_bytes == 10 * GIB
    assert changed("vram=1G").gpus[0].free_bytes == GIB
    assert changed("dram=2x").available_bytes() == 16 * GIB
    assert changed("link_bandwidth=2x").gpus[0].link_gb_per_s == 40.0
    assert changed("gpu_flops=2x").gpus[0].rates[0].tflops == 100.0
    assert changed("cpu_flops=2x").gflops("bf16") == 2 * profile().gflops("bf16")
    assert changed("handover=0.5x").barrier_us == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dram_bandwith=2x", "did you mean dram_bandwidth"),
        ("dram_bandwidth", "is not understood"),
        ("vram=two", "is not understood"),
        ("vram=-3G", "is not understood"),
        ("dram_bandwidth=0x", "would leave nothing"),
    ],
)
def test_changes_that_make_no_sense_are_refused(text, words):
    with pytest.raises(HetcompError, match=words):
        parse_change(text)


def test_a_machine_without_gpu_has_no_vram_to_change():
    with pytest.raises(HetcompError, match="has none"):
        apply_change(profile(), parse_change("vram=+8G"))


def test_more_bandwidth_raises_a_measured_curve_until_arithmetic_holds_it():
    points = tuple(KernelPoint(size=s, rate=r) for s, r in ((1, 10.0), (64, 2.0), (512, 0.25)))
    curve = KernelCurve(
        kernel="linear", variant="dram", isa="avx512", weight_format="bf16",
        shape={"in_features": 64, "out_features": 64}, points=points, source=Source.MEASURED,
    )  # fmt: skip
    machine = profile().model_copy(update={"curves": (curve,)})
    rates = [p.rate for p in apply_change(machine, parse_change("dram_bandwidth=3x")).curves[0].points]
    assert rates == [30.0, 2.0, 0.25]  # 128 multiply-adds at 64 and at 512 tokens: no memory helps
    faster = [p.rate for p in apply_change(machine, parse_change("cpu_flops=2x")).curves[0].points]
    assert faster == [10.0, 4.0, 0.5]


def test_more_bandwidth_helps_a_recurrence_where_it_waits_for_its_state():
    points = tuple(KernelPoint(size=s, rate=r) for s, r in ((1, 5.0), (4, 12.0), (512, 40.0)))
    curve = KernelCurve(
        kernel="gated_delta", variant="dram", isa="avx512", weight_format="f32", shape={},
        points=points, source=Source.MEASURED,
    )  # fmt: skip
    machine = profile().model_copy(update={"curves": (curve,)})
    rates = [p.rate for p in apply_change(machine, parse_change("dram_bandwidth=4x")).curves[0].points]
    assert rates == [20.0, 40.0, 40.0]
    faster = [p.rate for p in apply_change(machine, parse_change("cpu_flops=2x")).curves[0].points]
    assert faster == [5.0, 12.0, 80.0]


def test_improvements_are_planned_anew_and_sorted():
    ctx = context(gpus=(gpu(1 << 30),))
    ctx = replace(ctx, use_gpus=False)

    def seconds_on(machine):
        return mix_seconds(run_pipeline(tiny_plan(), replace(ctx, profile=machine)))

    gains = improvements(ctx.profile, seconds_on(ctx.profile), seconds_on)
    assert gains == sorted(gains, key=lambda g: -g[1]) and len(gains) <= 3
    assert any("DRAM" in label or "barriers" in label for label, _ in gains)
