"""The length of the largest step: that of the fastest request that fills the context, by simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetcomp.ir.annotations import Mix
from hetcomp.ir.plan import Plan
from hetcomp.ir.types import Dim
from hetcomp.passes import step_length
from hetcomp.passes.context import Context
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.step_length import STEP_TOKENS, request_us, step_tokens
from tests.reference.plan_builder import context, gpu, tiny_plan

LAYERS = 8  # 0.6 MB of weights, KV caches of 4 KB a position; activations of 3 KB a token


def machine(mebibytes: int) -> Context:
    """A slow CPU and a GPU with so much memory for the model."""
    cards = (gpu(GPU_RESERVE + (mebibytes << 20)),)
    return replace(context(nodes=1, bandwidths=(3.0, 3.0), gpus=cards), use_gpus=True)


def plan_for(length: int, ctx: Context, most: int = 16384) -> Plan:
    dims = (Dim("T", 1, most), Dim("R", 1, 4), Dim("slots", 1, 1), Dim("context", length, length))
    return run_pipeline(replace(tiny_plan(LAYERS), dims=dims), ctx, stop_after="choose_formats")


@pytest.mark.parametrize(
    ("length", "mebibytes", "expected"),
    [
        (4096, 64, 4096),  # one step for a prompt of 3,840, no longer one
        (8192, 64, 8192),
        (4096, 16, 2048),  # 4,096 tokens would leave no room for the KV caches
        (4096, 8, 512),
        (512, 64, 512),
    ],
)
def test_long_contexts_have_long_steps_as_far_as_memory_goes(length, mebibytes, expected):
    ctx = machine(mebibytes)
    assert step_tokens(plan_for(length, ctx), ctx) == expected


def test_the_chosen_length_is_the_fastest_and_the_same_each_time():
    ctx = machine(24)
    plan = plan_for(8192, ctx)
    answer = 256
    times = {n: request_us(plan, ctx, n, 8192 - answer, answer) for n in STEP_TOKENS}
    assert times == {n: request_us(plan, ctx, n, 8192 - answer, answer) for n in STEP_TOKENS}
    chosen = step_tokens(plan, ctx)
    assert times[chosen] == min(times.values()) and 512 < chosen < 8192


def test_several_sequences_have_the_step_that_one_of_them_is_fastest_with():
    ctx = machine(64)
    plan = plan_for(2048, ctx)
    dims = tuple(replace(d, max=4) if d.name == "slots" else d for d in plan.dims)
    assert step_tokens(replace(plan, dims=dims, mix=Mix(512, 256, 4)), ctx) == 2048


def test_a_bound_of_the_plan_is_kept():
    ctx = machine(64)
    assert step_tokens(plan_for(8192, ctx, most=1024), ctx) == 1024
    assert step_tokens(plan_for(8192, ctx, most=64), ctx) == 64


def test_what_fits_nowhere_is_left_to_placement_to_refuse(monkeypatch):
    monkeypatch.setattr(step_length, "fits", lambda problem, assignment: False)
    ctx = machine(64)
    assert step_tokens(plan_for(8192, ctx), ctx) == STEP_TOKENS[0]


@given(st.integers(1, 40000), st.integers(1, 300), st.sampled_from(STEP_TOKENS))
def test_the_steps_of_a_request_have_all_its_tokens(prompt, answer, tokens):
    steps = step_length._steps(prompt, answer, tokens)
    prefill = {step: n for step, n in steps.items() if step.name == "prefill"}
    assert sum(step.tokens * n for step, n in prefill.items()) == prompt
    assert sum(n for step, n in steps.items() if step.name == "decode") == answer
    assert all(step.tokens <= step.position <= prompt for step in prefill)
