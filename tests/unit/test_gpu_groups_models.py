"""Whole steps of tiny models as groups of GPU ops, interpreted, against the plan's interpreter; launches."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp import frontend
from hetcomp.backends.gpu.groups import GpuGroup, group_ops
from hetcomp.ir.plan import Op, ValueKind
from hetcomp.ir.types import DType
from tests.reference import tiny_models
from tests.reference.cache_blocks import cache_block
from tests.reference.flat_plan import FlatPlan, StoredWeights, flatten
from tests.reference.group_harness import run_groups
from tests.reference.kernel_harness import Step
from tests.reference.plan_interpreter import PlanInterpreter
from tests.sampled_cases import rest

CONTEXT = 16
BOUND = 1e-4  # of the largest logit: as tests/parity/test_lowering.py allows f32 sums in another order
# Odd sizes; GLM has norms of heads, DeepSeek a low rank for queries, in the other variant only.
VARIANTS = [*((name, True) for name in tiny_models.EACH_OP), ("glm4_moe", False), ("deepseek_v3", False)]
# Launches of a decode step's last layer.
LAUNCHES = {
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "minimax_m2"), 9),
    "phimoe": 11,
    **{"qwen2_moe": 14, "glm4_moe": 11, "deepseek_v3": 14, "llama": 7, "qwen3": 7},
}


def _format(op: Op) -> str:
    return "f32" if op.role in ("moe.router", "lm_head", "embed") else "q8"


def _imported(name: str, odd: bool, layers: int):
    types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if name == "gpt_oss" else {}
    model = tiny_models.build(name, odd, num_hidden_layers=layers, **types)
    return frontend.load(model, context_length=CONTEXT, max_batch=2, max_tokens=CONTEXT, max_logit_rows=CONTEXT)


def _groups(flat: FlatPlan, dims: dict[str, int], rows: int | None) -> tuple[GpuGroup, ...]:
    dims = {**dims, "cache_block": cache_block(list(flat.values.values()))}
    return group_ops(flat.ops, flat.values, {"logits"}, dims, rows)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *rest((name, True) for name in tiny_models.OTHERS)], ids=str)
def test_decode_steps_agree_with_the_plan(variant):
    """Two sequences, two steps."""
    name, odd = variant
    imported = _imported(name, odd, 2)
    dims = imported.plan.max_dims()
    flat = flatten(imported.plan, _format, DType.F32)
    stored = StoredWeights(flat, imported.checkpoint, dims)
    reference = PlanInterpreter(imported.plan, stored)
    groups = _groups(flat, dims, 2)
    (logits,) = (v.id for v in imported.plan.values if v.kind is ValueKind.OUTPUT)
    rng = np.random.default_rng(0)
    slots = np.array([1, 0], np.int32)
    for number in range(2):
        ids = rng.integers(3, imported.plan.model.vocab, 2).astype(np.int32)
        positions = np.array([number, number], np.int32)
        want = reference.step(ids.tolist(), positions.tolist(), slots.tolist()).numpy()
        step = Step(positions, slots, np.array([0, 1], np.int32), CONTEXT)
        given = {**stored.arrays, "ids": ids, "positions": positions}
        got = run_groups(groups, flat.values, given, 2, step)[logits]
        assert np.abs(got - want).max() <= BOUND * np.abs(want).max(), f"step {number}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tiny_models.EACH_OP, *rest(tiny_models.OTHERS)])
def test_prefill_agrees_with_the_plan(name):
    """A prompt of one sequence, in a graph for more rows. All weights f32, so that nothing is rounded but what beside a
    cache of f32 stays f32 too."""
    imported = _imported(name, True, 2)
    dims = imported.plan.max_dims()
    flat = flatten(imported.plan, lambda op: "f32", DType.F32)
    stored = StoredWeights(flat, imported.checkpoint, dims)
    groups = _groups(flat, dims, None)
    (logits,) = (v.id for v in imported.plan.values if v.kind is ValueKind.OUTPUT)
    rows = 11
    ids = np.random.default_rng(0).integers(3, imported.plan.model.vocab, rows).astype(np.int32)
    positions, slots = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    want = PlanInterpreter(imported.plan, stored).step(ids.tolist(), positions.tolist(), slots.tolist()).numpy()
    step = Step(positions, slots, positions, CONTEXT)
    got = run_groups(groups, flat.values, {**stored.arrays, "ids": ids, "positions": positions}, rows, step)[logits]
    assert np.abs(got - want).max() <= BOUND * np.abs(want).max()


@pytest.mark.parametrize(("name", "launches"), LAUNCHES.items())
def test_launches_of_a_layer_in_decode(name, launches):
    imported = _imported(name, False, 2)
    flat = flatten(imported.plan, _format, DType.BF16)
    layer = len(imported.plan.calls) - 2  # the last one
    groups = _groups(flat, imported.plan.max_dims(), 1)
    of_layer = [g for g in groups if flat.call_of(g.ops[-1]) == layer]
    assert sum(len(g.code.launches) for g in of_layer) == launches, [[op.id for op in g.ops] for g in of_layer]


@pytest.mark.parametrize("rows", [2, 9, None])
@pytest.mark.parametrize("name", [*tiny_models.EACH_OP, *rest(tiny_models.OTHERS)])
def test_order_and_coverage(name, rows):
    """Every op is in one group; a group reads what groups before it have written, and appends come before reads."""
    imported = _imported(name, False, 2)
    flat = flatten(imported.plan, _format, DType.BF16)
    groups = _groups(flat, imported.plan.max_dims(), rows)
    assert sorted(op.id for g in groups for op in g.ops) == sorted(op.id for op in flat.ops)
    written = set(flat.values) - {v for op in flat.ops for v in op.outputs}
    appended: set[str] = set()
    for group in groups:
        assert written.issuperset(group.inputs), [op.id for op in group.ops]
        written.update(group.outputs)
        for op in group.ops:
            states = {v for v in op.inputs if flat.values[v].kind is ValueKind.STATE}
            assert states <= set(group.inputs)
            assert op.kind != "attention" or states <= appended
            appended |= states
    assert "logits" in written
