"""The split of a layer's experts between the CPU and the GPU: the best of all, and the same as the runtime's."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetcomp.ir.annotations import StreamRates
from hetcomp.passes.memory_contention import copies_slowdown, reads_slowdown
from hetcomp.passes.stream_split import SplitInput, beside_copies, slots_left, split_experts, time_at

# Read by runtime_lib/tests/test_expert_stream.cpp too; running this file makes it anew.
CASES = Path(__file__).resolve().parents[1] / "data" / "stream_splits.json"

curves = st.lists(st.floats(0.5, 500.0), min_size=1, max_size=4).map(
    lambda us: tuple((8**i, sum(us[: i + 1])) for i in range(len(us)))
)
rates_of = st.builds(StreamRates, st.floats(1.0, 100.0), st.floats(100.0, 300.0), curves, curves)


@st.composite
def inputs(draw: st.DrawFn) -> SplitInput:
    tokens = draw(st.lists(st.integers(0, 300), max_size=20))
    most = draw(st.integers(0, 24))
    copied, slots = draw(st.integers(0, min(most, len(tokens)))), draw(st.integers(1, 24))
    step_tokens, lead_us, resident_us = draw(st.integers(17, 9000)), draw(st.floats(0, 3e3)), draw(st.floats(0, 1e4))
    return SplitInput(tokens, copied, most, slots, step_tokens, lead_us, resident_us, 2.6e6, 8192.0)


def layer_us(given: SplitInput, rates: StreamRates, count: int) -> tuple[float, float]:
    """The definition, for one number of copied experts: from the routing on until the link is done, and until the layer
    is."""
    link = rates.link_gb_per_s * 1e3
    cpu = sum(time_at(rates.cpu_expert_us, n) for n in given.tokens[count:] if n)
    gpu = given.resident_us + sum(time_at(rates.gpu_expert_us, n) for n in given.tokens[:count] if n)
    exchange = given.step_tokens * given.activation_bytes / link if cpu else 0.0
    copy = given.expert_bytes / link
    late = given.resident_us + (count - given.slots) * copy if count > given.slots else 0.0
    # While the CPU computes, the link copies at its rate, as long as there is something; both are slower for that.
    both, reads = (
        min(cpu, count * copy),
        sum(given.expert_bytes for n in given.tokens[count:] if n) / max(cpu, 1e-9) / 1e3,
    )
    shared = (reads, rates.link_gb_per_s, rates.joint_gb_per_s) if both else (0.0, 0.0, 1.0)
    copies = max(0.0, count * copy - given.lead_us) + exchange + both * (copies_slowdown(*shared) - 1.0)
    contended = cpu + both * (reads_slowdown(*shared) - 1.0)
    return max(copies, late), max(copies, late, (3 if count else 2) * exchange + max(gpu, contended))


@given(inputs(), rates_of)
def test_no_other_number_of_copies_is_faster(given_input, rates):
    found = split_experts(given_input, rates)
    choices = range(given_input.copied, max(given_input.copied, min(len(given_input.tokens), given_input.most)) + 1)
    assert found.copied in choices
    best = min(layer_us(given_input, rates, n)[1] for n in choices)
    link, whole = layer_us(given_input, rates, found.copied)
    assert whole <= best * (1 + 1e-9)
    if found.copied <= given_input.most:
        assert found.link_free_us == pytest.approx(whole - link)


@given(inputs(), rates_of)
def test_a_longer_lead_is_never_slower(given_input, rates):
    later = replace(given_input, lead_us=given_input.lead_us + 500.0)
    found, with_more = (split_experts(one, rates).copied for one in (given_input, later))
    assert layer_us(later, rates, with_more)[1] <= layer_us(given_input, rates, found)[1] * (1 + 1e-9)


def test_layers_that_are_alike_come_to_where_link_and_cpu_are_busy_all_the_time():
    """A layer's experts all take the link 100 us or the CPU 150, which waits 600 us a layer for the spine."""
    rates = StreamRates(26.0, 1e6, ((1, 150.0), (64, 150.0)), ((1, 1.0), (64, 1.0)))
    lead_us, copied = 600.0, []
    for _ in range(8):
        found = split_experts(SplitInput([4] * 100, 0, 100, 100, 4, lead_us, 0.0, 2.6e6, 1.0), rates)
        lead_us = 600.0 + found.link_free_us
        copied.append(found.copied)
    # Of n copies: 105 n us beside the CPU, and 150 (100 - n) + 600.
    period = (100 * 150 + 600) / (1 + 150 / 105)
    assert copied[-1] == pytest.approx(period / 105, abs=1)


def test_slots_are_left_for_what_is_copied_while_the_first_wave_is_computed():
    rates = StreamRates(26.0, 1e6, ((1, 1.0), (64, 1.0)), ((1, 10.0), (16, 25.0), (256, 400.0)))
    assert slots_left(40, 16, 2.6e6, rates) == 40 * 25 / 100 + 1
    assert slots_left(40, 256, 2.6e6, rates) == 20
    assert slots_left(1, 1, 2.6e6, rates) == 0


def test_cpu_and_copies_share_the_memory_as_they_were_measured_to():
    # GB/s of 15 threads that read and of a GPU that copies, each alone, then together
    # (benchmarks/results/gpu_profile-20261124T170849-9fd7c8f.json).
    reads, copies, reads_beside, copies_beside = 97.6, 54.3, 81.2, 42.75
    flat = ((1, 1.0), (64, 1.0))
    rates = StreamRates(copies, reads_beside + copies_beside, flat, flat)
    read = 1e9
    alone = read / reads / 1e3
    beside = beside_copies(alone, 2 * read, read, rates)
    assert read / (alone + beside.cpu_us) / 1e3 == pytest.approx(reads_beside, rel=0.03)
    assert alone * copies / (alone + beside.copies_us) == pytest.approx(copies_beside, rel=0.04)
    for nothing in (beside_copies(alone, 0.0, read, rates), beside_copies(0.0, read, 0.0, rates)):
        assert (nothing.cpu_us, nothing.copies_us) == (0.0, 0.0)


@pytest.mark.parametrize(("reads", "slower"), [(37.0, 1.10), (22.0, 1.08), (10.0, 1.0)])
def test_experts_that_compute_are_slowed_down_by_copies_as_they_were(reads, slower):
    """Of an H200's host, 146 GB/s of memory, copies at 55 GB/s (docs/decisions/expert-streaming.md)."""
    assert reads_slowdown(reads, 55.0, 146.0) == pytest.approx(slower, abs=0.035)
    assert copies_slowdown(reads, 55.0, 146.0) == 1.05


def test_the_cases_that_the_runtime_is_held_to_are_these():
    for case in json.loads(CASES.read_text()):
        rates = StreamRates(**{k: tuple(map(tuple, v)) if isinstance(v, list) else v for k, v in case["rates"].items()})
        assert asdict(split_experts(SplitInput(**case["input"]), rates)) == case["split"]


def write_cases() -> None:
    """Random cases with every outcome: none copied, some, all."""
    draw = random.Random(1)
    cases = []
    for _ in range(200):
        rates = StreamRates(
            draw.choice([6.0, 25.0, 53.0]),
            draw.choice([60.0, 90.0, 124.0]),
            tuple((n, draw.uniform(10, 100) * (1 + n / 16)) for n in (1, 16, 256)),
            tuple((n, draw.uniform(1, 3) * (1 + n / 64)) for n in (1, 16, 256)),
        )
        tokens = sorted((draw.randrange(0, 200) for _ in range(draw.randrange(0, 130))), reverse=True)
        most, slots = draw.randrange(0, 140), draw.choice((4, 16, 64, 256))
        copied = draw.randrange(0, min(most, slots, len(tokens)) + 1) if draw.random() < 0.5 else 0
        lead_us, resident_us = draw.choice((0.0, draw.uniform(0, 2000))), draw.uniform(0, 500)
        given_input = SplitInput(
            tokens, copied, most, slots, draw.randrange(17, 8193), lead_us, resident_us, 2654208.0, 8192.0
        )
        found = split_experts(given_input, rates)
        cases.append({"input": asdict(given_input), "rates": asdict(rates), "split": asdict(found)})
    CASES.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_cases()
