"""Which linear layers of the CPU a GPU runs in prompts, whatever the user has pinned where."""

from __future__ import annotations

import random

import pytest

from hetcomp.adapters.pack_adapter import PairLayout
from hetcomp.backends.exchange import Exchange
from hetcomp.backends.gpu.gpu_program import GpuProgram, lower_programs
from hetcomp.backends.gpu.pair_layout import streamed_to
from hetcomp.backends.program import ProgramLayout, render_program
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import select_kernels
from hetcomp.compiler import plan_model
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.annotations import AdapterRoom
from hetcomp.ir.hand_overs import hand_overs
from hetcomp.ir.ops import Linear, Transfer
from hetcomp.passes import placement_groups, stream_weights
from hetcomp.plan_wishes import PlanWishes
from hetcomp.planned import Planned
from tests.reference.plan_builder import avx2_machine, gpu

ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "attn.norm", "residual", "moe.norm")


@pytest.fixture(autouse=True)
def linears_by_themselves(monkeypatch: pytest.MonkeyPatch):
    for module in (placement_groups, stream_weights):
        monkeypatch.setattr(module, "SMALL_BYTES", 512)


def machine(gpus: int, gb_per_s: float = 0.5) -> HardwareProfile:
    plain = avx2_machine(1)
    reads = BandwidthPoint(threads=4, gb_per_s=gb_per_s)
    nodes = tuple(node.model_copy(update={"read_bandwidth": (reads,)}) for node in plain.nodes)
    return plain.model_copy(update={"gpus": (gpu(),) * gpus, "nodes": nodes})


def planned(pins: tuple[str, ...], gpus: int = 1, gb_per_s: float = 0.5, room: AdapterRoom | None = None) -> Planned:
    wishes = PlanWishes(pins=pins, adapter_room=room)
    return plan_model("demo-moe", hw_profile=machine(gpus, gb_per_s), context_length=600, formats="q8", wishes=wishes)


def random_pins(seed: int, gpus: int) -> tuple[str, ...]:
    """Of some roles in some layers to the CPU, all else to the GPUs."""
    r = random.Random(seed)
    layers = [r.randrange(gpus) for _ in range(6)]
    everything = [f"*@{i}=gpu:{g}" for i, g in enumerate(layers)] if gpus > 1 else ["*=gpu:0"]
    roles = ["attn.o", *r.sample(ROLES[:3] + ROLES[4:], r.randrange(1, 5))]
    return (*everything, *(f"{role}@{r.randrange(3)}-{r.randrange(3, 6)}=cpu" for role in roles))


def made_flags(program: GpuProgram, exact: bool) -> set[int]:
    flags = len(program.exchange.hand_overs)
    graphs = [g for g in program.graphs if g.rows.exact == exact and bool(g.portions) != exact]
    nodes = [node["hand_over"] for g in graphs for node in g.nodes if "hand_over" in node]
    return {h["flag"] for h in nodes if h["flag"] < flags}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_prompts_make_no_hand_over_that_other_steps_do_not(seed: int, gpus: int):
    found = planned(random_pins(seed, gpus), gpus)
    plan = found.plan
    programs = lower_programs(plan)  # a value that no GPU has in prompts would be missed here
    stream = plan.weight_stream
    assert stream is not None
    for program in programs:
        assert made_flags(program, exact=False) <= made_flags(program, exact=True)
        for graph in program.graphs:
            assert not graph.portions or (not graph.rows.exact and graph.rows.count >= stream.tokens)
    copied = {g.rows.count: 0 for p in programs for g in p.graphs if g.portions}
    for program in programs:
        for graph in program.graphs:
            if graph.rows.count in copied and not graph.rows.exact:
                copied[graph.rows.count] += sum(a.bytes for portion in graph.portions for a in portion.arrivals)
    assert set(copied.values()) == {stream.bytes}
    kernels = select_kernels(plan, found.target, Isa.AVX2)
    source = render_program(plan, kernels, Isa.AVX2, "0" * 64)
    assert "const bool moved = s.hand_over->streams_weights != 0;" in source


def test_short_prompts_stream_nothing_and_long_ones_everything():
    pins = ("*=gpu:0", "attn.o=cpu")
    by_speed = {gb: planned(pins, gb_per_s=gb).plan.weight_stream for gb in (0.01, 20.0, 1e6)}
    slow, usual = by_speed[0.01], by_speed[20.0]
    assert slow is not None and slow.tokens == 2
    assert usual is not None and usual.tokens in (2, 65, 513)
    found = planned(pins).plan
    assert any("also runs" in note for note in found.notes)
    moved = [
        (op.kind, p.in_prompts)
        for call in found.calls
        for op_id, p in call.placements
        for op in found.template(call.template).ops
        if op.id == op_id and p.in_prompts and not isinstance(op.attrs, Transfer)
    ]
    assert ("linear", "gpu:0") in moved and {g for _, g in moved} == {"gpu:0"}


def test_what_the_cpu_must_see_stays():
    """Attention whose cache the CPU has, and what leads to it; what follows is streamed, for one more hand-over."""
    plan = planned(("*=gpu:0", "attn.core@2=cpu", "attn.kv_append@2=cpu", "attn.q@2=cpu", "attn.o@2=cpu")).plan
    by_op = {(c.layer, op): p for c in plan.calls for op, p in c.placements}
    assert by_op[2, "attn.core"].device == "cpu:0"
    assert not by_op[2, "attn.core"].in_prompts and not by_op[2, "attn.q"].in_prompts
    assert by_op[2, "attn.o"].in_prompts == "gpu:0"
    taken = [h for h in hand_overs(plan) if plan.calls[h.call].layer == 2 and h.giver == "cpu"]
    assert taken and lower_programs(plan)


def test_adapters_of_such_weights_are_the_cpus():
    pins = ("*=gpu:0", "attn.o=cpu")
    plan = planned(pins, room=AdapterRoom(2, 8)).plan
    names = streamed_to(plan, "gpu:0")
    assert len(names) == plan.model.layers and all("o_proj" in (plan.value_map()[n].fqn or "") for n in names)
    layout = PairLayout.of(plan, "gpu:0")
    assert layout is not None and not names & {value.id for value, _ in layout.weights}
    assert names <= {value.id for value in ProgramLayout.of(plan).weights}
    (program,) = lower_programs(plan)
    assert all(not g.portions for g in program.graphs if g.adapted)
    assert any(g.portions for g in program.graphs if not g.adapted)
    assert len(Exchange.of(plan).hand_overs) == len(program.exchange.hand_overs)


def test_the_ring_has_room_for_two_of_the_largest_and_none_is_made_where_it_is_too_large_a_part(
    monkeypatch: pytest.MonkeyPatch,
):
    pins = ("*=gpu:0", "attn.o=cpu")
    whole = planned(pins).plan
    assert whole.weight_stream is not None
    linear = next(op for t in whole.templates for op in t.ops if op.role == "attn.o" and isinstance(op.attrs, Linear))
    assert isinstance(linear.attrs, Linear)
    assert whole.weight_stream.ring_bytes >= 2 * linear.attrs.in_features * linear.attrs.out_features
    monkeypatch.setattr(stream_weights, "_RING_PART", 1 << 20)
    assert planned(pins).plan.weight_stream is None
