"""The split of a layer's experts between the CPU and the GPU: the best of all, and the same as the runtime's."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetcomp.ir.annotations import StreamRates
from hetcomp.passes.stream_split import SplitInput, shared_memory_us, split_experts, time_at

# Read by runtime_lib/tests/test_expert_stream.cpp too; running this file makes it anew.
CASES = Path(__file__).resolve().parents[1] / "data" / "stream_splits.json"

curves = st.lists(st.floats(0.5, 500.0), min_size=1, max_size=4).map(
    lambda us: tuple((8**i, sum(us[: i + 1])) for i in range(len(us)))
)
rates_of = st.builds(StreamRates, st.floats(1.0, 100.0), st.floats(100.0, 300.0), curves, curves, curves)


@st.composite
def inputs(draw: st.DrawFn) -> SplitInput:
    tokens = draw(st.lists(st.integers(0, 300), max_size=20))
    most = draw(st.integers(0, 24))
    copied, slots = draw(st.integers(0, min(most, len(tokens)))), draw(st.integers(1, 24))
    return SplitInput(tokens, copied, most, slots, draw(st.integers(17, 9000)), draw(st.floats(0, 1e4)), 2.6e6, 8192.0)


def layer_us(given: SplitInput, rates: StreamRates, count: int) -> float:
    """The definition, for one number of copied experts."""
    link = rates.link_gb_per_s * 1e3
    cpu = sum(time_at(rates.cpu_expert_us, n) for n in given.tokens[count:] if n)
    gpu = given.resident_us + sum(time_at(rates.gpu_expert_us, n) for n in given.tokens[:count] if n)
    exchange = given.step_tokens * given.activation_bytes / link if cpu else 0.0
    spine = time_at(rates.spine_us, given.step_tokens)
    copy = given.expert_bytes / link
    late = spine + given.resident_us + (count - given.slots) * copy if count > given.slots else 0.0
    read = sum(given.expert_bytes for n in given.tokens[count:] if n)
    # While the CPU computes, the link copies at its rate, if there is so much; the memory gives both of them less.
    beside = min(count * given.expert_bytes, cpu * link)
    contended = max(cpu, (read + beside) / (rates.joint_gb_per_s * 1e3))
    copies = count * copy + exchange + (contended - cpu if count else 0.0)
    return max(copies, late, spine + 2 * exchange + max(gpu, contended))


@given(inputs(), rates_of)
def test_no_other_number_of_copies_is_faster(given_input, rates):
    found = split_experts(given_input, rates)
    choices = range(given_input.copied, max(given_input.copied, min(len(given_input.tokens), given_input.most)) + 1)
    assert found in choices
    best = min(layer_us(given_input, rates, n) for n in choices)
    assert layer_us(given_input, rates, found) <= best * (1 + 1e-9)


def test_cpu_and_copies_share_the_memory_as_they_were_measured_to():
    # GB/s of 15 threads that read and of a GPU that copies, each alone, then together
    # (benchmarks/results/gpu_profile-20261124T170849-9fd7c8f.json).
    reads, copies, reads_beside, copies_beside = 97.6, 54.3, 81.2, 42.75
    flat = ((1, 1.0), (64, 1.0))
    rates = StreamRates(copies, reads_beside + copies_beside, flat, flat, flat)
    read = 1e9
    alone = read / reads / 1e3
    beside = alone + shared_memory_us(alone, 2 * read, read, rates)
    assert read / beside / 1e3 == pytest.approx(reads_beside, rel=0.03)
    assert alone * copies / beside == pytest.approx(copies_beside, rel=0.04)
    assert shared_memory_us(alone, 0.0, read, rates) == 0.0
    slow = 1.5 * (read + copies * 1e3 * alone) / rates.joint_gb_per_s / 1e3  # computes longer than it would read
    assert shared_memory_us(slow, 2 * read, read, rates) == 0.0


def test_the_cases_that_the_runtime_is_held_to_are_these():
    for case in json.loads(CASES.read_text()):
        rates = StreamRates(**{k: tuple(map(tuple, v)) if isinstance(v, list) else v for k, v in case["rates"].items()})
        assert split_experts(SplitInput(**case["input"]), rates) == case["copied"]


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
            tuple((n, draw.uniform(20, 60) * (1 + n / 256)) for n in (32, 512, 8192)),
        )
        tokens = sorted((draw.randrange(0, 200) for _ in range(draw.randrange(0, 130))), reverse=True)
        most, slots = draw.randrange(0, 140), draw.choice((4, 16, 64, 256))
        copied = draw.randrange(0, min(most, slots, len(tokens)) + 1) if draw.random() < 0.5 else 0
        given_input = SplitInput(
            tokens, copied, most, slots, draw.randrange(17, 8193), draw.uniform(0, 500), 2654208.0, 8192.0
        )
        found = split_experts(given_input, rates)
        cases.append({"input": asdict(given_input), "rates": asdict(rates), "copied": found})
    CASES.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    write_cases()
