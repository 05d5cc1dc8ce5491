"""Slots for experts on the GPU: how many a plan has, what they hold first, and what is refused."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import numpy as np
import pytest

from hetcomp.cli.plan_figures import CACHE, device_memory
from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import CacheSlots
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.passes.context import Context
from hetcomp.passes.expert_statistics import ExpertStatistics
from hetcomp.passes.lane_tasks import StepTasks
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.phases import phases
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.routing import ReplayedStep
from tests.reference.plan_builder import EXPERTS, HIDDEN, TOP_K, WIDTH, context, gpu, tiny_plan

LAYERS = 3
# A layer on one GPU, two on another.
APART = tuple(map(parse_pin, ("*@0=gpu:0", "*@1-2=gpu:1")))
SLOT_BYTES = LAYERS * 3 * HIDDEN * WIDTH * 2  # a slot in each layer, bf16


def wish(*vram: int, **more: object) -> Context:
    """Everything but experts on the GPUs, of each of which ``vram`` bytes beside its runtime's may be used."""
    made = context(nodes=1, bandwidths=(30.0, 30.0), gpus=tuple(gpu(GPU_RESERVE + room) for room in vram))
    wishes = {"pins": (parse_pin("*=gpu:0"),), "expert_cache": "lfu", **more}
    return replace(made, use_gpus=True, planning=True, **wishes)  # type: ignore[arg-type]


def planned(*vram: int, **more: object) -> Plan:
    return run_pipeline(tiny_plan(LAYERS), wish(*vram, **more))


def slots_of(plan: Plan, number: int = 0) -> CacheSlots:
    assert plan.expert_cache is not None
    found = plan.expert_cache.on(f"gpu:{number}")
    assert found is not None
    return found


def least_vram() -> int:
    """With which there are as many slots as a token has experts, to a kilobyte."""

    def enough(vram: int) -> bool:
        try:
            planned(vram)
        except HetcompError:
            return False
        return True

    sizes = range(0, 1 << 20, 1 << 10)
    least = sizes[bisect_left(sizes, True, key=enough)]
    assert enough(least) and not enough(least - (1 << 10))
    return least


@pytest.fixture(scope="module")
def least() -> int:
    return least_vram()


def test_all_memory_that_is_left_becomes_slots(least):
    found = [planned(least + i * SLOT_BYTES) for i in range(EXPERTS - TOP_K + 3)]
    caches = [slots_of(plan) for plan in found]
    assert [cache.slots for cache in caches] == [*range(TOP_K, EXPERTS + 1), EXPERTS, EXPERTS]
    assert all(cache.bytes == cache.slots * SLOT_BYTES for cache in caches)
    homes = {run.device for plan in found for c in plan.calls for _, p in c.placements for run in p.experts}
    assert homes == {"cpu:0"}


def test_more_slots_are_predicted_to_be_faster_and_the_budget_follows_the_step(least):
    few, many = planned(least), planned(least + 3 * SLOT_BYTES)
    assert few.timelines[0].total_us > many.timelines[0].total_us
    assert slots_of(few).bytes_per_step > slots_of(many).bytes_per_step > 0
    # 60 % of what a link of 20 GB/s carries in the step.
    assert slots_of(few).bytes_per_step == pytest.approx(0.6 * few.timelines[0].total_us * 20e3, rel=0.01)


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
    assert from_json(to_json(plan)) == plan
    assert f"expert cache lfu of {LAYERS} layers\n    gpu:0: 2 slots a layer" in print_plan(plan)
    memory = next(m for m in device_memory(plan, None) if m.device == "gpu:0")
    assert (CACHE, slots_of(plan).bytes) in memory.parts


def test_each_of_several_gpus_has_slots_for_its_own_layers(least):
    plan = planned(least + 4 * SLOT_BYTES, least, pins=APART)
    first, second = slots_of(plan), slots_of(plan, 1)
    assert first.slots == EXPERTS and TOP_K <= second.slots < EXPERTS
    assert first.bytes == first.slots * SLOT_BYTES // LAYERS
    assert second.bytes == 2 * second.slots * SLOT_BYTES // LAYERS
    assert plan.expert_cache is not None
    assert [len(held) for held in plan.expert_cache.first] == [first.slots, second.slots, second.slots]
    assert first.bytes_per_step == second.bytes_per_step > 0  # the links are equal
    assert "of each of 1 layers are in gpu:0" in plan.notes[-1] and "of each of 2 layers are in gpu:1" in plan.notes[-1]
    memory = {m.device: dict(m.parts) for m in device_memory(plan, None)}
    assert memory["gpu:0"][CACHE] == first.bytes and memory["gpu:1"][CACHE] == second.bytes


def test_a_gpu_that_gets_no_layer_is_named(least):
    assert "gpu:1 without a layer: no slots" in planned(least, least).notes[-1]
    assert "without a layer" not in planned(least, least, pins=APART).notes[-1]


def test_the_gpu_that_has_too_little_memory_is_named(least):
    too_many = slots_of(planned(least, least, pins=APART), 1).slots - TOP_K + 1
    with pytest.raises(HetcompError, match=r"slots in each of 2 MoE layers .* of gpu:1"):
        planned(least, least - too_many * 2 * SLOT_BYTES // LAYERS, pins=APART)


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


def test_a_layer_whose_experts_are_all_in_slots_still_asks_the_cpu_in_the_prediction():
    # As its graph does: the input is written and a sum read, with two nodes between, and the CPU's threads meet twice.
    ctx = wish(1 << 20)
    plan = run_pipeline(tiny_plan(LAYERS), ctx)
    step = phases(plan)[0]
    held = np.zeros((LAYERS, EXPERTS), np.bool_)
    held[:, :TOP_K] = True
    choices = np.tile(np.arange(TOP_K), (LAYERS, 1, 1))
    hit = StepTasks(plan, 0, step, ctx).tasks(0, ReplayedStep(choices, held))
    missed = StepTasks(plan, 0, step, ctx).tasks(0, ReplayedStep(choices + TOP_K, held))
    barrier = ctx.profile.barrier_us
    on_cpu = [[t.us for t in tasks if t.lane.startswith("cpu") and t.moe_layer is not None] for tasks in (hit, missed)]
    assert on_cpu[0] == [2 * barrier] * LAYERS and len(on_cpu[1]) == LAYERS and min(on_cpu[1]) > 2 * barrier
    for tasks in (hit, missed):
        asked = [t.us for t in tasks if t.lane == "gpu:0" and t.role == "moe.experts" and t.us >= 6.0 + 2 * 2.0]
        assert len(asked) == LAYERS  # a hand-shake and two launches of the hand-built GPU
        assert sum(t.lane == "gpu:0 copy in" for t in tasks) == LAYERS
