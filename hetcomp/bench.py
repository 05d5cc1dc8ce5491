"""Holds the predictions of an artifact's plan against runs: what ``hetcomp bench`` measures and stores."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import plan_hash
from hetcomp.passes.device_time import term_of
from hetcomp.passes.phases import Phase
from hetcomp.prediction import predict
from hetcomp.runtime import Runtime

SCHEMA = (1, 0)
# Off by more than this, a prediction is wrong enough to say which term was.
TOLERANCE = 0.15
DEFAULT_PROMPTS = (64, 512, 2048)
DEFAULT_CONTEXTS = (128, 2048)

Progress = Callable[[str], None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleTime(_Record):
    """Milliseconds of one op class in one case; ``term`` is its kernel family in the cost model."""

    role: str
    term: str
    predicted_ms: float
    measured_ms: float


class CaseResult(_Record):
    """One case: a prompt of ``tokens`` (prefill) or one token at ``position`` (decode). ``samples_ms`` are the rounds'
    times, ``measured_ms`` their median. Role times are thread 0's, of the median round."""

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
    def worst(self) -> RoleTime:
        """The op class that contributes most to the deviation."""
        return max(self.roles, key=lambda r: abs(r.predicted_ms - r.measured_ms))


class BenchRecord(_Record):
    """What a run of ``hetcomp bench`` stores."""

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

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def to_json(self) -> str:
        """As :func:`read_record` reads it."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def record_path(artifact: Path) -> Path:
    """Where the latest record of an artifact lies: beside it, so that the artifact stays as it was compiled."""
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


def bench(
    exe: Executable,
    profile: HardwareProfile,
    *,
    prompts: Sequence[int] = DEFAULT_PROMPTS,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
    tokens: int = 64,
    rounds: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchRecord:
    """Times prefill of prompts of each length, and ``tokens`` decode steps behind each context, in interleaved rounds,
    and predicts the same steps on ``profile``. Prompts are random tokens (every expert about equally likely).

    Cases that do not fit into the artifact's context are left out with a note. Raises HetcompError if none fits.
    """
    plan, runtime = exe.plan, exe.runtime
    room = plan.dim("context").max
    cases = [("prefill", n) for n in prompts] + [("decode", n) for n in contexts]
    fits = [(p, n) for p, n in cases if 0 < n and n + (tokens if p == "decode" else 0) <= room]
    notes = tuple(f"{p} of {n} does not fit into the context of {room}" for p, n in cases if (p, n) not in fits)
    if not fits:
        raise HetcompError(
            f"None of the wanted lengths fits into the artifact's context of {room}; ask for shorter ones."
        )
    generator = np.random.default_rng(seed)
    load = os.getloadavg()[0]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in fits}
    roles: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in fits}
    for number in range(rounds + 1):  # the first warms up: pages, clocks, caches
        for phase, length in fits:
            if progress:
                progress(f"round {number} of {rounds}: {phase} {length}")
            took, by_role = _run(runtime, plan, phase, length, tokens, generator)
            if number:
                times[phase, length].append(took)
                roles[phase, length].append(by_role)
    results = tuple(_result(plan, profile, exe, c, tokens, times[c], roles[c]) for c in fits)
    return BenchRecord(
        model=plan.model.name,
        plan_sha256=plan_hash(plan),
        profile_name=profile.name,
        profile_sha256=profile.sha256(),
        cpu=profile.cpu,
        isa=str(exe.stats["isa"]),
        threads=int(exe.stats["threads"]),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        load_before=load,
        cases=results,
        notes=notes,
    )


def _run(
    runtime: Runtime, plan: Plan, phase: str, length: int, tokens: int, generator: np.random.Generator
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the prompt, or of one decode step (the median), and of each role in it."""
    ids = generator.integers(0, plan.model.vocab, length + tokens).astype(np.int32)
    with runtime.session() as session:
        runtime.reset_stats()
        start = time.perf_counter()
        session.prefill(ids[:length])
        took = (time.perf_counter() - start) * 1e3
        if phase == "prefill":
            return took, dict(runtime.stats()["prefill"]["timers_ms"])
        runtime.reset_stats()
        steps = []
        for i in range(tokens):
            start = time.perf_counter()
            runtime.decode([session], ids[length + i : length + i + 1])
            steps.append((time.perf_counter() - start) * 1e3)
        timers = runtime.stats()["decode"]["timers_ms"]
        return statistics.median(steps), {role: ms / tokens for role, ms in timers.items()}


def _steps(plan: Plan, phase: str, length: int, tokens: int) -> list[Phase]:
    if phase == "decode":
        return [Phase("decode", 1, 1, length + tokens // 2)]
    largest = plan.dim("T").max
    starts = range(0, length, largest)
    return [Phase("prefill", min(largest, length - s), 1, min(length, s + largest)) for s in starts]


def _result(
    plan: Plan,
    profile: HardwareProfile,
    exe: Executable,
    case: tuple[str, int],
    tokens: int,
    times: list[float],
    roles: list[dict[str, float]],
) -> CaseResult:
    phase, length = case
    steps = _steps(plan, phase, length, tokens)
    predicted: dict[str, float] = {}
    total = 0.0
    for step in steps:
        timeline = predict(plan, profile, step, str(exe.stats["isa"]))
        total += timeline.total_us / 1e3
        for role, us in timeline.roles:
            predicted[role] = predicted.get(role, 0.0) + us / 1e3
    middle = roles[int(np.argsort(times, kind="stable")[len(times) // 2])]
    measured = statistics.median(times)
    terms = role_terms(plan, steps[0])
    entries = [
        RoleTime(role=r, term=terms.get(r, "elementwise"), predicted_ms=predicted.get(r, 0.0), measured_ms=ms)
        for r, ms in sorted(middle.items(), key=lambda item: -item[1])
    ]
    outside = max(0.0, measured - sum(middle.values()))
    entries.append(RoleTime(role="outside of the program", term="other", predicted_ms=0.0, measured_ms=outside))
    return CaseResult(
        phase="decode" if phase == "decode" else "prefill",
        tokens=1 if phase == "decode" else length,
        position=steps[-1].position,
        predicted_ms=total,
        measured_ms=measured,
        samples_ms=tuple(times),
        roles=tuple(entries),
    )


def role_terms(plan: Plan, step: Phase) -> dict[str, str]:
    """The cost model's term of every role: its kernel family, by the largest op of the role."""
    found: dict[str, str] = {}
    for template in plan.templates:
        for op in template.ops:
            found.setdefault(op.role or op.kind, term_of(op, step))
    return found
