"""Predictions from figures that were not measured say so, in the profile and in the plan's notes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetcomp.hardware.figures import Source
from hetcomp.hardware.presets import machine_names
from hetcomp.hardware.profile import HardwareProfile, load_profile
from hetcomp.passes.pipeline import run_pipeline
from tests.reference.plan_builder import context, profile, tiny_plan


def sourced(source: Source, origin: str = "") -> HardwareProfile:
    measured = profile()
    return measured.model_copy(
        update={
            "rates": tuple(rate.model_copy(update={"source": source}) for rate in measured.rates),
            "nodes": tuple(node.model_copy(update={"source": source}) for node in measured.nodes),
            "origin": origin,
        }
    )


def test_a_measured_profile_has_no_caveat():
    assert sourced(Source.MEASURED).caveat == ""


def test_a_busy_machine_is_a_caveat():
    assert "busy (load 9.4)" in sourced(Source.MEASURED, "busy (load 9.4)").caveat


def test_estimates_say_why():
    caveat = sourced(Source.ESTIMATE, "not measured: no C++ compiler").caveat
    assert "estimate figures" in caveat
    assert "no C++ compiler" in caveat


def test_mixed_sources_are_all_named():
    mixed = profile().model_copy(update={"nodes": sourced(Source.DATA_SHEET).nodes})
    assert "data sheet figures, not from measured" in mixed.caveat
    both = mixed.model_copy(update={"rates": sourced(Source.ESTIMATE).rates})
    assert "data sheet and estimate figures" in both.caveat


@pytest.mark.parametrize("name", machine_names())
def test_every_preset_has_one(name: str):
    assert "data sheet" in load_profile(f"preset:{name}").caveat


def test_the_plan_carries_it_once():
    ctx = replace(context(), profile=sourced(Source.DATA_SHEET))
    plan = run_pipeline(tiny_plan(), ctx)
    assert plan.notes.count(ctx.profile.caveat) == 1
    assert run_pipeline(tiny_plan(), context()).notes.count(ctx.profile.caveat) == 0
