"""Times on a CPU by measured curves: between two shapes, between memory and caches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.hardware.figures import Cache, KernelCurve, KernelPoint, Source, WorkingSetPoint
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Op
from hetcomp.passes.annotate_cost import Cached, cost_plan, step_bytes, working_set
from hetcomp.passes.device_time import cpu_time
from hetcomp.passes.phases import Phase
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.work import Work, work_of
from tests.reference.plan_builder import HandTarget, context, profile, tiny_plan

DECODE = Phase("decode", 1, 1, 50)
LARGE = {"experts": 64, "top_k": 8, "hidden": 1024, "intermediate": 512}
SMALL = {"experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32}
BROAD = {"experts": 4, "top_k": 2, "hidden": 7168, "intermediate": 2048}
NARROW = {"heads": 4, "kv_heads": 2, "head_dim": 64}
WIDE = {"heads": 16, "kv_heads": 4, "head_dim": 128}


def curve(kernel: str, variant: str, shape: dict[str, int], rate: float, form: str = "bf16") -> KernelCurve:
    """The same rate at 1 and at 4096."""
    points = tuple(KernelPoint(size=size, rate=rate, samples=()) for size in (1, 4096))
    return KernelCurve(
        kernel=kernel,
        variant=variant,
        isa="avx512",
        weight_format=form,
        shape=shape,
        points=points,
        source=Source.MEASURED,
    )


def with_curves(*curves: KernelCurve) -> HardwareProfile:
    return profile().model_copy(update={"curves": curves})


def op_and_work(op_id: str, step: Phase = DECODE) -> tuple[Op, Work]:
    template = run_pipeline(tiny_plan(), context("bf16"), stop_after="choose_formats").template("layer_0")
    op = next(o for o in template.ops if o.id == op_id)
    return op, work_of(op, template.value_map(), step, HandTarget())


def us(op_id: str, machine: HardwareProfile, cached: float = 0.0, **changes: float) -> float:
    op, work = op_and_work(op_id)
    time = cpu_time(op, replace(work, **changes), DECODE, machine, "avx512", cached)
    assert time.measured
    return time.us


def test_formats_that_are_not_measured_take_their_kins_curves_by_bytes():
    machine = with_curves(curve("moe_experts", "dram", LARGE, 20.0, "q4"))
    op, work = op_and_work("experts")
    kin = cpu_time(op, replace(work, weight_format="q4"), DECODE, machine, "avx512", 0.0)
    own = replace(work, weight_format="q4k", weight_bytes=work.weights * 4.625 / 8)
    time = cpu_time(op, own, DECODE, machine, "avx512", 0.0)
    assert time.measured
    assert time.us == pytest.approx(kin.us * 4.625 / 4.5)
    # Many tokens are multiplied as fast.
    assert cpu_time(op, replace(own, group=512), DECODE, machine, "avx512", 0.0).us == pytest.approx(kin.us)
    assert profile().rate("q6k").gflops_per_core == profile().rate("q8").gflops_per_core


THREE = (
    curve("moe_experts", "dram", LARGE, 20.0),
    curve("moe_experts", "small", SMALL, 10.0),
    curve("moe_experts", "cache", SMALL, 40.0),
)


def borders(shape: dict[str, int]) -> float:
    """Borders a weight of an expert's three matrices."""
    return (2 * shape["hidden"] + 3 * shape["intermediate"]) / (3 * shape["hidden"] * shape["intermediate"])


@pytest.mark.parametrize(("part", "rate"), [(0.0, 1 / 20), (0.5, 1.5 / 20), (1.0, 1 / 10), (1.5, 2.5 / 20)])
def test_experts_from_memory_lie_on_the_line_between_two_shapes(part, rate):
    _, work = op_and_work("experts")
    here = borders(LARGE) + part * (borders(SMALL) - borders(LARGE))
    assert us("experts", with_curves(*THREE), borders=here * work.weights) == pytest.approx(work.weights * rate / 1e3)


def test_larger_experts_than_measured_take_what_the_large_ones_take():
    _, work = op_and_work("experts")
    here = borders(LARGE) / 2 * work.weights
    assert us("experts", with_curves(*THREE), borders=here) == pytest.approx(work.weights / 20 / 1e3)


@pytest.mark.parametrize(
    ("part", "time"), [(-0.5, 1.5 / 20), (0.0, 1 / 20), (0.5, 1.5 / 40), (1.0, 1 / 40), (1.2, 1 / 40)]
)
def test_a_wide_shape_bends_the_line_and_ends_it(part, time):
    """part: 0 at the large shape, 1 at the wide one, whose rate is 40; the small one lies beyond the large."""
    _, work = op_and_work("experts")
    ends = (SMALL, LARGE) if part < 0 else (LARGE, BROAD)
    here = borders(LARGE) + abs(part) * (borders(ends[0 if part < 0 else 1]) - borders(LARGE))
    machine = with_curves(*THREE, curve("moe_experts", "wide", BROAD, 40.0))
    assert us("experts", machine, borders=here * work.weights) == pytest.approx(work.weights * time / 1e3)


def test_a_wide_shape_serves_formats_that_are_not_measured_too():
    machine = with_curves(
        curve("moe_experts", "dram", LARGE, 20.0, "q4"), curve("moe_experts", "wide", BROAD, 40.0, "q4")
    )
    op, work = op_and_work("experts")
    own = replace(work, weight_format="q4k", borders=borders(BROAD) * work.weights, group=512)
    got = cpu_time(op, own, DECODE, machine, "avx512", 0.0)
    assert got.measured and got.us == pytest.approx(work.weights / 40 / 1e3)


def test_what_caches_hold_is_read_at_their_rate():
    _, work = op_and_work("experts")
    here = borders(SMALL) * work.weights
    cold, half, warm = (us("experts", with_curves(*THREE), c, borders=here) for c in (0.0, 0.5, 1.0))
    assert warm == pytest.approx(work.weights / 40 / 1e3) and half == pytest.approx((cold + warm) / 2)


def test_caches_never_make_it_slower():
    slow = curve("moe_experts", "cache", SMALL, 5.0)  # bound by compute
    _, work = op_and_work("experts")
    here = borders(SMALL) * work.weights
    machine = with_curves(*THREE[:2], slow)
    assert us("experts", machine, 1.0, borders=here) == us("experts", machine, 0.0, borders=here)


def test_without_the_small_shape_from_memory_the_large_one_counts():
    _, work = op_and_work("experts")
    machine = with_curves(THREE[0], THREE[2])
    assert us("experts", machine, borders=borders(SMALL) * work.weights) == pytest.approx(work.weights / 20 / 1e3)


@pytest.mark.parametrize(("head_dim", "time"), [(128, 1 / 80), (64, 1 / 40), (32, 4 / 80), (192, 1 / 80)])
def test_attention_takes_the_more_the_narrower_its_heads(head_dim, time):
    """Time a multiply-add: the line in 1 / head_dim through 1/80 at 128 and 1/40 at 64, flat below."""
    op, work = op_and_work("attend")
    op = replace(op, attrs=replace(op.attrs, head_dim=head_dim, v_head_dim=head_dim))
    form = work.state_format
    machine = with_curves(
        curve("attention_decode", "dram", WIDE, 80.0, form), curve("attention_decode", "small", NARROW, 40.0, form)
    )
    got = cpu_time(op, work, DECODE, machine, "avx512", 0.0).us
    assert got == pytest.approx(work.flops / 2 / 1e3 * time)


@pytest.mark.parametrize(("rate", "cached", "time"), [(80.0, 1.0, 1 / 160), (80.0, 0.5, 3 / 320), (20.0, 1.0, 1 / 80)])
def test_a_kv_cache_in_the_caches_saves_what_it_saves_narrow_heads(rate, cached, time):
    """Heads of 128, whose time from memory is 1/80; narrow ones 1/40 from memory and 1/rate from caches."""
    op, work = op_and_work("attend")
    op = replace(op, attrs=replace(op.attrs, head_dim=128, v_head_dim=128))
    form = work.state_format
    machine = with_curves(
        curve("attention_decode", "dram", WIDE, 80.0, form),
        curve("attention_decode", "small", NARROW, 40.0, form),
        curve("attention_decode", "cache", NARROW, rate, form),
    )
    got = cpu_time(op, work, DECODE, machine, "avx512", cached).us
    assert got == pytest.approx(work.flops / 2 / 1e3 * time)


def test_prompts_find_no_weights_in_caches_and_the_kv_cache_takes_part_of_them():
    plan, ctx = run_pipeline(tiny_plan(), context("bf16"), stop_after="choose_formats"), context("bf16")
    early, late = Phase("decode", 1, 1, 1), Phase("decode", 1, 1, 60)
    assert working_set(plan, early, ctx) < working_set(plan, late, ctx)
    size = int(working_set(plan, late, ctx))
    reads = tuple(WorkingSetPoint(bytes=b, gb_per_s=r) for b, r in ((size // 4, 400.0), (size * 4, 40.0)))
    machine = with_curves(*THREE).model_copy(
        update={
            "cached_reads": reads,
            "caches": (Cache(level=3, type="Unified", bytes=size, instances=1),),
        }
    )
    ctx = replace(ctx, profile=machine)

    def experts(step: Phase) -> float:
        template = cost_plan(plan, (step,), ctx).template("layer_0")
        return next(o for o in template.ops if o.id == "experts").cost.phases[0].us

    prompt = Phase("prefill", 2, 1, 60)
    _, work = op_and_work("experts", prompt)
    assert experts(early) < experts(late)
    assert experts(prompt) >= work.weights / 20 / 1e3


def test_what_every_step_reads_stays_in_caches_that_are_too_small_for_all_experts():
    plan, ctx = run_pipeline(tiny_plan(), context("bf16"), stop_after="choose_formats"), context("bf16")
    step = Phase("decode", 1, 1, 8)
    once, all_of_it = step_bytes(plan, step, ctx), working_set(plan, step, ctx)
    assert once < all_of_it
    reads = tuple(WorkingSetPoint(bytes=int(b), gb_per_s=r) for b, r in ((once, 400.0), (all_of_it, 40.0)))
    caches = (Cache(level=3, type="Unified", bytes=int(once), instances=1),)
    ctx = replace(ctx, profile=profile().model_copy(update={"cached_reads": reads, "caches": caches}))
    assert Cached.of(plan, step, ctx) == Cached(every_step=1.0, experts=0.0)
    assert Cached.of(plan, Phase("prefill", 8, 1, 8), ctx) == Cached(0.0, 0.0)
