"""Traces of the lanes of real runs: complete, true to the timers, and drawn beside the plan."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import dropwhile, pairwise

import numpy as np
import pytest

import hetcomp
from hetcomp.backends.program import WAITING
from hetcomp.cli.measured_steps import measured_steps
from hetcomp.cli.plan_html import family
from hetcomp.ir.deferral import moe_layers
from hetcomp.lane_trace import BARRIER, HAND_OVER, step_events, traced_steps, write_trace
from tests.e2e.command_line import refusal, run
from tests.parity.test_deferral import EXPERTS_ON_CPU
from tests.parity.test_record_routing import build
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import save_tiny

IDS = [5, 17, 99, 3, 42, 7]
MOST_GPU_EVENTS = 109  # of a step: one moment less than its graph records


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_every_thread_tells_what_it_does(tmp_path, threads):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=True)
    exe = build(tmp_path, on_gpu=False, threads=threads)
    plain = exe.runtime.forward(IDS)
    exe.runtime.reset_stats()
    with traced_steps(exe.runtime) as steps, exe.runtime.session() as session:
        np.testing.assert_array_equal(session.forward(IDS), plain)
        exe.runtime.decode([session], [8])
    assert [(s.decode, s.tokens, s.position) for s in steps] == [(False, 6, 6), (True, 1, 7)]
    timers = list(exe.stats["decode"]["timers_ms"])
    experts = [exe.plan.calls[layer.call].layer for layer in moe_layers(exe.plan)]
    for step, phase in zip(steps, ("prefill", "decode"), strict=True):
        events = step_events(step, exe.plan, timers)
        assert {e.lane for e in events} == {f"cpu thread {t}" for t in range(threads)}
        took = (step.end_ns - step.begin_ns) / 1e3
        last: dict[str, float] = defaultdict(float)
        for event in events:
            # A lane's events do not overlap; times are rounded to nanoseconds of a double.
            assert last[event.lane] - 1e-3 <= event.start_us and event.start_us + event.us <= took + 1e-3
            last[event.lane] = event.start_us + event.us
        mine = [e for e in events if e.lane == "cpu thread 0"]
        assert [e.layer for e in mine if e.role == "moe.experts"] == experts
        # What thread 0 did and waited for behind it is what its timers count, looks at the clock left aside; not that
        # it waited for others to wake up.
        timed = sum(exe.stats[phase]["timers_ms"].values()) * 1e3
        counted = list(dropwhile(lambda e: e.role == BARRIER, mine))
        assert sum(e.us for e in counted) == pytest.approx(timed, rel=0.05, abs=20)
    exe.runtime.forward(IDS)  # nobody asks any more
    assert len(steps) == 2


@pytest.mark.slow
def test_beside_a_gpu_its_kernels_and_hand_overs_have_a_line(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    with emulated_gpu(compute_capability=89) as emulated:
        exe = build(tmp_path, on_gpu=True, pins=EXPERTS_ON_CPU)
        plain = exe.runtime.forward(IDS)
        emulated.launches.clear()
        with traced_steps(exe.runtime) as steps:
            np.testing.assert_array_equal(exe.runtime.forward(IDS), plain)
        launches = emulated.launches.total()
        timers = list(exe.stats["decode"]["timers_ms"])
        write_trace(tmp_path / "trace.json", steps, exe.plan, timers)
        exe.runtime.forward(IDS)  # nobody asks any more
        exe.runtime.close()
    (step,) = steps
    layers = len(moe_layers(exe.plan))
    kernels = [e for e in step.gpu_events if e.kernel]
    assert all(e.role and e.launches > 0 for e in kernels)
    launched = [e for e in step.gpu_events if not e.bytes]
    # A layer is asked for and waited for as far as it is streamed, then for the CPU's part of it.
    hand_overs = 2 * layers
    assert sum(e.launches for e in launched) == launches + hand_overs
    assert len(launched) == min(launches + hand_overs, MOST_GPU_EVENTS)
    # One line of launches: each begins when the one before it is over, within the step.
    for before, event in pairwise(launched):
        assert before.begin_ns <= before.end_ns == event.begin_ns <= event.end_ns
    slack = 2e6  # ns between two clocks that are one here, read by threads that others may interrupt
    assert step.begin_ns - slack < launched[0].begin_ns < launched[-1].end_ns < step.end_ns + slack
    line = [e for e in step_events(step, exe.plan, timers) if e.lane == "gpu:0"]
    assert {e.layer for e in line if e.role.startswith("attn.")} == set(range(exe.plan.model.layers))
    waits = [e for e in step_events(step, exe.plan, timers) if e.lane == "cpu thread 0" and e.role == WAITING]
    assert len(waits) == layers and family(WAITING) == family(BARRIER) == family(HAND_OVER) == "waiting"
    document = json.loads((tmp_path / "trace.json").read_text())
    drawn = {e["args"]["kernel"] for e in document["traceEvents"] if "kernel" in e["args"]}
    assert drawn == {e.kernel for e in kernels}


@pytest.mark.slow
def test_through_the_command_line(tmp_path):
    machine = avx2_machine(1)
    (tmp_path / "machine.json").write_text(machine.to_json())
    exe = hetcomp.compile("demo-moe", machine, context_length=64, out=tmp_path / "m.hetc", isa=("avx2",))
    trace, page = tmp_path / "trace.json", tmp_path / "plan.html"
    said = run("trace", exe.path, "--out", trace, "--prompt", "The court shall appoint", "-n", 4)
    assert said.code == 0 and "4 steps" in said.out, said.err
    document = json.loads(trace.read_text())
    events = document["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "step"] == ["prefill", "decode", "decode", "decode"]
    assert all(e["ph"] in "XM" and (e["ph"] == "M" or e["dur"] >= 0) for e in events)
    assert {"process_name", "thread_name"} <= {e["name"] for e in events if e["ph"] == "M"}
    prefix = ("plan", "demo-moe", "--hw", tmp_path / "machine.json", "--context", "64", "--no-improvements")
    assert run(*prefix, "--html", page, "--measured", trace).code == 0
    found = measured_steps(trace, exe.plan)
    assert [(s.phase.name, s.phase.tokens) for s in found] == [("decode", 1), ("prefill", found[1].phase.tokens)]
    data = json.loads(page.read_text().split('type="application/json">')[1].split("</script>")[0])
    drawn = [sum(len(lane["events"]) for lane in step["lanes"]) for step in data["measured"]]
    assert drawn == [len(step.events) for step in found] and min(drawn) > 20
    assert run("trace", exe.path, "--out", trace, "--ids", "1,2,3").code == 0
    assert "is not a list of integers" in refusal("trace", exe.path, "--out", trace, "--ids", "1,b")
    assert "give --html FILE" in refusal(*prefix, "--measured", trace)
    for name, text, message in (
        ("no.json", "{", "is not valid JSON"),
        ("other.json", "[]", "is no trace of lanes"),
        ("model.json", trace.read_text().replace('"model":"', '"model":"x'), "is of xdemo-moe"),
        ("cut.json", trace.read_text().replace('"ts"', '"tx"'), "is damaged"),
    ):
        (tmp_path / name).write_text(text)
        assert message in refusal(*prefix, "--html", page, "--measured", tmp_path / name)
