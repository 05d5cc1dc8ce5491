"""Formats chosen by the planner within what the user allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.errors import DoesNotFit, HetcompError
from hetcomp.ir.plan import Plan, ValueKind
from hetcomp.ir.types import DType, TensorType
from hetcomp.passes.context import Context, FormatRequest
from hetcomp.passes.format_search import search_formats
from hetcomp.passes.mix_time import mix_us
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import HandTarget, context, tiny_plan


class PackedTarget(HandTarget):
    """Packs every format at its bits a weight."""

    def packed_bytes(self, value):
        bits = {"bf16": 16, "q8": 8.5, "q4": 4.5}.get(value.format, 32)
        return int(value.type.numel({}) * bits / 8)


def asking(formats: object, **machine: object) -> Context:
    made = context(**machine)  # type: ignore[arg-type]
    request = FormatRequest.parse(formats)  # type: ignore[arg-type]
    return replace(made, formats=request, target=PackedTarget())


def search(ctx: Context) -> Plan:
    _, plan = search_formats(ctx, lambda c: run_pipeline(tiny_plan(), c))
    assert plan is not None
    return plan


def formats(plan: Plan) -> tuple[str | None, str | None, str]:
    """Of experts, of attention, of the KV cache."""
    values = plan.value_map()
    return values["l0.down.w"].format, values["l0.q.w"].format, values["l0.k.cache"].type.dtype.value


def needed(form: object) -> int:
    ctx = asking(form, memory=1)
    with pytest.raises(DoesNotFit) as caught:
        run_pipeline(tiny_plan(), ctx)
    return caught.value.needed


def test_one_format_a_role_needs_no_search():
    ctx = asking(dict.fromkeys(("experts", "attention", "dense", "embedding", "kv"), "bf16"))
    assert search_formats(ctx, lambda c: pytest.fail("nothing is to be tried")) == (ctx, None)


def test_auto_keeps_the_checkpoints_formats_where_they_fit():
    plan = search(asking("auto"))
    assert formats(plan) == ("bf16", "bf16", "bf16")
    assert not any("do not fit" in note for note in plan.notes)


def test_auto_gives_up_experts_first_and_attention_last():
    arena = 60_000  # activations, which only the finished plan counts
    rest = {"attention": "bf16", "dense": "bf16", "embedding": "bf16", "kv": "bf16"}
    room = needed({"experts": "q8", **rest}) + arena
    assert room < needed("bf16")
    plan = search(asking("auto", memory=room))
    assert formats(plan) == ("q8", "bf16", "bf16")
    assert any("finer ones do not fit" in note and "GB" in note for note in plan.notes)
    every = {"experts": "q4", "attention": "q4", "dense": "q4", "embedding": "q4", "kv": "q8"}
    smallest = needed(every) + run_pipeline(tiny_plan(), asking(every)).arena_bytes
    assert formats(search(asking("auto", memory=smallest))) == ("q4", "q4", "q8")


def test_beside_a_gpu_auto_takes_fp8_for_the_cache():
    """GPUs have no kernels for q8 caches."""
    found = {}
    for use_gpus in (False, True):
        tried: list[str] = []

        def refuse(ctx, tried=tried):
            tried.append(ctx.formats.of("kv"))
            raise DoesNotFit("no", 2, 1)

        with pytest.raises(DoesNotFit):
            search_formats(replace(asking("auto"), use_gpus=use_gpus), refuse)
        found[use_gpus] = set(tried)
    assert found == {False: {"auto", "q8"}, True: {"auto", "fp8"}}


def test_auto_refuses_what_no_format_makes_fit():
    with pytest.raises(DoesNotFit, match="does not fit into memory"):
        search(asking("auto", memory=10_000))


def test_of_allowed_formats_the_fastest_mix_is_taken():
    allowed = {"experts": "q4|q8", "attention": "bf16", "dense": "bf16", "embedding": "bf16", "kv": "bf16|q8"}
    plan = search(asking(allowed))
    times = {
        (experts, kv): mix_us(run_pipeline(tiny_plan(), asking({**allowed, "experts": experts, "kv": kv})))
        for experts in ("q4", "q8")
        for kv in ("bf16", "q8")
    }
    assert mix_us(plan) <= min(times.values()) * 1.005
    assert any("by the simulated time" in note for note in plan.notes)


def test_of_equally_fast_ones_the_finer_is_taken():
    ctx = asking({"experts": "bf16", "attention": "bf16", "embedding": "q4|bf16", "dense": "bf16", "kv": "bf16"})
    machine = ctx.profile.model_copy(update={"barrier_us": 1e6})  # nothing else counts
    plan = search(replace(ctx, profile=machine))
    assert plan.value_map()["embed.w"].format == "bf16"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"kv": "q4"}, "Unknown KV cache format 'q4'"),
        ({"experts": "q4|auto"}, "mix auto with others"),
        ({"experts": "q4|q5"}, "Unknown weight format 'q5'"),
    ],
)
def test_lists_that_make_no_sense_are_refused(wanted, words):
    with pytest.raises(HetcompError, match=words):
        FormatRequest.parse(wanted)


def test_too_many_combinations_are_refused():
    every = {role: "f32|bf16|q8|q4" for role in ("experts", "attention")}
    with pytest.raises(HetcompError, match="allow 16 combinations"):
        search(asking(every))


def test_bytes_of_a_q8_cache():
    # 34 bytes hold 32 elements and their scale; 40 elements are padded to 64.
    assert TensorType(DType.Q8, ("slots", 2, "context", 64)).bytes({"slots": 1, "context": 3}) == 2 * 3 * 68
    assert TensorType(DType.Q8, (5, 40)).bytes({}) == 5 * 68
    state = next(v for v in search(asking({"kv": "q8"})).values if v.kind is ValueKind.STATE)
    assert state.type.dtype is DType.Q8
