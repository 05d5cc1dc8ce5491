"""A stored plan compiles exactly as it stands; a broken edit is refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import ValueKind
from hetcomp.ir.serialise import to_json
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.replay import replay
from tests.reference.plan_builder import context, tiny_plan


@pytest.fixture
def stored(tmp_path):
    """Writes the finished plan's JSON after an edit and gives its path."""

    def write(edit=lambda document: None):
        document = json.loads(to_json(run_pipeline(tiny_plan(), context())))
        edit(document)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(document))
        return path

    return write


def test_an_untouched_plan_comes_back_as_it_was(stored):
    assert replay(stored(), tiny_plan(), context()) == run_pipeline(tiny_plan(), context())


def test_a_plan_made_without_weights_is_bound(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(to_json(run_pipeline(tiny_plan(), replace(context(), checkpoint=None))))
    plan = replay(path, tiny_plan(), context())
    assert all(v.source is not None for v in plan.values if v.kind is ValueKind.WEIGHT)
    assert not any("no checkpoint" in note for note in plan.notes)


def test_a_decision_that_was_edited_is_kept(stored):
    def no_barrier_less(document):
        for op in document["templates"][1]["ops"]:
            op["schedule"]["barrier_before"] = True  # more barriers than needed are slower, not wrong

    plan = replay(stored(no_barrier_less), tiny_plan(), context())
    assert all(op.schedule.barrier_before for op in plan.templates[1].ops if op.schedule)


def experts_of(document, call):
    return next(p[1]["experts"] for p in document["calls"][call]["placements"] if p[0] == "experts")


def break_experts(document):
    experts_of(document, 1)[0]["first"] = 1


def to_gpu(document):
    document["calls"][2]["placements"][3][1]["device"] = "gpu:0"


def to_nowhere(document):
    document["calls"][2]["placements"][3][1]["device"] = "cpu:7"


def other_model(document):
    document["model"]["config_sha256"] = "0" * 64


def other_format(document):
    next(v for v in document["values"] if v["id"] == "l0.q.w")["format"] = "q5"


def other_shape(document):
    next(v for v in document["values"] if v["id"] == "l0.q.w")["type"]["shape"] = [1, 2]


def less_workspace(document):
    document["templates"][1]["arena"] = [s for s in document["templates"][1]["arena"] if "workspace" not in s["value"]]


def overlap(document):
    for slot in document["templates"][1]["arena"]:
        slot["offset"] = document["templates"][1]["arena"][0]["offset"]


def other_op(document):
    document["templates"][1]["ops"][1]["attrs"]["in_features"] = 32


def unfinished(document):
    document["established"] = ["weights_bound"]


def wrong_type(document):
    document["calls"][0]["args"] = 3


def no_barriers(document):
    for op in document["templates"][1]["ops"][1:]:
        op["schedule"]["barrier_before"] = False


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (break_experts, "expert 0 has no single home"),
        (to_gpu, r"calls.2.placements.\w+ is on gpu:0, which does not exist in profile"),
        (to_nowhere, "is on cpu:7, which does not exist"),
        (other_model, "is a plan of tiny"),
        (other_format, "values.l0.q.w has format q5"),
        (other_shape, "values.l0.q.w is weight"),
        (less_workspace, "bytes of workspace, its kernel needs 4096"),
        (overlap, "share memory while both are alive|outside of its part"),
        (other_op, r"op q of template layer_0 \(calls.1\) is not the model's"),
        (unfinished, "is no finished plan"),
        (wrong_type, "damaged at calls.0.args"),
        (no_barriers, "without a barrier"),
    ],
)
def test_a_broken_edit_is_refused_with_its_place(stored, edit, words):
    path = stored(edit)
    with pytest.raises(HetcompError, match=words) as caught:
        replay(path, tiny_plan(), context())
    assert "plan.json" in str(caught.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    for name, text in (("absent.json", None), ("text.json", "no json"), ("old.json", '{"schema": [9, 0]}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(HetcompError, match=name):
            replay(tmp_path / name, tiny_plan(), context())


def test_a_plan_for_two_nodes_is_kept_but_whole_ops_stay_on_the_main_one(tmp_path):
    two = context(nodes=2, bandwidths=(30.0, 15.0))
    path = tmp_path / "plan.json"
    path.write_text(to_json(run_pipeline(tiny_plan(), two)))
    assert replay(path, tiny_plan(), two) == run_pipeline(tiny_plan(), two)
    document = json.loads(path.read_text())
    next(p[1] for p in document["calls"][1]["placements"] if p[0] == "norm")["device"] = "cpu:1"
    path.write_text(json.dumps(document))
    with pytest.raises(HetcompError, match=r"calls.1.placements.norm is on cpu:1, other ops on cpu:0"):
        replay(path, tiny_plan(), two)
