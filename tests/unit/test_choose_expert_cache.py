"""``--expert-cache auto``: a routing trace decides between static placement and the cache's policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.deferral import experts_on_cpu, moe_layers
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.models_zoo import routing_traces
from hetcomp.passes.expert_statistics import parse_statistics
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from hetcomp.routing_trace import RoutingTrace
from tests.e2e.command_line import refusal, run
from tests.reference.plan_builder import avx2_machine, gpu

MEGABYTE = 1_000_000


def machine(gpus: int = 1) -> HardwareProfile:
    """A CPU whose memory is slow, beside GPUs."""
    plain = avx2_machine(1)
    slow = BandwidthPoint(threads=4, gb_per_s=5.0)
    nodes = tuple(node.model_copy(update={"read_bandwidth": (slow,)}) for node in plain.nodes)
    return plain.model_copy(update={"gpus": (gpu(),) * gpus, "nodes": nodes})


def plan(trace: Path | None, vram: int = 40, gpus: int = 1, **wishes: object) -> Plan:
    """Of demo-moe, with so many MB of the GPU; at 40 a part of the experts fits there either way."""
    wish = PlanWishes(vram=GPU_RESERVE + vram * MEGABYTE, expert_cache="auto", routing_trace=trace, **wishes)  # type: ignore[arg-type]
    return plan_model("demo-moe", hw_profile=machine(gpus), context_length=512, isa=("avx2",), wishes=wish).plan


def joined(folder: Path, *names: str) -> Path:
    """A trace of the first 1,024 tokens of several texts."""
    traces = [RoutingTrace.read(routing_traces()[name]) for name in names]
    names_of = ("experts", "weights", "decode", "position", "sequence")
    parts = {name: np.concatenate([getattr(t, name)[:1024] for t in traces]) for name in names_of}
    whole = replace(traces[0], step=np.arange(1024 * len(names), dtype=np.uint32), **parts)
    whole.write(folder / "joined.safetensors")
    return folder / "joined.safetensors"


@pytest.fixture(scope="module")
def steady() -> Plan:
    return plan(routing_traces()["law"])


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan(joined(tmp_path_factory.mktemp("traces"), "law", "c_code"))


def test_where_the_text_stays_the_same_so_do_the_experts(steady):
    choice = steady.cache_choice
    assert [f.policy for f in choice.figures] == ["static", "lru", "lfu"]
    assert choice.chosen == "static" and steady.expert_cache is None
    assert choice.steps == 1024 and "law.safetensors (law.txt)" in choice.trace and not choice.refused
    assert f"{choice.figures[2].hit_rate:.0%} of hits" in steady.notes[-1]
    assert steady.notes[-1].startswith("expert cache auto: static, by 1024 steps")
    assert from_json(to_json(steady)) == steady


def test_where_it_changes_a_cache_follows(drifting):
    choice = drifting.cache_choice
    by_policy = {f.policy: f for f in choice.figures}
    assert choice.chosen == drifting.expert_cache.policy != "static"
    assert by_policy[choice.chosen].step_us == min(f.step_us for f in choice.figures)
    assert by_policy["lfu"].hit_rate > by_policy["static"].hit_rate
    assert 0 < by_policy["lfu"].bytes_per_step < by_policy["lru"].bytes_per_step
    assert all(f.bytes_per_step <= drifting.expert_cache.gpus[0].bytes_per_step for f in choice.figures)


@pytest.mark.exhaustive
def test_of_caches_on_several_gpus_no_trace_is_replayed():
    apart = plan(routing_traces()["law"], gpus=2, pins=("*@0-2=gpu:0", "*@3-5=gpu:1"))
    assert apart.cache_choice is not None and apart.cache_choice.chosen == "static"
    assert "several GPUs are not replayed" in apart.cache_choice.refused
    assert "no cache is possible: caches on several GPUs are not replayed" in apart.notes[-1]


def test_the_hit_rate_of_static_placement_is_that_of_its_experts(steady):
    judged = RoutingTrace.read(routing_traces()["law"]).experts[1024:]
    here = [np.flatnonzero(np.logical_not(experts_on_cpu(layer.placement))) for layer in moe_layers(steady)]
    rate = np.mean([np.isin(judged[:, layer], experts).mean() for layer, experts in enumerate(here)])
    assert steady.cache_choice.figures[0].hit_rate == pytest.approx(rate)


@pytest.mark.exhaustive
def test_statistics_of_the_user_are_kept(tmp_path, steady):
    file = tmp_path / "counts.json"
    file.write_text('{"top_k": 4, "frequency": ' + str([[1] * 31 + [2]] * 6) + "}")
    counted = plan(routing_traces()["law"], statistics=str(file))
    assert parse_statistics(file.read_text(), str(file)).name in counted.solution.statistics
    assert counted.cache_choice.figures[0].hit_rate < steady.cache_choice.figures[0].hit_rate


@pytest.mark.exhaustive
def test_of_several_sequences_each_has_a_stretch_of_the_trace():
    from hetcomp.ir.annotations import Mix

    choice = plan(routing_traces()["law"], mix=Mix(64, 64, 4)).cache_choice
    assert choice.steps == 2048 // 4 // 2


def test_where_no_cache_is_possible_the_plan_says_why():
    found = plan(routing_traces()["law"], vram=20)
    assert found.cache_choice.chosen == "static" and [f.policy for f in found.cache_choice.figures] == ["static"]
    assert "no cache is possible: --expert-cache lru needs" in found.notes[-1]


def test_refusals_say_what_to_do(tmp_path):
    with pytest.raises(HetcompError, match=r"needs recorded routing: .*hetcomp trace .*--routing-trace FILE"):
        plan(None)
    short = joined(tmp_path, "law")
    trace = RoutingTrace.read(short)
    names = ("experts", "weights", "step", "decode", "position", "sequence")
    replace(trace, **{name: getattr(trace, name)[:500] for name in names}).write(short)
    with pytest.raises(HetcompError, match=r"joined.safetensors has 500 tokens, .*record at least 512"):
        plan(short)
    other = joined(tmp_path, "law")
    replace(trace, n_experts=64).write(other)
    with pytest.raises(HetcompError, match=r"is of another model .* 6 MoE layers of 64 experts .* has 6 of 32 experts"):
        plan(other)


def test_through_the_command_line(tmp_path):
    law = routing_traces()["law"]
    profile = tmp_path / "machine.json"
    profile.write_text(machine().to_json())
    vram = ("--vram", str(GPU_RESERVE + 40 * MEGABYTE), "--context", "1024")
    options = ("--hw", profile, *vram, "--expert-cache", "auto", "--routing-trace")
    said = run("plan", "demo-moe", *options, law, "--no-improvements", "--plan-out", tmp_path / "plan.json")
    assert said.code == 0, said.err
    kept = from_json((tmp_path / "plan.json").read_text())
    assert kept.cache_choice is not None and "expert cache auto: static" in " ".join(said.out.split())
    (tmp_path / "cut").write_bytes(law.read_bytes()[:-7])
    assert "cut is truncated" in refusal("plan", "demo-moe", *options, tmp_path / "cut")
    wrong = refusal("plan", "demo-moe", "--hw", profile, "--routing-trace", law)
    assert "give --expert-cache auto with it" in wrong
    assert "Unknown expert cache 'best'" in refusal("plan", "demo-moe", "--hw", profile, "--expert-cache", "best")
