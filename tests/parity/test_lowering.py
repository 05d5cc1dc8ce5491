"""The Plan of every family, interpreted, against transformers eager: prefill, decode, two slots at once."""

from __future__ import annotations

import pytest
import torch

from hetcomp import frontend
from hetcomp.frontend import from_transformers, hooks, lower, trace
from tests.reference import tiny_models
from tests.reference.plan_interpreter import PlanInterpreter
from tests.sampled_cases import rest

CONTEXT = 64
DECODE_STEPS = 16
BOUND = 1e-4


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def kinds(run: PlanInterpreter) -> set[str]:
    return {op.kind for template in run.plan.templates for op in template.ops}


def interpreter(model) -> PlanInterpreter:
    imported = frontend.load(model, context_length=CONTEXT, max_batch=2, max_tokens=CONTEXT, max_logit_rows=CONTEXT)
    return PlanInterpreter(imported.plan, imported.checkpoint)


@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("name", tiny_models.FAMILIES + tiny_models.EXTRA_FAMILIES)
def test_plan_agrees_with_transformers(name, odd):
    model = tiny_models.build(name, odd)
    ids = tiny_models.token_ids(model, 33 + DECODE_STEPS)
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
        prefills = {n: model(input_ids=ids[:, :n]).logits[0] for n in (1, 5, 33)}
    run = interpreter(model)
    for length, expected in prefills.items():
        got = run.step(ids[0, :length].tolist(), range(length))
        assert relative_error(got, expected) < BOUND, f"prefill of {length}"
    assert "aten" not in kinds(run), "every op of a promised family has a kind"
    for position in range(33, 33 + DECODE_STEPS):
        got = run.step([int(ids[0, position])], [position])
        assert relative_error(got[0], want[position]) < BOUND, f"decode at {position}"
        assert int(got[0].argmax()) == int(want[position].argmax())


def test_slots_do_not_see_each_other_and_rows_can_be_chosen():
    model = tiny_models.build("qwen3_moe")
    a, b = (tiny_models.token_ids(model, 6, seed)[0] for seed in (1, 2))
    with torch.no_grad():
        want = [model(input_ids=x[None]).logits[0] for x in (a, b)]
    run = interpreter(model)
    run.step(a[:5].tolist(), range(5), slots=[1] * 5)
    run.step(b[:3].tolist(), range(3), slots=[0] * 3)
    mixed = [int(b[3]), int(a[5]), int(b[4])]
    got = run.step(mixed, [3, 5, 4], slots=[0, 1, 0], logit_rows=[2, 1])
    assert got.shape == (2, model.config.vocab_size)
    assert relative_error(got[0], want[1][4]) < BOUND
    assert relative_error(got[1], want[0][5]) < BOUND


def test_recurrent_states_of_slots_that_prompts_in_pieces_leave_behind():
    """What was in the states before position 0 is not seen; a step's rows of a slot go on from the slot's last."""
    model = tiny_models.build("qwen3_next", odd=True)
    a, b = (tiny_models.token_ids(model, 9, seed)[0].tolist() for seed in (1, 2))
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([x])).logits[0] for x in (a, b)]
    run = interpreter(model)
    for state in run.states.values():
        state.fill_(7.0)
    got_a = [run.step(a[:2], range(2), slots=[1] * 2), run.step(a[2:6], range(2, 6), slots=[1] * 4)]
    got_b = [run.step(b[:1], [0], slots=[0])]
    for i in range(6, 9):
        rows = run.step([*b[2 * i - 11 : 2 * i - 9], a[i]], [2 * i - 11, 2 * i - 10, i], slots=[0, 0, 1])
        got_b.append(rows[:2])
        got_a.append(rows[2:])
    assert relative_error(torch.cat(got_a), want[0]) < BOUND
    assert relative_error(torch.cat(got_b), want[1][:7]) < BOUND


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", *rest(("glm4_moe", "qwen3_moe"))])
def test_what_is_not_recognised_becomes_aten_regions_and_stays_right(name, monkeypatch):
    for recognise in ("_replace_norms", "_replace_rope_functions"):
        monkeypatch.setattr(hooks, recognise, lambda *args: None)
    monkeypatch.setattr(lower, "find_routers", lambda *args: {})
    monkeypatch.setattr(from_transformers, "trace", trace)  # what was traced before is recognised
    model = tiny_models.build(name, odd=True)
    ids = tiny_models.token_ids(model, 8)
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
    run = interpreter(model)
    assert "aten" in kinds(run) and not {"rms_norm", "rope", "route"} & kinds(run)
    got = [run.step(ids[0, :7].tolist(), range(7)), run.step([int(ids[0, 7])], [7])]
    assert relative_error(torch.cat(got), want) < BOUND


def test_olmoe_clips_its_projections_in_an_aten_region():
    model = tiny_models.build("olmoe", clip_qkv=0.4)
    ids = tiny_models.token_ids(model, 8)
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
    run = interpreter(model)
    assert "aten" in kinds(run)
    assert relative_error(run.step(ids[0].tolist(), range(8)), want) < BOUND
