"""Each pass on a small plan built by hand: what holds before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.errors import HetcompError
from hetcomp.ir.annotations import AdapterTarget, AttachedAdapter, ExpertPlacement, Placement
from hetcomp.ir.lifetimes import Lifetime, place_lifetimes
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.ir.printer import print_plan
from hetcomp.ir.types import DType
from hetcomp.ir.verifier import verify
from hetcomp.passes.annotate_cost import annotate_cost
from hetcomp.passes.attach_lora import attach_lora
from hetcomp.passes.bind_weights import bind_weights
from hetcomp.passes.choose_formats import choose_formats
from hetcomp.passes.context import Context, FormatRequest
from hetcomp.passes.insert_transfers import insert_transfers
from hetcomp.passes.pipeline import PIPELINE, run_pipeline
from hetcomp.passes.place import place
from hetcomp.passes.slice_numa import slice_numa
from hetcomp.passes.work import expected_experts
from tests.reference.plan_builder import EXPERTS, GIB, HIDDEN, TOP_K, WIDTH, context, tiny_plan


def upto(name: str, ctx: Context, plan: Plan | None = None) -> Plan:
    return run_pipeline(plan or tiny_plan(), ctx, stop_after=name)


def op_cost(plan: Plan, template: str, op: str, phase: str):
    found = next(o for o in plan.template(template).ops if o.id == op)
    assert found.cost is not None
    return found.cost.phase(phase)


def test_bind_weights_gives_every_weight_a_source():
    done = bind_weights(tiny_plan(), context())
    assert all(v.source is not None for v in done.values if v.kind is ValueKind.WEIGHT)
    assert all(v.source is None for v in done.values if v.kind is not ValueKind.WEIGHT)


def test_bind_weights_without_checkpoint_says_so():
    done = bind_weights(tiny_plan(), replace(context(), checkpoint=None))
    assert "cannot be compiled" in done.notes[0]


def test_attach_lora_records_what_is_merged_and_changes_nothing_else():
    plan = upto("bind_weights", context())
    name = next(v.fqn for v in plan.values if v.kind is ValueKind.WEIGHT and v.fqn)
    adapter = AttachedAdapter("tuned", "0" * 64, True, (AdapterTarget(name, 4),))
    done = attach_lora(plan, replace(context(), adapters=(adapter,)))
    assert done == replace(plan, adapters=(adapter,))
    assert "adapter tuned" in print_plan(done)
    other = replace(adapter, targets=(AdapterTarget("model.nothing.weight", 4),))
    with pytest.raises(HetcompError, match=r"tuned changes model\.nothing\.weight"):
        attach_lora(plan, replace(context(), adapters=(other,)))


def test_attach_lora_refuses_weights_that_are_not_float():
    plan = upto("bind_weights", context())
    value = next(v for v in plan.values if v.kind is ValueKind.WEIGHT and v.fqn and v.source is not None)
    coarse = replace(value.source, tensors=tuple(replace(t, dtype="F8_E4M3") for t in value.source.tensors))
    plan = replace(plan, values=tuple(replace(v, source=coarse) if v is value else v for v in plan.values))
    adapter = AttachedAdapter("tuned", "0" * 64, True, (AdapterTarget(value.fqn, 4),))
    with pytest.raises(HetcompError, match=r"tuned cannot be merged: .* stored as F8_E4M3"):
        attach_lora(plan, replace(context(), adapters=(adapter,)))


def test_choose_formats_reaches_plan_and_template_alike():
    plan = upto("choose_formats", context("bf16"))
    values = plan.value_map()
    assert values["l1.gate_up.w"].format == "bf16"
    assert values["l1.gate_up.w"].type.layout == "panels16"
    assert values["l0.router.w"].format == "f32"  # a router stays exact
    assert (values["l0.norm.w"].format, values["l0.norm.w"].type.layout) == ("f32", "row_major")
    assert plan.template("layer_0").value("gate_up.w").format == "bf16"
    assert plan.template("layer_0").value("k.cache").type.dtype is DType.BF16


def test_choose_formats_by_role():
    ctx = context({"experts": "bf16", "attention": "f32", "embedding": "f32"})
    values = upto("choose_formats", ctx).value_map()
    assert values["l0.down.w"].format == "bf16"
    assert values["l0.q.w"].format == "f32"
    assert values["l0.k.cache"].type.dtype is DType.F32


def test_a_q8_cache_is_asked_for_by_role_and_counted_in_its_groups():
    plan = upto("annotate_cost", context({"kv": "q8"}))
    key = plan.value_map()["l0.k.cache"]
    assert key.type.dtype is DType.Q8
    # 4 heads x 16 numbers, each head's row padded to a group of 32 codes and a scale.
    assert key.type.bytes({"slots": 2, "context": 5}) == 2 * 4 * 5 * 34
    assert op_cost(plan, "layer_0", "attend", "decode").state_bytes == 2 * 4 * 34 * 53
    assert FormatRequest.parse("q8").of("kv") == "auto"
    with pytest.raises(HetcompError, match="Unknown KV cache format 'q4'"):
        FormatRequest.parse({"kv": "q4"})


@pytest.mark.parametrize(
    ("dtype", "memory", "expected", "noted"),
    [("BF16", 8 * GIB, "bf16", False), ("F32", 8 * GIB, "f32", False), ("F32", 1 << 18, "bf16", True)],
)
def test_auto_keeps_the_checkpoints_precision_if_it_fits(dtype, memory, expected, noted):
    plan = upto("choose_formats", context("auto", dtype, memory=memory))
    assert plan.value_map()["l0.q.w"].format == expected
    assert any("rounded to bf16" in note for note in plan.notes) == noted


@pytest.mark.parametrize(
    ("formats", "words"), [("q5", "Unknown weight format"), ({"kv": "q4"}, "Unknown KV cache format 'q4'")]
)
def test_formats_that_are_not_there_are_refused(formats, words):
    with pytest.raises(HetcompError, match=words):
        FormatRequest.parse(formats)
    with pytest.raises(HetcompError, match="Unknown weight role 'expert'"):
        FormatRequest.parse({"expert": "bf16"})


def test_costs_by_hand():
    plan = upto("annotate_cost", context("bf16"))
    experts = op_cost(plan, "layer_0", "experts", "decode")
    assert experts.flops == 6 * TOP_K * HIDDEN * WIDTH
    assert experts.weight_bytes == pytest.approx(TOP_K * 3 * HIDDEN * WIDTH * 2)
    assert experts.bound == "memory"
    prefill = op_cost(plan, "layer_0", "experts", "prefill")
    assert prefill.flops == 16 * experts.flops
    assert prefill.weight_bytes == pytest.approx(expected_experts(EXPERTS, TOP_K, 16) * 3 * HIDDEN * WIDTH * 2)
    head = op_cost(plan, "epilogue", "head", "prefill")
    assert head.flops == 2 * HIDDEN * 128  # one row of logits of a prompt
    attention = op_cost(plan, "layer_0", "attend", "decode")
    assert attention.flops == 2 * 64 * 2 * 53  # a prompt of 43 and half of an answer of 21 in a context of 64
    assert attention.state_bytes == 2 * 64 * 53 * 2


def test_expected_experts_against_counting():
    # 4 experts, top-2, two tokens: 1/6 of the pairs are equal (2 experts), 1/6 disjoint (4), the rest 3.
    assert expected_experts(4, 2, 2) == pytest.approx((2 + 4 + 4 * 3) / 6)
    assert expected_experts(8, 2, 1) == 2


def test_place_on_one_node_gives_every_expert_its_home():
    plan = upto("place", context())
    placement = dict(plan.calls[1].placements)["experts"]
    assert placement == Placement("cpu:0", (ExpertPlacement(0, EXPERTS - 1, "cpu:0"),))


def test_too_little_memory_is_refused_with_a_byte_table():
    with pytest.raises(HetcompError, match=r"does not fit into memory; nothing was read") as caught:
        upto("place", context(memory=100_000))
    text = str(caught.value)
    assert "weights, experts, bf16" in text and "KV cache, 2 x 64 positions" in text
    assert "100,000 bytes" in text and "missing" in text


def test_no_transfers_on_one_machine_memory():
    sliced = upto("slice_numa", context(nodes=2))
    assert insert_transfers(sliced, context(nodes=2)).templates == sliced.templates


def test_transfers_where_an_op_is_elsewhere():
    """Experts of layer 1 on a GPU: that layer gets a template of its own with the activations sent and returned."""
    plan = upto("slice_numa", context())
    moved = tuple((op, replace(p, device="gpu:0") if op == "experts" else p) for op, p in plan.calls[2].placements)
    plan = replace(plan, calls=(*plan.calls[:2], replace(plan.calls[2], placements=moved), *plan.calls[3:]))
    done = insert_transfers(plan, context())
    verify(done)
    assert [c.template for c in done.calls] == ["prologue", "layer_0", "layer_0_1", "epilogue"]
    transfers = [op for op in done.template("layer_0_1").ops if op.kind == "transfer"]
    assert [(t.inputs[0], t.attrs.target) for t in transfers] == [
        ("mid", "gpu:0"),
        ("ids", "gpu:0"),
        ("weights", "gpu:0"),
        ("moe", "cpu"),
    ]
    assert not [op for op in done.template("layer_0").ops if op.kind == "transfer"]


def test_schedule_has_no_barrier_between_independent_ops():
    template = upto("schedule", context()).template("layer_0")
    barriers = {op.id: op.schedule.barrier_before for op in template.ops if op.schedule}
    assert [op.id for op in template.ops][:6] == ["norm", "q", "k", "v", "append_k", "append_v"]
    assert {name for name, needed in barriers.items() if not needed} == {"k", "v", "append_v"}


def test_memory_is_shared_but_never_while_alive():
    plan = upto("plan_memory", context())
    verify(plan)
    slots = {s.value: s for s in plan.template("layer_0").arena}
    row = 16 * HIDDEN * 4
    assert slots["workspace:experts"].bytes == 4096
    own = sum(s.bytes for s in slots.values())
    handed = sum(s.bytes for s in plan.call_arena)
    assert plan.arena_bytes < own + handed
    assert [s.value for s in plan.call_arena] and all(s.bytes == row for s in plan.call_arena)
    # h0, h1, h2: a call reads one while it writes the next, so two places serve all.
    assert len({s.offset for s in plan.call_arena}) == 2


def test_place_lifetimes_packs_around_what_is_alive():
    slots, end = place_lifetimes([Lifetime("a", 100, 0, 1), Lifetime("b", 64, 1, 2), Lifetime("c", 100, 2, 3)], base=64)
    assert {s.value: s.offset for s in slots} == {"a": 64, "c": 64, "b": 192}
    assert end == 256


def test_simulate_adds_up():
    plan = upto("simulate", context())
    decode = next(t for t in plan.timelines if t.phase == "decode")
    assert decode.tokens_per_s == pytest.approx(1e6 / decode.total_us)
    expected = sum(
        op.cost.phase("decode").us + (1.0 if op.schedule.barrier_before else 0.0)
        for call in plan.calls
        for op in plan.template(call.template).ops
    )
    assert decode.total_us == pytest.approx(expected)
    assert sum(us for _, us in decode.roles) == pytest.approx(expected)


def test_two_nodes_with_sliced_weights_are_faster():
    one = upto("simulate", context())
    two = upto("simulate", context(nodes=2))
    assert two.timelines[0].total_us < one.timelines[0].total_us


def test_pipeline_order_and_dumps(tmp_path):
    run_pipeline(tiny_plan(), context(), stop_after="place", dump_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00-lower.txt",
        "01-bind_weights.txt",
        "02-attach_lora.txt",
        "03-choose_formats.txt",
        "04-annotate_cost.txt",
        "05-place.txt",
    ]
    with pytest.raises(HetcompError, match="There is no pass 'plaice'"):
        run_pipeline(tiny_plan(), context(), stop_after="plaice")


def test_passes_are_pure():
    plan = tiny_plan()
    before = plan
    for plan_pass in PIPELINE:
        after = plan_pass(plan, context())
        assert plan_pass(plan, context()) == after
        plan = after
    assert before == tiny_plan()


def test_pass_functions_say_what_they_establish():
    assert slice_numa.requires == {"placed"} and place.establishes == {"placed"}
    assert annotate_cost.name == "annotate_cost" and choose_formats.requires == {"weights_bound"}
