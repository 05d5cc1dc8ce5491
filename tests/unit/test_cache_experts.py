"""Slots for experts on the GPU: how many a plan has, what they hold first, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.cli.plan_figures import CACHE, device_memory
from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.passes.context import Context
from hetcomp.passes.expert_statistics import ExpertStatistics
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import EXPERTS, HIDDEN, TOP_K, WIDTH, context, gpu, tiny_plan

LAYERS = 3
SLOT_BYTES = LAYERS * 3 * HIDDEN * WIDTH * 2  # a slot in each layer, bf16


def wish(vram: int, **more: object) -> Context:
    """Everything but experts on the GPU, of which ``vram`` bytes beside its runtime's may be used."""
    made = context(nodes=1, bandwidths=(30.0, 30.0), gpus=(gpu(GPU_RESERVE + vram),))
    wishes = {"pins": (parse_pin("*=gpu:0"),), "expert_cache": "lfu", **more}
    return replace(made, use_gpus=True, planning=True, **wishes)  # type: ignore[arg-type]


def planned(vram: int, **more: object) -> Plan:
    return run_pipeline(tiny_plan(LAYERS), wish(vram, **more))


def least_vram() -> int:
    """With which there are as many slots as a token has experts, to a kilobyte."""
    for vram in range(0, 1 << 20, 1 << 10):
        try:
            planned(vram)
            return vram
        except HetcompError:
            pass
    raise AssertionError("a MB is enough for the whole model")


@pytest.fixture(scope="module")
def least() -> int:
    return least_vram()


def test_all_memory_that_is_left_becomes_slots(least):
    found = [planned(least + i * SLOT_BYTES) for i in range(EXPERTS - TOP_K + 3)]
    caches = [plan.expert_cache for plan in found]
    assert [cache.slots for cache in caches if cache] == [*range(TOP_K, EXPERTS + 1), EXPERTS, EXPERTS]
    assert all(cache is not None and cache.bytes == cache.slots * SLOT_BYTES for cache in caches)
    homes = {run.device for plan in found for c in plan.calls for _, p in c.placements for run in p.experts}
    assert homes == {"cpu:0"}


def test_more_slots_are_predicted_to_be_faster_and_the_budget_follows_the_step(least):
    few, many = planned(least), planned(least + 3 * SLOT_BYTES)
    assert few.timelines[0].total_us > many.timelines[0].total_us
    assert few.expert_cache is not None and many.expert_cache is not None
    assert few.expert_cache.bytes_per_step > many.expert_cache.bytes_per_step > 0
    # 60 % of what a link of 20 GB/s carries in the step.
    assert few.expert_cache.bytes_per_step == pytest.approx(0.6 * few.timelines[0].total_us * 20e3, rel=0.01)


def test_with_statistics_the_hottest_experts_come_first_and_hit_more(least):
    shares = tuple(i / sum(range(EXPERTS)) for i in range(EXPERTS))
    known = ExpertStatistics("counts", TOP_K, (shares,) * LAYERS)
    plan, blind = planned(least, statistics=known), planned(least)
    assert plan.expert_cache is not None and blind.expert_cache is not None
    assert (
        plan.expert_cache.first == ((EXPERTS - 2, EXPERTS - 1),) * LAYERS
        and blind.expert_cache.first == ((0, 1),) * LAYERS
    )
    assert f"{sum(shares[-2:]):.0%} of hits (counts)" in plan.notes[-1]
    assert "25% of hits (uniform routing)" in blind.notes[-1]


def test_the_cache_is_written_printed_and_counted(least):
    plan = planned(least)
    assert plan.expert_cache is not None
    assert from_json(to_json(plan)) == plan
    assert f"expert cache lfu, 2 slots in each of {LAYERS} layers" in print_plan(plan)
    memory = next(m for m in device_memory(plan, None) if m.device == "gpu:0")
    assert (CACHE, plan.expert_cache.bytes) in memory.parts


def test_refusals_are_one_sentence_and_say_what_is_needed(least):
    with pytest.raises(HetcompError, match=f"at least {TOP_K} slots in each of {LAYERS} MoE layers"):
        planned(least - SLOT_BYTES // 2)
    with pytest.raises(HetcompError, match=r"moe.experts=gpu:0.*contradict"):
        planned(1 << 20, pins=(parse_pin("*=gpu:0"), parse_pin("moe.experts=gpu:0")))
    with pytest.raises(HetcompError, match="needs a GPU"):
        planned(1 << 20, pins=(parse_pin("*=cpu"),))
    with pytest.raises(HetcompError, match="experts that are streamed"):
        run_pipeline(tiny_plan(LAYERS), replace(wish(least), planning=False))


def test_without_the_wish_there_is_no_cache():
    assert planned(1 << 20, expert_cache="static").expert_cache is None
