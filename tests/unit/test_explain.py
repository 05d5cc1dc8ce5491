"""What explain says: shares of the ceilings, and what holds an op class."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.bench import BenchRecord, CaseResult, RoleTime
from hetcomp.errors import HetcompError
from hetcomp.explain import Explanation, dram_gb_per_s, explain
from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Plan
from hetcomp.ir.serialise import plan_hash
from hetcomp.passes.annotate_cost import cost_plan
from hetcomp.passes.phases import Phase
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import VOCAB, context, gpu, profile, tiny_plan

HEAD_BYTES = VOCAB * 64 * 2  # bf16 weights of lm_head


def plan() -> Plan:
    return run_pipeline(tiny_plan(), context())


def record(
    plan: Plan,
    times: dict[str, tuple[float, ...]],
    phase: str = "decode",
    **changes: object,
) -> BenchRecord:
    """A record of one case with these milliseconds of each role in every round."""
    roles = tuple(
        RoleTime(role=r, term="linear", predicted_ms=1.0, measured_ms=ms[0], samples_ms=ms) for r, ms in times.items()
    )
    total = sum(r.measured_ms for r in roles)
    case = CaseResult(
        phase="decode" if phase == "decode" else "prefill",
        tokens=1 if phase == "decode" else 40,
        position=40,
        predicted_ms=1.0,
        measured_ms=total,
        samples_ms=(total,),
        roles=roles,
    )
    fields = {
        "model": "m",
        "plan_sha256": plan_hash(plan),
        "profile_name": "hand",
        "profile_sha256": "p",
        "cpu": "hand",
        "isa": "avx512",
        "threads": 4,
        "measured_at": "2026-11-24",
        "load_before": 0.0,
        "cases": (case,),
    }
    return BenchRecord.model_validate({**fields, **changes})


def one(role: str, *ms: float, phase: str = "decode", **changes: object) -> Explanation:
    """What is said of ``role`` if it took so long."""
    planned = plan()
    [found] = explain(planned, profile(), record(planned, {role: ms}, phase, **changes))
    return found


def costs(role: str, step: Phase) -> tuple[float, float]:
    """Bytes and FLOPs of a role in a step, summed by hand over all calls."""
    costed = cost_plan(plan(), (step,), context())
    found = [
        op.cost.phases[0]
        for call in costed.calls
        for op in costed.template(call.template).ops
        if op.role == role and op.cost
    ]
    return sum(c.weight_bytes + c.act_bytes + c.state_bytes for c in found), sum(c.flops for c in found)


def test_shares_are_those_of_the_plans_work():
    moved, flops = costs("moe.experts", Phase("decode", 1, 1, 40))
    found = one("moe.experts", 2.0)
    assert found.memory == pytest.approx(moved / 2e-3 / 30e9)
    assert found.compute == pytest.approx(flops / 2e-3 / (4 * 50e9))  # four threads of 50 GFLOP/s
    assert found.link is None


def test_prefill_counts_all_pieces_of_the_prompt():
    pieces = [Phase("prefill", 16, 1, 16), Phase("prefill", 16, 1, 32), Phase("prefill", 8, 1, 40)]
    moved = sum(costs("attn.core", step)[0] for step in pieces)
    assert one("attn.core", 2.0, phase="prefill").memory == pytest.approx(moved / 2e-3 / 30e9)


def test_the_ceiling_is_what_memory_gave_during_the_run():
    quiet, busy = (
        one("moe.experts", 2.0),
        one("moe.experts", 2.0, read_gb_per_s=(9.0, 10.0, 11.0), profile_gb_per_s=20.0),
    )
    assert busy.memory == pytest.approx(2 * quiet.memory)


@pytest.mark.parametrize(
    ("now", "then", "ceiling"),
    [
        ((), None, 30.0),  # the profile's
        ((25.0,), None, 30.0),  # nothing to hold it against
        ((10.0,), 20.0, 15.0),
        ((25.0,), 20.0, 30.0),  # not 37.5, which nothing ever read
        ((40.0,), 20.0, 40.0),
    ],
)
def test_the_ceiling_is_never_more_than_was_read(now, then, ceiling):
    taken = record(plan(), {"lm_head": (1.0,)}, read_gb_per_s=now, profile_gb_per_s=then)
    assert dram_gb_per_s(profile(), taken) == pytest.approx(ceiling)


def test_the_median_of_the_rounds_counts_and_shares_add_up():
    planned = plan()
    found = explain(planned, profile(), record(planned, {"lm_head": (3.0, 2.0, 2.5), "moe.experts": (7.5, 7.0, 8.0)}))
    assert [(e.role, e.measured_ms) for e in found] == [("moe.experts", 7.5), ("lm_head", 2.5)]
    assert sum(e.share for e in found) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("role", "phase", "share", "holder", "words"),
    [
        ("lm_head", "decode", 0.9, "memory", "reads weights at 90% of DRAM; only smaller formats"),
        ("attn.core", "decode", 0.9, "memory", "reads the KV cache at 90% of DRAM; only a shorter context"),
        ("lm_head", "decode", 1.8, "cache", "weights at 1.8 times what DRAM gives"),
        ("lm_head", "decode", 0.4, "latency", "1 ops of"),
        ("lm_head", "decode", 0.0001, "kernel", "neither ceiling is near"),
    ],
)
def test_what_holds_an_op_class_by_memory(role, phase, share, holder, words):
    moved, _ = costs(role, Phase("decode", 1, 1, 40))
    found = one(role, moved / 30e9 * 1e3 / share, phase=phase)
    assert found.memory == pytest.approx(share)
    assert found.holder == holder and words in found.held_by


def test_compute_bound_op_classes_are_told_what_helps():
    steps = [Phase("prefill", 16, 1, 16), Phase("prefill", 16, 1, 32), Phase("prefill", 8, 1, 40)]
    flops = sum(costs("moe.experts", step)[1] for step in steps)
    planned = plan()
    fast_memory = record(
        planned,
        {"moe.experts": (flops / 200e9 * 1e3 / 0.8,)},
        "prefill",
        read_gb_per_s=(1000.0,),
        profile_gb_per_s=30.0,
    )
    [found] = explain(planned, profile(), fast_memory)
    assert found.holder == "compute" and "80% of the FLOP/s" in found.held_by and "GPU" in found.held_by


def test_op_classes_that_something_else_held_up_are_not_judged():
    found = one("attn.kv_append", 0.1, 0.11, 9.0)
    assert found.holder == "disturbed" and "took 0.1 to 9 ms" in found.held_by


def test_transfers_are_held_against_the_link():
    base = plan()
    template = base.template("epilogue")
    select = template.ops[0]
    move = Op("move", ops.Transfer("gpu:0", "cpu:0"), select.inputs, select.outputs, role="transfer")
    planned = replace(base, templates=(*base.templates[:-1], replace(template, ops=(move, *template.ops[1:]))))
    machine = profile(gpus=(gpu(link=20.0),))
    moved, _ = 2 * 64 * 4, None  # h and rows: one row of 64 f32 each in a decode step
    ms = moved / 2 / 20e9 * 1e3 / 0.8
    [found] = explain(planned, machine, record(planned, {"transfer": (ms,)}))
    assert found.link == pytest.approx(0.8) and found.holder == "link" and "80% of the PCIe link" in found.held_by


def test_records_of_another_artifact_or_machine_are_refused():
    with pytest.raises(HetcompError, match="of another compile of m; run hetcomp bench on this artifact again"):
        one("lm_head", 1.0, plan_sha256="0")
    with pytest.raises(HetcompError, match="is of another cpu, the profile of hand"):
        one("lm_head", 1.0, cpu="another cpu")


def test_deferred_experts_count_with_the_others():
    planned = plan()
    times = {"moe.experts": (0.4, 0.5), "moe.experts deferred": (0.2, 0.1), "lm_head": (0.3, 0.3)}
    found = {e.role: e for e in explain(planned, profile(), record(planned, times))}
    assert found["moe.experts"].measured_ms == pytest.approx(0.6)
    assert "moe.experts deferred" not in found
    assert found["moe.experts"].memory == pytest.approx(one("moe.experts", 0.6, 0.6).memory)
