"""What sequences take of memory that share a pool of positions, in the plan's figures."""

from __future__ import annotations

import json
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.cli.main import app
from hetcomp.cli.plan_figures import KV_CACHE, device_memory
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.ir.kv_pool import BLOCK_POSITIONS, GRANULE_BYTES, KvPool, block_bytes, row_runs
from hetcomp.ir.plan import ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.passes.memory_table import memory_table
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned

MODEL = "qwen3moe-1b"  # 12 layers of 4 kv heads of 128: 24,576 bytes a position in bf16
PAGE = 4096


def _state(heads: int, dim: int, dtype: DType) -> TensorType:
    return TensorType(dtype, ("slots", heads, "context", dim))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), slots=st.integers(1, 20), context=st.integers(1, 5000), states=st.integers(1, 100))
def test_whatever_sequences_hold_fits_into_the_figure(data, slots, context, states):
    tokens = data.draw(st.integers(1, slots * context))
    state = _state(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 130)), data.draw(st.sampled_from(DType)))
    pool = KvPool(tokens, slots, context)
    block = states * block_bytes(state)
    memory = pool.gpu_memory(block)
    assert memory.bytes <= states * pool.gpu_bytes(state) + pool.granule_waste
    held, left = [], tokens
    for _ in range(slots):
        held.append(data.draw(st.integers(0, min(left, context))))
        left -= held[-1]
    if memory.granules is not None:
        assert memory.slot_blocks * block % GRANULE_BYTES == 0 and memory.slot_blocks * BLOCK_POSITIONS >= context
        used = sum(ceil(ceil(n / BLOCK_POSITIONS) * block / GRANULE_BYTES) for n in held)
        assert used + ceil(block / GRANULE_BYTES) <= memory.granules
        assert memory.bytes < (slots * ceil(context / BLOCK_POSITIONS) + 1) * block
    # On the CPU a run of rows touches whole pages, at worst with both ends in the middle of one.
    touched = sum((n * row + PAGE - 2) // PAGE * PAGE + PAGE for n in held if n for row in row_runs(state))
    whole = state.bytes({"slots": slots, "context": context})
    assert pool.cpu_bytes(state) <= whole
    assert min(touched, whole) <= pool.cpu_bytes(state)


def test_a_whole_pool_takes_what_it_did_but_for_a_block():
    state = _state(4, 128, DType.BF16)
    pool = KvPool.of({"slots": 2, "context": 4096})
    assert pool.is_whole and str(pool) == "2 x 4,096 positions"
    assert pool.cpu_bytes(state) == state.bytes({"slots": 2, "context": 4096})
    memory = pool.gpu_memory(block_bytes(state))
    assert memory.granules is None and memory.bytes == pool.cpu_bytes(state) + block_bytes(state)


def test_small_caches_have_no_granules():
    """Of 25 blocks of 16 KB the granules would take more than all of them do."""
    memory = KvPool(100, 3, 512).gpu_memory(16 << 10)
    assert memory.granules is None and memory.bytes == 25 * 16 << 10


def _plan(kv_tokens: int | None = None) -> Planned:
    return plan_model(
        MODEL,
        hw_profile="preset:9950x-64gb+rtx4090",
        formats="q4",
        isa=["avx2"],
        context_length=8192,
        max_batch=16,
        wishes=PlanWishes(vram=3 << 30, pins=("attn=gpu:0",)),
        planning=False,
        kv_tokens=kv_tokens,
    )


def test_the_plan_counts_what_the_pool_takes():
    """16 sequences of 8,192 positions of 24,576 bytes are 3.2 GB, 32,768 positions 0.8 GB."""
    planned = _plan(kv_tokens=32768)
    plan, pool = planned.plan, KvPool(32768, 16, 8192)
    assert KvPool.of(plan.max_dims()) == pool
    assert str(pool) == "32,768 positions of at most 16 x 8,192 positions"
    positions = 24576 * 32768
    (row,) = (r for r in memory_table(plan, planned.context) if r.what.startswith("KV cache, 32,768"))
    assert positions <= row.bytes < positions * 1.04
    states = [v.type for v in plan.values if v.kind is ValueKind.STATE]
    (program,) = lower_programs(plan)
    gpu = dict(next(m for m in device_memory(plan, planned.profile) if m.device == "gpu:0").parts)
    assert positions < program.cache.bytes <= gpu[KV_CACHE] < positions * 1.12
    assert gpu[KV_CACHE] == sum(map(pool.gpu_bytes, states)) + pool.granule_waste


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(HetcompError, match=r"140000 positions was asked for; 16 sequences of 8192 .* hold 131072"):
        _plan(kv_tokens=140000)
    with pytest.raises(HetcompError, match="do not fit into a KV cache of 400; give a larger --kv-tokens"):
        plan_model(MODEL, hw_profile="preset:9950x-64gb", kv_tokens=400, wishes=_mix())


def _mix() -> PlanWishes:
    from hetcomp.ir.annotations import Mix

    return PlanWishes(mix=Mix(300, 101))


def test_the_option_of_the_command_line():
    options = ["plan", "demo-moe", "--hw", "preset:9950x-64gb", "--batch", "4", "--kv-tokens", "300", "--json"]
    result = CliRunner().invoke(app, [*options, "--context", "256", "--no-improvements"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dims"]["kv_tokens"] == 300
