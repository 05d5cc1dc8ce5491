"""The plan's report as JSON. Schema 2: bytes, FLOPs of a whole step, microseconds, tokens/s."""

from __future__ import annotations

from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, Field

from hetcomp.cli.plan_figures import Figures, Roof, device_memory
from hetcomp.cli.plan_placement import layer_runs
from hetcomp.cli.plan_summary import OpGroup, summarise
from hetcomp.cli.plan_weights import weight_classes
from hetcomp.ir.annotations import AdapterRoom, AttachedAdapter
from hetcomp.ir.plan import Plan

SCHEMA = (2, 4)  # major: fields changed or went; minor: fields were added


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ModelFacts(_Part):
    """The model."""

    name: str
    architecture: str
    layers: int
    vocab: int


class GroupPhase(_Part):
    """Costs of an op group in one phase, of the whole step; ``bound``: ``memory``, ``compute``, or empty."""

    phase: str
    tokens: int
    flops: float
    weight_bytes_read: float
    bytes_moved: float
    intensity: float
    bound: str
    us: float


class Group(_Part):
    """All ops of one role."""

    role: str
    devices: list[str]
    ops: int
    weight_bytes: int
    phases: list[GroupPhase]


class Prediction(_Part):
    """A simulated step: mean over sampled routings, ``low_us`` and ``high_us`` the 10th and 90th percentile."""

    phase: str
    tokens: int
    total_us: float
    tokens_per_s: float
    low_us: float
    high_us: float
    busy_us: dict[str, float]
    critical_us: dict[str, float]


class MemoryPart(_Part):
    """Bytes by what they are for."""

    what: str
    bytes: int


class Memory(_Part):
    """All memory of the plan; ``available_bytes`` is what the CPU's nodes have free (null: not known)."""

    items: list[MemoryPart]
    bytes: int
    available_bytes: int | None


class Device(_Part):
    """What lies on a device, reserves included; ``limit_bytes``: what a plan may use there (null: not known)."""

    device: str
    name: str
    parts: list[MemoryPart]
    bytes: int
    limit_bytes: int | None


class RoofJson(_Part):
    """A device's ceilings for the plan's main weight format; ``ridge`` in FLOP a byte."""

    device: str
    weight_format: str
    gflops: float
    gb_per_s: float
    ridge: float


class Mix(_Part):
    """Use that the plan is made for."""

    prompt: int
    answer: int
    batch: int


class CandidateJson(_Part):
    """A placement that was simulated, and the simulated time of the whole mix."""

    method: str
    mix_us: float


class SolutionJson(_Part):
    """How the placement was found; times are of the solver's linear model, of the whole mix. ``seconds``: finding and
    simulating the candidates, of which ``chosen`` was the fastest."""

    method: str
    objective_us: float
    bound_us: float
    greedy_us: float
    gap: float
    statistics: str
    candidates: list[CandidateJson]
    chosen: str
    seconds: float | None


class Layers(_Part):
    """A run of layers that are placed alike; ``bytes``: weights and KV cache by device."""

    first: int
    last: int
    dense: str
    experts: str
    bytes: dict[str, int]


class Variant(_Part):
    """A change of the machine (``--what-if``) and the predictions there, in tokens/s by phase."""

    change: str
    tokens_per_s: dict[str, float]


class Improvement(_Part):
    """What would help: ``gain`` 0.21 is 21 % more speed of the mix."""

    change: str
    gain: float


class Matrices(_Part):
    """Weights of a role that are stored alike in the checkpoint (``source``; ``source_bits`` a weight, null without a
    checkpoint) and computed in one format; ``exact``: that holds the same numbers. ``bits``: a weight's in memory."""

    role: str
    source: str
    source_bits: float | None
    format: str
    exact: bool
    weights: int
    numbers: int
    bytes: int
    bits: float


def matrices(plan: Plan) -> list[Matrices]:
    """The matrices by class, as the document and ``hetcomp inspect --json`` have them."""
    return [Matrices(**asdict(one), bits=one.bits) for one in weight_classes(plan)]


class PlanDocument(_Part):
    """The document; null and empty lists stand for what no pass has filled in yet."""

    schema_: tuple[int, int] = Field(default=SCHEMA, alias="schema")
    explored: bool
    model: ModelFacts
    dims: dict[str, int]
    groups: list[Group]
    predictions: list[Prediction]
    memory: Memory
    devices: list[Device]
    roofs: list[RoofJson]
    layers: list[Layers]
    mix: Mix | None
    solution: SolutionJson | None
    what_if: list[Variant]
    improvements: list[Improvement]
    adapters: list[AttachedAdapter]
    adapter_room: AdapterRoom | None
    matrices: list[Matrices]
    notes: list[str]


def plan_document(
    plan: Plan,
    available_bytes: int | None = None,
    figures: Figures | None = None,
    *,
    explored: bool = False,
    compared: list[tuple[str, Plan]] | None = None,
    gains: list[tuple[str, float]] | None = None,
) -> PlanDocument:
    """The report's numbers. figures: where the machine is known; explored: the plan may have what no code is generated
    for; compared, gains: answers to what-if questions."""
    summary, model = summarise(plan), plan.model
    memories = figures.memory if figures is not None else device_memory(plan, None)
    return PlanDocument(
        explored=explored,
        model=ModelFacts(name=model.name, architecture=model.architecture, layers=model.layers, vocab=model.vocab),
        dims=plan.max_dims(),
        groups=[_group(group) for group in summary.groups],
        predictions=_predictions(plan),
        memory=Memory(
            items=[MemoryPart(what=item.what, bytes=item.bytes) for item in summary.memory],
            bytes=summary.memory_bytes,
            available_bytes=available_bytes,
        ),
        devices=[
            Device(
                device=m.device,
                name=m.name,
                parts=[MemoryPart(what=what, bytes=size) for what, size in m.parts],
                bytes=m.bytes,
                limit_bytes=m.limit,
            )
            for m in memories
        ],
        roofs=[RoofJson(**{k: v for k, v in asdict(r).items() if k != "name"}, ridge=r.ridge) for r in _roofs(figures)],
        layers=[
            Layers(first=r.first, last=r.last, dense=r.dense, experts=r.experts, bytes=dict(r.bytes))
            for r in layer_runs(plan)
        ],
        mix=Mix(**asdict(plan.mix)) if plan.mix else None,
        solution=_solution(plan, figures),
        what_if=[
            Variant(change=change, tokens_per_s={t.phase: t.tokens_per_s for t in other.timelines})
            for change, other in compared or []
        ],
        improvements=[Improvement(change=change, gain=gain) for change, gain in gains or []],
        adapters=list(plan.adapters),
        adapter_room=plan.adapter_room,
        matrices=matrices(plan),
        notes=list(plan.notes),
    )


def plan_report_json(
    plan: Plan,
    available_bytes: int | None = None,
    figures: Figures | None = None,
    *,
    explored: bool = False,
    compared: list[tuple[str, Plan]] | None = None,
    gains: list[tuple[str, float]] | None = None,
) -> str:
    """:func:`plan_document` as text."""
    document = plan_document(plan, available_bytes, figures, explored=explored, compared=compared, gains=gains)
    return document.model_dump_json(by_alias=True, indent=2)


def _roofs(figures: Figures | None) -> list[Roof]:
    return list(figures.roofs) if figures is not None else []


def _predictions(plan: Plan) -> list[Prediction]:
    return [
        Prediction(
            phase=t.phase,
            tokens=t.tokens,
            total_us=t.total_us,
            tokens_per_s=t.tokens_per_s,
            low_us=t.low_us,
            high_us=t.high_us,
            busy_us={lane.lane: lane.busy_us for lane in t.lanes},
            critical_us=dict(t.critical),
        )
        for t in plan.timelines
    ]


def _solution(plan: Plan, figures: Figures | None) -> SolutionJson | None:
    if plan.solution is None:
        return None
    return SolutionJson(**asdict(plan.solution), seconds=figures.place_seconds if figures is not None else None)


def _group(group: OpGroup) -> Group:
    return Group(
        role=group.role,
        devices=group.devices,
        ops=group.ops,
        weight_bytes=group.weight_bytes,
        phases=[
            GroupPhase(
                phase=phase.phase,
                tokens=phase.tokens,
                flops=phase.flops,
                weight_bytes_read=phase.weight_bytes,
                bytes_moved=phase.moved_bytes,
                intensity=phase.intensity,
                bound=phase.bound,
                us=phase.us,
            )
            for phase in group.phases.values()
        ],
    )
