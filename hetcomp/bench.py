"""Holds the predictions of an artifact's plan against runs: what ``hetcomp bench`` measures and stores."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.deferral import whole_role
from hetcomp.ir.kv_pool import KvPool
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import plan_hash
from hetcomp.passes.device_time import term_of
from hetcomp.passes.phases import Phase
from hetcomp.prediction import predict
from hetcomp.progress import ProgressSink
from hetcomp.read_bandwidth import current_gb_per_s, profiled_gb_per_s
from hetcomp.runtime import Runtime

SCHEMA = (1, 1)
# Off by more than this, a prediction is wrong enough to say which term was.
TOLERANCE = 0.15
DEFAULT_PROMPTS = (64, 512, 2048)
DEFAULT_CONTEXTS = (128, 2048)
# Rounds whose slowest takes this many times the fastest were disturbed by something else than the model.
DISTURBED = 1.3
# Roles are short; what interrupts one hits another in the next round.
DISTURBED_ROLE = 2.0
# From this difference on the memory's bandwidth during the run was not the profile's.
BANDWIDTH_TOLERANCE = 0.10
OUTSIDE = "outside of the program"
# What it takes: a call from Python with its arguments and the copy of the logits, and before a prompt the waking of
# lanes that have gone to sleep. Measured on two virtual cores of Zen 4 (demo-moe in q4, medians).
CALL_MS = {"decode": 0.022, "prefill": 0.120}
SETTLE_SECONDS = 0.2
_SETTLE_STEPS = 32  # positions of a context that every artifact has

Bandwidth = Callable[[HardwareProfile], float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleTime(_Record):
    """Milliseconds of one op class in one case; ``kind`` is its op kind in the plan, ``term`` its kernel family in
    the cost model. ``samples_ms`` are the rounds' times, ``measured_ms`` that of the case's median round, so that the
    roles of a case add up to its time."""

    role: str
    term: str
    predicted_ms: float
    measured_ms: float
    kind: str = ""
    samples_ms: tuple[float, ...] = ()

    @property
    def typical_ms(self) -> float:
        """Median of the rounds: what an interruption of the case's median round does not move."""
        return statistics.median(self.samples_ms) if self.samples_ms else self.measured_ms

    @property
    def disturbed(self) -> bool:
        """Whether the rounds differ so much that the time says little about the kernel."""
        return len(self.samples_ms) > 1 and max(self.samples_ms) > DISTURBED_ROLE * min(self.samples_ms)


class CaseResult(_Record):
    """One case: a prompt of ``tokens`` (prefill) or one token at ``position`` (decode). ``samples_ms`` are the rounds'
    times, ``measured_ms`` their median. Role times are thread 0's, of the median round; what is not in the program
    (the call, copies of logits) is the role ``outside of the program``. A decode round's time is the mean
    over the middle half of its steps by time."""

    phase: Literal["prefill", "decode"]
    tokens: int
    position: int
    predicted_ms: float
    measured_ms: float
    samples_ms: tuple[float, ...]
    roles: tuple[RoleTime, ...]

    @property
    def name(self) -> str:
        """``prefill 512`` or ``decode at 128``."""
        return f"prefill {self.tokens}" if self.phase == "prefill" else f"decode at {self.position}"

    @property
    def deviation(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_ms / self.measured_ms - 1.0

    @property
    def disturbed(self) -> bool:
        """Whether the rounds differ so much that the deviation says little about the prediction."""
        return max(self.samples_ms) > DISTURBED * min(self.samples_ms)

    @property
    def worst(self) -> RoleTime:
        """The op class that contributes most to the deviation."""
        return max(self.roles, key=lambda r: abs(r.predicted_ms - r.typical_ms))


class BenchRecord(_Record):
    """What a run of ``hetcomp bench`` stores. ``read_gb_per_s``: what plain reads of DRAM gave before each
    round, ``profile_gb_per_s`` what they gave when the profile was measured, None if it does not say (10^9 bytes a
    second). ``prompt``: what the tokens were."""

    schema_version: tuple[int, int] = Field(default=SCHEMA, alias="schema")
    model: str
    plan_sha256: str
    profile_name: str
    profile_sha256: str
    cpu: str
    isa: str
    threads: int
    measured_at: str
    load_before: float
    cases: tuple[CaseResult, ...]
    notes: tuple[str, ...] = ()
    read_gb_per_s: tuple[float, ...] = ()
    profile_gb_per_s: float | None = None
    prompt: str = "random tokens"
    seed: int = 0
    machine: dict[str, str] = Field(default_factory=dict)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def gb_per_s(self) -> float | None:
        """Median read bandwidth during the run, 10^9 bytes a second; None if it was not measured."""
        return statistics.median(self.read_gb_per_s) if self.read_gb_per_s else None

    @property
    def bandwidth_ratio(self) -> float:
        """Bandwidth during the run over the profile's; 1 if either is not known."""
        return self.gb_per_s / self.profile_gb_per_s if self.gb_per_s and self.profile_gb_per_s else 1.0

    @property
    def bandwidth_change(self) -> float:
        """Bandwidth during the run against the profile's, as a part of the latter; 0 if within the tolerance."""
        change = self.bandwidth_ratio - 1.0
        return change if abs(change) > BANDWIDTH_TOLERANCE else 0.0

    def to_json(self) -> str:
        """As :func:`read_record` reads it."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def record_path(artifact: Path) -> Path:
    """Where the latest record of an artifact lies: beside it, so that the artifact stays as it was compiled."""
    artifact = artifact.absolute()
    return artifact.parent / f"{artifact.name.removesuffix('.hetc')}.bench.json"


def read_record(path: Path) -> BenchRecord:
    """Reads a stored record. Raises HetcompError naming the place."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HetcompError(f"There is no bench record {path}; run hetcomp bench on the artifact first.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Bench record {path} cannot be read: {error}.") from None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise HetcompError(f"Bench record {path} is not valid JSON: {error}.") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if not (isinstance(schema, list) and schema[:1] == [SCHEMA[0]]):
        raise HetcompError(f"{path} has schema {schema}, expected a bench record of schema {SCHEMA[0]}.x.")
    try:
        return BenchRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise HetcompError(f"Bench record {path} is not valid at {place}: {first['msg']}.") from None


@dataclass
class _Case:
    """A case while it is measured: milliseconds of each round, whole and by role."""

    phase: Literal["prefill", "decode"]
    length: int
    times: list[float] = field(default_factory=list)
    roles: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.phase} {self.length}" if self.phase == "prefill" else f"decode behind {self.length}"


def settle_lanes(runtime: Runtime) -> None:
    """Decodes until the lanes have noticed that the cores are theirs again: while another process takes them, lanes
    hardly spin, and they judge that by stretches of 40 ms of equal steps (runtime_lib/src/lane_count.h)."""
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        with runtime.session() as session:
            session.prefill(np.zeros(1, np.int32))
            for _ in range(_SETTLE_STEPS):
                if time.perf_counter() >= end:
                    break
                runtime.decode([session], [0])


def bench(
    exe: Executable,
    profile: HardwareProfile,
    *,
    prompts: Sequence[int] = DEFAULT_PROMPTS,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    tokens: int = 64,
    rounds: int = 3,
    seed: int = 0,
    text: Sequence[int] | None = None,
    text_name: str = "text",
    progress: ProgressSink | None = None,
    bandwidth: Bandwidth = current_gb_per_s,
    settle: Callable[[Runtime], None] = settle_lanes,
) -> BenchRecord:
    """Times prefill of prompts of each length, and ``tokens`` decode steps behind each context, in interleaved rounds,
    and predicts the same steps on ``profile``.

    text: token ids of a text to take the prompts from (routing differs from that of random tokens, to which every
    expert is about equally likely), which the record calls ``text_name``; None: random tokens by ``seed``. Cases that
    do not fit into the artifact's context are left out with a note. bandwidth: measures the machine's read bandwidth,
    before each round, and settle lets the lanes recover from it. Raises HetcompError if no case fits or the text is too
    short.
    """
    plan, stats = exe.plan, exe.stats
    cases, notes = _fitting(KvPool.of(plan.max_dims()).longest, prompts, contexts, tokens)
    longest = max(c.length + (tokens if c.phase == "decode" else 0) for c in cases)
    if text is not None and len(text) < longest:
        raise HetcompError(
            f"The text has {len(text)} tokens, but the longest case needs {longest}; give a longer text or ask for "
            "shorter lengths."
        )
    load, generator, readings = os.getloadavg()[0], np.random.default_rng(seed), list[float]()
    if progress:
        progress.stage("measure", total=(rounds + 1) * len(cases))
    for number in range(rounds + 1):  # the first warms up: pages, clocks, caches
        if number and not any(note.startswith(_NO_BANDWIDTH) for note in notes):
            try:
                readings.append(bandwidth(profile))
                settle(exe.runtime)
            except HetcompError as error:
                notes.append(f"{_NO_BANDWIDTH}: {error}")
        for case in cases:
            ids = generator.integers(0, plan.model.vocab, longest) if text is None else np.asarray(text[:longest])
            took, roles = _run(exe.runtime, case, ids.astype(np.int32), tokens)
            if number:
                case.times.append(took)
                case.roles.append(roles)
            if progress:
                progress.advance(1, f"round {number} of {rounds}: {case.name}" if number else f"warm-up: {case.name}")
    return BenchRecord(
        model=plan.model.name,
        plan_sha256=plan_hash(plan),
        profile_name=profile.name,
        profile_sha256=profile.sha256(),
        cpu=profile.cpu,
        isa=str(stats["isa"]),
        threads=int(stats["threads"]),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        load_before=load,
        cases=tuple(_result(plan, profile, str(stats["isa"]), case, tokens) for case in cases),
        notes=tuple(notes),
        read_gb_per_s=tuple(readings),
        profile_gb_per_s=profiled_gb_per_s(profile),
        prompt="random tokens" if text is None else text_name,
        seed=seed,
        machine=_machine(),
    )


_NO_BANDWIDTH = "the read bandwidth during the run is not known"


def _fitting(room: int, prompts: Sequence[int], contexts: Sequence[int], tokens: int) -> tuple[list[_Case], list[str]]:
    """The cases that fit into ``room`` positions, each once, and a note for each other."""
    wanted = [
        *(_Case("prefill", n) for n in dict.fromkeys(prompts)),
        *(_Case("decode", n) for n in dict.fromkeys(contexts)),
    ]
    fits = [c for c in wanted if 0 < c.length and c.length + (tokens if c.phase == "decode" else 0) <= room]
    if not fits:
        raise HetcompError(
            f"None of the wanted lengths fits into the artifact's context of {room}; ask for shorter ones."
        )
    why = {"prefill": "", "decode": f" with {tokens} tokens"}
    return fits, [f"{c.name}{why[c.phase]} does not fit into the context of {room}" for c in wanted if c not in fits]


def _machine() -> dict[str, str]:
    """What else a judge of the figures asks for."""
    return {
        "kernel": platform.release(),
        "system": platform.platform(),
        "usable CPUs": str(len(os.sched_getaffinity(0))),
        "memory GiB": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
    }


def _run(runtime: Runtime, case: _Case, ids: NDArray[np.int32], tokens: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the prompt or of one decode step, and of each role in it."""
    with runtime.session() as session:
        runtime.reset_stats()
        start = time.perf_counter()
        session.prefill(ids[: case.length])
        took = (time.perf_counter() - start) * 1e3
        if case.phase == "prefill":
            return took, dict(runtime.stats()["prefill"]["timers_ms"])
        # Nothing else between the steps: lanes that wait longer than a moment go to sleep, and wake up slowly.
        times = []
        for id in ids[case.length : case.length + tokens]:
            start = time.perf_counter()
            runtime.decode([session], [int(id)])
            times.append((time.perf_counter() - start) * 1e3)
        return undisturbed(times, runtime.stats()["decode"]["timers_ms"])


def undisturbed(times: Sequence[float], roles: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Time of a step and of each role in it, from the steps' times and the roles' times over all of them: the mean
    without the fastest and the slowest quarter, so that a step that was interrupted does not count; roles in
    proportion, so that they still add up to no more than the time."""
    ordered = sorted(times)
    cut = len(ordered) // 4
    middle = statistics.fmean(ordered[cut : len(ordered) - cut])
    return middle, {role: ms * middle / sum(times) for role, ms in roles.items()}


def case_steps(plan: Plan, phase: str, length: int, position: int) -> list[Phase]:
    """The steps of the model that a case consists of: one decode step at ``position``, or the prompt of ``length``
    tokens in pieces of what the plan takes at once, each at its own position."""
    if phase == "decode":
        return [Phase("decode", 1, 1, position)]
    largest = plan.dim("T").max
    starts = range(0, length, largest)
    return [Phase("prefill", min(largest, length - s), 1, min(length, s + largest)) for s in starts]


def _result(plan: Plan, profile: HardwareProfile, isa: str, case: _Case, tokens: int) -> CaseResult:
    # Of n steps behind p positions the first sees p + 1, the last p + n.
    steps = case_steps(plan, case.phase, case.length, case.length + (tokens + 1) // 2)
    predicted = {OUTSIDE: CALL_MS[case.phase]}
    total = CALL_MS[case.phase]
    for step in steps:
        timeline = predict(plan, profile, step, isa)
        total += timeline.total_us / 1e3
        for role, us in timeline.roles:
            predicted[role] = predicted.get(role, 0.0) + us / 1e3
    measured = statistics.median_low(case.times)
    middle = case.times.index(measured)
    for times, roles in zip(case.times, case.roles, strict=True):
        roles[OUTSIDE] = max(0.0, times - sum(roles.values()))
    terms = role_terms(plan, steps[0]) | {OUTSIDE: ("", "other")}
    return CaseResult(
        phase=case.phase,
        tokens=1 if case.phase == "decode" else case.length,
        position=steps[-1].position,
        predicted_ms=total,
        measured_ms=measured,
        samples_ms=tuple(case.times),
        roles=tuple(
            RoleTime(
                role=role,
                kind=terms.get(whole_role(role), ("", ""))[0],
                term=terms.get(whole_role(role), ("", "elementwise"))[1],
                predicted_ms=predicted.get(role, 0.0),
                measured_ms=ms,
                samples_ms=tuple(roles.get(role, 0.0) for roles in case.roles),
            )
            for role, ms in sorted(case.roles[middle].items(), key=lambda item: -item[1])
        ),
    )


def role_terms(plan: Plan, step: Phase) -> dict[str, tuple[str, str]]:
    """Op kind of every role and the cost model's term for it (its kernel family), by the role's first op."""
    found: dict[str, tuple[str, str]] = {}
    for template in plan.templates:
        for op in template.ops:
            found.setdefault(op.role or op.kind, (op.kind, term_of(op, step)))
    return found
