"""Plans whose experts do not fit into memory and are read from the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.errors import DoesNotFit, HetcompError
from hetcomp.hardware.figures import Disk, Source
from hetcomp.ir.annotations import DiskReads
from hetcomp.ir.plan import Plan
from hetcomp.ir.printer import print_plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.passes.context import Context
from hetcomp.passes.pins import parse_pin
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import EXPERTS, HIDDEN, WIDTH, context, gpu, tiny_plan

LAYERS = 3
EXPERT_BYTES = LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 2  # bf16
GB_PER_S = 2.0
AMPLE = 1 << 20  # for everything but experts


def wish(memory: int, *, from_disk: bool = True, disk: bool = True, **more: object) -> Context:
    made = context(nodes=1, bandwidths=(30.0, 30.0), gpus=(gpu(),) if more.get("use_gpus") else ())
    node = made.profile.nodes[0].model_copy(update={"available_bytes": memory})
    found = Disk(path="/", gb_per_s=GB_PER_S, source=Source.MEASURED) if disk else None
    profile = made.profile.model_copy(update={"nodes": (node,), "disk": found})
    return replace(made, profile=profile, from_disk=from_disk, **more)  # type: ignore[arg-type]


def planned(memory: int, **more: object) -> Plan:
    return run_pipeline(tiny_plan(LAYERS), wish(memory, **more))  # type: ignore[arg-type]


def reads(plan: Plan) -> DiskReads:
    assert plan.disk is not None
    return plan.disk


def disk_us(plan: Plan, phase: int) -> float:
    return dict((lane.lane, lane.busy_us) for lane in plan.timelines[phase].lanes).get("disk", 0.0)


@pytest.fixture(scope="module")
def others() -> int:
    """Bytes of all that must be in memory."""
    return EXPERT_BYTES - reads(planned(EXPERT_BYTES)).room


def test_what_has_no_room_is_read_when_it_is_chosen(others):
    for part in (0.01, 0.25, 0.5, 0.75):
        plan = planned(others + int(part * EXPERT_BYTES))
        assert reads(plan).bytes == EXPERT_BYTES
        assert reads(plan).missing == pytest.approx(1 - part, abs=1e-4)
        for phase in (0, 1):
            experts = next(op for op in plan.template("layer_0").ops if op.id == "experts")
            assert experts.cost is not None
            chosen = LAYERS * experts.cost.phases[phase].weight_bytes
            assert disk_us(plan, phase) == pytest.approx(chosen * (1 - part) / GB_PER_S / 1e3, rel=1e-3)


def test_more_memory_is_faster_until_everything_fits(others):
    sizes = [others + EXPERT_BYTES * i // 8 for i in range(1, 8)]
    plans = [planned(size) for size in sizes]
    us = [plan.timelines[0].total_us for plan in plans]
    assert us == sorted(us, reverse=True) and len(set(us)) == len(us)
    whole = planned(others + EXPERT_BYTES)
    assert whole.disk is None
    assert whole.timelines == planned(others + EXPERT_BYTES, from_disk=False).timelines


def test_the_plan_says_so_and_is_written_and_read(others):
    plan = planned(others + EXPERT_BYTES // 2)
    assert from_json(to_json(plan)) == plan
    assert f"experts from the disk: {EXPERT_BYTES} bytes, memory for {reads(plan).room}" in print_plan(plan)


def test_without_the_wish_the_refusal_names_it(others):
    with pytest.raises(DoesNotFit, match=r"--from-disk; hetcomp plan says how fast"):
        planned(others + EXPERT_BYTES // 2, from_disk=False)


def test_what_every_token_reads_must_fit(others):
    with pytest.raises(HetcompError, match=r"does not (fit into memory|run from the disk here)") as caught:
        planned(others - 4096)
    assert "--from-disk" not in str(caught.value)


def test_a_profile_without_the_disks_speed_is_refused(others):
    with pytest.raises(HetcompError, match=r"Profile hand has no speed of the disk.*run hetcomp profile"):
        planned(others + EXPERT_BYTES // 2, disk=False)
    assert planned(AMPLE + EXPERT_BYTES, disk=False).disk is None


def test_gpus_take_experts_but_copy_none_out_of_files(others):
    pins = (parse_pin("moe.experts@0=gpu:0"), parse_pin("moe.experts@1-2=cpu"), parse_pin("*=gpu:0"))
    plan = planned(EXPERT_BYTES // 2, use_gpus=True, pins=pins)
    assert reads(plan).bytes == EXPERT_BYTES * 2 // 3
    assert plan.stream is None
    assert any("not streamed to GPUs in prefill" in note for note in plan.notes)
    with pytest.raises(HetcompError, match="--expert-cache lru needs all experts in memory"):
        planned(EXPERT_BYTES // 2, use_gpus=True, pins=pins[2:], expert_cache="lru")
