"""Cuts over NUMA nodes: where they fall, what each node gets, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetcomp.backends.cut_weights import CutReader
from hetcomp.backends.program import ProgramLayout
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.annotations import ExpertPlacement, NodeSlice, Placement
from hetcomp.ir.node_parts import node_parts, part_workspace, plan_nodes, plan_parts
from hetcomp.ir.plan import Op, Plan, Template, Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.ir.verifier import verify
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.passes.place import placed_as
from hetcomp.passes.placement_assignment import Assignment
from hetcomp.passes.placement_problem import placement_problem
from hetcomp.passes.slice_numa import _slice, node_slices, slice_numa
from tests.reference.plan_builder import EXPERTS, GIB, HIDDEN, TOP_K, WIDTH, context, gpu, profile, tiny_plan

WIDE = 96  # three groups of 32 columns: a cut in proportion 2 : 1


def wide_plan() -> Plan:
    """The tiny plan with experts wide enough to be cut."""
    plan = tiny_plan()

    def widened(values):
        shapes = {"gate_up.w": (EXPERTS, 2 * WIDE, HIDDEN), "down.w": (EXPERTS, HIDDEN, WIDE)}
        found = ((v, shapes.get(v.id.partition(".")[2] if v.id[0] == "l" else v.id)) for v in values)
        return tuple(v if s is None else replace(v, type=TensorType(v.type.dtype, s)) for v, s in found)

    layer = plan.template("layer_0")
    experts = ops.MoeExperts(EXPERTS, TOP_K, HIDDEN, WIDE)
    body = tuple(replace(op, attrs=experts) if op.id == "experts" else op for op in layer.ops)
    layer = replace(layer, values=widened(layer.values), ops=body)
    return replace(plan.map_templates({"layer_0": layer}), values=widened(plan.values))


def two_nodes(stop_after: str | None = None) -> Plan:
    return run_pipeline(wide_plan(), context(nodes=2, bandwidths=(30.0, 15.0)), stop_after=stop_after)


def placements(plan: Plan, call: int = 1) -> dict[str, Placement]:
    return dict(plan.calls[call].placements)


def test_slices_are_whole_steps_in_proportion():
    machine = profile(nodes=2, bandwidths=(30.0, 10.0))
    assert node_slices(512, machine) == (NodeSlice(0, 0, 384), NodeSlice(1, 384, 512))
    assert node_slices(96, machine, 32) == (NodeSlice(0, 0, 64), NodeSlice(1, 64, 96))
    assert node_slices(768, machine, 128) == (NodeSlice(0, 0, 512), NodeSlice(1, 512, 768))
    assert node_slices(100, machine, 32) == (NodeSlice(0, 0, 64), NodeSlice(1, 64, 100))
    assert node_slices(512, profile()) == (NodeSlice(0, 0, 512),)


def test_what_is_too_narrow_stays_whole_on_the_fastest_node():
    machine = profile(nodes=2, bandwidths=(10.0, 30.0))
    assert node_slices(16, machine) == (NodeSlice(1, 0, 16),)
    assert node_slices(8, machine) == (NodeSlice(1, 0, 8),)


def test_experts_are_cut_at_groups_and_linears_at_panels():
    placed = placements(two_nodes("slice_numa"))
    assert placed["experts"].experts == (ExpertPlacement(0, EXPERTS - 1, "cpu:0"),)
    assert placed["experts"].slices == (NodeSlice(0, 0, 64), NodeSlice(1, 64, WIDE))
    assert placed["q"].slices == (NodeSlice(0, 0, 48), NodeSlice(1, 48, 64))
    assert placed["attend"].slices == () and placed["norm"].slices == ()


@pytest.mark.parametrize(("form", "border"), [("q4", 576), ("fp8", 512), ("q4k", 512), ("q6k", 512)])
def test_experts_are_cut_where_columns_stop_sharing_scales(form, border):
    shape = TensorType(DType.F32, (EXPERTS, HIDDEN, 768), "panels16")
    down = Value("down", shape, ValueKind.WEIGHT, format=form)
    op = Op("experts", ops.MoeExperts(EXPERTS, TOP_K, HIDDEN, 768), ("down",), ("y",))
    template = Template("t", (down,), (op,), ("down",), ())
    home = Placement("cpu:0", (ExpertPlacement(0, EXPERTS - 1, "cpu:0"),))
    cut = _slice(op, template, home, profile(nodes=2, bandwidths=(30.0, 10.0)))
    assert cut.slices == (NodeSlice(0, 0, border), NodeSlice(1, border, 768))


def test_experts_whose_down_has_an_order_of_columns_are_spread_whole():
    """Those on the CPU, in proportion to the nodes' bandwidths; what a GPU has stays there."""
    shape = TensorType(DType.F32, (8, HIDDEN, 768), "panels16_act_order")
    down = Value("down", shape, ValueKind.WEIGHT, format="q4")
    op = Op("experts", ops.MoeExperts(8, TOP_K, HIDDEN, 768), ("down",), ("y",))
    template = Template("t", (down,), (op,), ("down",), ())
    runs = (ExpertPlacement(0, 2, "cpu:0"), ExpertPlacement(3, 3, "gpu:0"), ExpertPlacement(4, 7, "cpu:0"))
    cut = _slice(op, template, Placement("cpu:0", runs), profile(nodes=2, bandwidths=(50.0, 20.0)))
    assert cut.slices == ()
    assert cut.experts == (
        *(ExpertPlacement(0, 2, "cpu:0"), ExpertPlacement(3, 3, "gpu:0")),
        *(ExpertPlacement(4, 5, "cpu:0"), ExpertPlacement(6, 7, "cpu:1")),
    )
    one = _slice(op, template, Placement("cpu:0", runs[:1]), profile())
    assert (one.experts, one.slices) == (runs[:1], (NodeSlice(0, 0, 768),))


def test_weights_that_another_op_reads_are_not_cut():
    plan = two_nodes("slice_numa")  # embeddings and lm_head are tied
    assert placements(plan, -1)["head"].slices == ()
    narrow = run_pipeline(tiny_plan(), context(nodes=2), stop_after="slice_numa")
    assert placements(narrow)["experts"].slices == (NodeSlice(0, 0, WIDTH),)


def test_every_number_of_a_weight_lies_on_one_node():
    plan = two_nodes()
    layout = ProgramLayout.of(plan)
    assert (layout.nodes, layout.main) == ((0, 1), 0)
    numbers = {}
    for value in plan.values:
        if value.kind is ValueKind.WEIGHT:
            shape = [int(d) for d in value.type.shape]
            numbers[value.id] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    class Reader:
        def read(self, value):
            return numbers[value.id]

        def read_expert(self, value, expert):
            return numbers[value.id][expert]

    reader = CutReader(Reader(), layout.cuts)
    seen = {name: [] for name in numbers}
    for value in layout.weights:
        if value.kind is not ValueKind.WEIGHT:
            continue
        part = reader.read(value)
        assert part.shape == value.type.shape
        if len(part.shape) == 3:
            assert all((reader.read_expert(value, e) == part[e]).all() for e in range(len(part)))
        seen[value.id.partition("@")[0]].append(part.ravel())
    for name, parts in seen.items():
        assert sorted(np.concatenate(parts)) == list(range(numbers[name].size)), name
    gate_up = reader.read(next(v for v in layout.weights if v.id == "l0.gate_up.w@1"))
    assert gate_up[0, 0, 0] == 64 * HIDDEN and gate_up[0, 32, 0] == (WIDE + 64) * HIDDEN


def test_biases_go_with_their_rows_and_down_bias_is_added_once():
    experts = ops.MoeExperts(EXPERTS, TOP_K, HIDDEN, WIDE, bias=True)
    op = Op("experts", experts, tuple("abcdefg"), ("y",))
    slices = (NodeSlice(0, 0, 64), NodeSlice(1, 64, WIDE))
    first, second = node_parts(op, Placement("cpu:0", (ExpertPlacement(0, EXPERTS - 1, "cpu:0"),), slices))
    assert not dict(first.cuts)[6].zero and dict(second.cuts)[6].zero
    assert dict(second.cuts)[5].runs == ((64, 96), (160, 192))
    linear = Op("o", ops.Linear(8, 64, bias=True), ("x", "w", "b"), ("y",))
    rows = node_parts(linear, Placement("cpu:0", slices=(NodeSlice(0, 0, 48), NodeSlice(1, 48, 64))))
    assert [p.first_column for p in rows] == [0, 48] and dict(rows[1].cuts)[2].runs == ((48, 64),)


def test_experts_that_all_lie_on_another_node_are_its_part():
    op = Op("experts", ops.MoeExperts(EXPERTS, TOP_K, HIDDEN, WIDE), tuple("abcde"), ("y",))
    away = (ExpertPlacement(0, EXPERTS - 1, "cpu:1"),)
    (part,) = node_parts(op, Placement("cpu:0", away, (NodeSlice(1, 0, WIDE),)))
    assert (part.node, part.attrs, part.experts) == (1, op.attrs, ((0, EXPERTS),))
    home = (ExpertPlacement(0, EXPERTS - 1, "cpu:0"),)
    assert node_parts(op, Placement("cpu:0", home, (NodeSlice(0, 0, WIDE),))) == ()


def test_parts_do_not_share_scratch_memory():
    plan = two_nodes()
    template = plan.template("layer_0")
    op = next(o for o in template.ops if o.id == "experts")
    parts = plan_parts(plan)["layer_0", "experts"]
    space = part_workspace(op, template, parts, [100, 200], plan.max_dims())
    sum_bytes = 16 * HIDDEN * 4
    assert (space.scratch, space.partials, space.bytes) == ((0, 128), (384,), 384 + sum_bytes)
    slot = next(s for s in template.arena if s.value == "workspace:experts")
    assert slot.bytes == 2 * 4096 + sum_bytes


def test_on_one_node_nothing_is_cut():
    plan = run_pipeline(wide_plan(), context())
    assert plan_parts(plan) == {} and plan_nodes(plan) == ((0,), 0)
    layout = ProgramLayout.of(plan)
    assert layout.cuts == {} and set(layout.weight_nodes) == {0}


def test_experts_that_do_not_fit_when_cut_go_to_nodes_as_a_whole():
    ctx = context(nodes=2, bandwidths=(30.0, 15.0))
    room = (8 * GIB, 125_000)  # the cut needs 2 * 3 * 64 * 96 * 8 * 2 / 3 bytes for experts alone
    nodes = tuple(n.model_copy(update={"available_bytes": b}) for n, b in zip(ctx.profile.nodes, room, strict=True))
    plan = run_pipeline(wide_plan(), replace(ctx, profile=ctx.profile.model_copy(update={"nodes": nodes})))
    homes = [[run.device for run in placements(plan, call)["experts"].experts] for call in (1, 2)]
    assert sorted({device for layer in homes for device in layer}) == ["cpu:0", "cpu:1"]
    layout = ProgramLayout.of(plan)
    on_second = [v for v, n in zip(layout.weights, layout.weight_nodes, strict=True) if n == 1]
    assert sum(ctx.target.packed_bytes(v) for v in on_second) <= room[1]
    whole = next(parts for (_, op), parts in plan_parts(plan).items() if op == "experts")
    assert sum(part.attrs.experts for part in whole) == EXPERTS


def test_experts_that_one_node_has_as_a_whole_beside_a_gpus_are_not_cut():
    ctx = replace(context(nodes=2, bandwidths=(30.0, 15.0), gpus=(gpu(),)), use_gpus=True)
    costed = run_pipeline(wide_plan(), ctx, stop_after="annotate_cost")
    problem = placement_problem(costed, ctx)
    split = ({"gpu:0": 3, "cpu:1": EXPERTS - 3},)
    assignment = Assignment(("gpu:0",) * len(problem.groups), frozenset(), (split,) * len(problem.experts))
    plan = slice_numa(placed_as(costed, ctx, problem, assignment), ctx)
    op = next(op for op in plan.template("layer_0").ops if op.id == "experts")
    parts = node_parts(op, placements(plan)["experts"])
    assert [(part.node, part.attrs.experts) for part in parts] == [(1, EXPERTS - 3)]


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ((NodeSlice(0, 0, 40), NodeSlice(1, 40, WIDE)), "multiples of 32"),
        ((NodeSlice(0, 0, 64), NodeSlice(1, 64, 80)), "end at 80"),
        ((NodeSlice(0, 0, 64), NodeSlice(1, 32, WIDE)), "gap or overlap"),
        ((NodeSlice(0, 0, 64), NodeSlice(0, 64, WIDE)), "a node twice"),
        ((NodeSlice(0, 0, 32), NodeSlice(1, 32, WIDE)), "cut over NUMA nodes in another way"),
    ],
)
def test_cuts_edited_by_hand_are_checked(slices, words):
    plan = two_nodes()
    call = plan.calls[1]
    edited = tuple((op, replace(p, slices=slices) if op == "experts" else p) for op, p in call.placements)
    calls = (plan.calls[0], replace(call, placements=edited), *plan.calls[2:])
    with pytest.raises(HetcompError, match=words):
        verify(replace(plan, calls=calls))
