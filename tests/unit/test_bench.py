"""How bench measures: cases, samples, role times that add up, bandwidth beside the rounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hetcomp.bench import (
    CALL_MS,
    OUTSIDE,
    BenchRecord,
    RoleTime,
    bench,
    case_steps,
    record_path,
    role_terms,
    undisturbed,
)
from hetcomp.cli.bench_command import verdict
from hetcomp.errors import HetcompError
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.serialise import plan_hash
from hetcomp.passes.phases import Phase
from hetcomp.passes.pipeline import run_pipeline
from hetcomp.prediction import predict
from hetcomp.read_bandwidth import profiled_gb_per_s
from tests.reference.plan_builder import VOCAB, context, profile, tiny_plan

STORED = Path("m.bench.json")
ROLES = ("moe.experts", "lm_head")


def machine() -> HardwareProfile:
    """Kernels streamed 30 GB/s; of the readings of plain reads the best counts."""
    return profile().model_copy(update={"samples": {"nodes.0.read_bandwidth.0.gb_per_s": (22.0, 30.0, 25.0)}})


class FakeSession:
    """Keeps what it was given; a step takes no time worth measuring."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def prefill(self, ids: np.ndarray) -> None:
        self.runtime.prompts.append(tuple(int(i) for i in ids))
        self.runtime.spent("prefill")


class FakeRuntime:
    """The part of Runtime that bench uses, with timers that count up."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.decoded: list[int] = []
        self.reset_stats()

    def reset_stats(self) -> None:
        self.timers = {phase: dict.fromkeys(ROLES, 0.0) for phase in ("prefill", "decode")}

    def spent(self, phase: str) -> None:
        for i, role in enumerate(ROLES):
            self.timers[phase][role] += 1e-4 * (i + 1)

    def session(self) -> FakeSession:
        return FakeSession(self)

    def decode(self, sessions: list[FakeSession], ids: list[int]) -> None:
        self.decoded += ids
        self.spent("decode")

    def stats(self) -> dict[str, object]:
        timers = {phase: {"timers_ms": dict(times)} for phase, times in self.timers.items()}
        return {"isa": "avx512", "threads": 4, **timers}


class FakeExecutable:
    """The part of Executable that bench uses: context 64, at most 16 tokens a step."""

    def __init__(self) -> None:
        self.plan = run_pipeline(tiny_plan(), context())
        self.runtime = FakeRuntime()

    @property
    def stats(self) -> dict[str, object]:
        return self.runtime.stats()


def run(exe: FakeExecutable | None = None, **options: object) -> BenchRecord:
    defaults = {"prompts": (8, 40, 65), "contexts": (20, 61), "tokens": 4, "rounds": 3}
    defaults |= {"bandwidth": lambda _: 20.0, "settle": lambda _: None}
    return bench(exe or FakeExecutable(), machine(), **{**defaults, **options})  # type: ignore[arg-type]


def test_what_fits_is_measured_and_what_does_not_is_named():
    record = run()
    assert [case.name for case in record.cases] == ["prefill 8", "prefill 40", "decode at 22"]
    assert record.notes == (
        "prefill 65 does not fit into the context of 64",
        "decode behind 61 with 4 tokens does not fit into the context of 64",
    )
    assert all(len(case.samples_ms) == 3 for case in record.cases)
    with pytest.raises(HetcompError, match="None of the wanted lengths fits into the artifact's context of 64"):
        run(prompts=(65,), contexts=())


def test_the_record_names_plan_profile_machine_and_kinds():
    exe = FakeExecutable()
    record = run(exe)
    assert record.plan_sha256 == plan_hash(exe.plan) and record.profile_sha256 == machine().sha256()
    assert (record.read_gb_per_s, record.profile_gb_per_s) == ((20.0,) * 3, 30.0)
    assert record.machine["usable CPUs"] and record.seed == 0
    found = {role.role: (role.kind, role.term) for role in record.cases[0].roles}
    assert found["moe.experts"] == ("moe_experts", "moe_experts") and found["lm_head"] == ("linear", "linear")
    assert BenchRecord.model_validate_json(record.to_json()) == record


def test_roles_and_what_is_outside_add_up_to_the_time():
    for case in run().cases:
        assert sum(role.measured_ms for role in case.roles) == pytest.approx(case.measured_ms)
        assert case.measured_ms in case.samples_ms
        assert OUTSIDE in {role.role for role in case.roles}
        assert all(len(role.samples_ms) == 3 for role in case.roles)


def test_long_prompts_are_predicted_piece_by_piece():
    plan = FakeExecutable().plan
    steps = case_steps(plan, "prefill", 40, 40)
    assert steps == [Phase("prefill", 16, 1, 16), Phase("prefill", 16, 1, 32), Phase("prefill", 8, 1, 40)]
    case = run().cases[1]
    whole = sum(predict(plan, profile(), step, "avx512").total_us for step in steps)
    assert case.predicted_ms == pytest.approx(whole / 1e3 + CALL_MS["prefill"])


def test_prompts_are_reproducible_and_within_the_vocabulary():
    first, second, other = FakeExecutable(), FakeExecutable(), FakeExecutable()
    run(first, seed=5)
    run(second, seed=5)
    run(other, seed=6)
    assert first.runtime.prompts == second.runtime.prompts != other.runtime.prompts
    assert first.runtime.decoded == second.runtime.decoded
    assert all(0 <= i < VOCAB for prompt in first.runtime.prompts for i in prompt)


def test_prompts_from_a_text():
    exe = FakeExecutable()
    record = run(exe, text=list(range(64)))
    assert record.prompt == "text"
    assert {p for p in exe.runtime.prompts if len(p) == 8} == {tuple(range(8))}
    assert exe.runtime.decoded[:4] == [20, 21, 22, 23]
    with pytest.raises(HetcompError, match="The text has 39 tokens, but the longest case needs 40"):
        run(text=list(range(39)))


def test_without_a_compiler_the_bandwidth_is_left_out_with_a_note():
    def fails(_: object) -> float:
        raise HetcompError("No usable C++ compiler.")

    record = run(bandwidth=fails)
    assert record.gb_per_s is None and record.bandwidth_change == 0.0
    assert [n for n in record.notes if "No usable C++ compiler" in n] == [record.notes[-1]]


def test_interrupted_steps_do_not_count():
    took, roles = undisturbed([1.0, 9.0, 2.0, 2.2], {"a": 7.1})
    assert (took, roles) == (pytest.approx(2.1), {"a": pytest.approx(1.05)})
    assert undisturbed([1.0], {"a": 0.9}) == (1.0, {"a": 0.9})


def test_a_profile_without_readings_is_not_held_against_the_run():
    assert profiled_gb_per_s(profile()) is None and profiled_gb_per_s(machine()) == 30.0
    record = run().model_copy(update={"profile_gb_per_s": None})
    assert (record.gb_per_s, record.bandwidth_ratio, record.bandwidth_change) == (20.0, 1.0, 0.0)
    assert any("no readings to hold it against" in line for line in verdict(record, STORED))


def test_disturbed_rounds_are_named():
    record = run()
    case = record.cases[0].model_copy(update={"samples_ms": (1.0, 1.1, 4.0)})
    assert case.disturbed
    lines = verdict(record.model_copy(update={"cases": (case,), "notes": ()}), STORED)
    assert "took from 1.000 to 4.000 ms" in lines[0]
    role = RoleTime(role="r", term="linear", predicted_ms=1, measured_ms=4, samples_ms=(1.0, 1.1, 4.0))
    assert role.disturbed and role.typical_ms == 1.1


@pytest.mark.parametrize(
    ("readings", "predicted", "words"),
    [
        ((20.0, 20.0), 10.0, "(-33%): enough to be the cause of prefill 8"),  # 15 ms measured = 10 * 30 / 20
        ((20.0, 20.0), 3.0, "(-33%): at most a part of prefill 8"),
        ((20.0, 20.0), 20.0, "20.0 GB/s during the run, 30.0 in the profile (-33%)"),  # off, but the other way
        ((29.5, 29.5), 3.0, "29.5 GB/s during the run, 30.0 in the profile"),
    ],
)
def test_bandwidth_is_blamed_only_for_what_it_explains(readings, predicted, words):
    record = run()
    case = record.cases[0].model_copy(update={"samples_ms": (15.0,), "measured_ms": 15.0, "predicted_ms": predicted})
    changed = record.model_copy(update={"cases": (case,), "read_gb_per_s": readings})
    line = next(line for line in verdict(changed, STORED) if line.startswith("memory read"))
    assert line.endswith(words)


def test_old_records_without_bandwidth_can_be_read():
    document = json.loads(run().to_json())
    for name in ("read_gb_per_s", "profile_gb_per_s", "prompt", "seed", "machine"):
        del document[name]
    document["schema"] = [1, 0]
    assert BenchRecord.model_validate(document).gb_per_s is None


def test_the_record_lies_beside_the_artifact(tmp_path, monkeypatch):
    assert record_path(tmp_path / "demo.hetc") == tmp_path / "demo.bench.json"
    (tmp_path / "demo.hetc").mkdir()
    monkeypatch.chdir(tmp_path / "demo.hetc")
    assert record_path(Path()) == tmp_path / "demo.bench.json"


def test_every_role_of_a_plan_has_a_kind_and_a_term():
    plan = FakeExecutable().plan
    terms = role_terms(plan, Phase("prefill", 16, 1, 16))
    assert terms["attn.core"] == ("attention", "attention_prefill")
    assert role_terms(plan, Phase("decode", 1, 1, 16))["attn.core"] == ("attention", "attention_decode")
    assert set(terms) == {op.role or op.kind for t in plan.templates for op in t.ops}
