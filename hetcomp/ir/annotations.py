"""What the passes add to ops and calls: cost, placement, schedule, memory, predicted timeline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mix:
    """The use that a plan is made for: ``batch`` sequences at once, each with a prompt of ``prompt`` tokens and an
    answer of ``answer`` tokens."""

    prompt: int
    answer: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Work of one op in one phase (``decode`` or ``prefill``) at ``tokens`` tokens.

    ``intensity`` is FLOPs per byte moved (weights + activations + state); ``us`` the time from the roofline
    max(bytes / bandwidth, flops / rate) + latency on the profile's CPU; ``bound`` is ``memory`` or ``compute``.
    """

    phase: str
    tokens: int
    flops: float
    weight_bytes: float
    act_bytes: float
    state_bytes: float
    intensity: float
    us: float
    bound: str


@dataclass(frozen=True, slots=True)
class Cost:
    """Costs of an op, one entry a phase and batch size."""

    phases: tuple[PhaseCost, ...]

    def phase(self, name: str) -> PhaseCost:
        """The first entry of that phase; KeyError if there is none."""
        for p in self.phases:
            if p.phase == name:
                return p
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Experts ``first`` .. ``last`` (inclusive) of an op live and run on ``device``. ``streamed_to``: in prefill
    their weights are copied to that GPU and run there."""

    first: int
    last: int
    device: str
    streamed_to: str | None = None


@dataclass(frozen=True, slots=True)
class NodeSlice:
    """The part of a weight's split dimension (``start`` .. ``stop``) that NUMA node ``node`` owns."""

    node: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one op of one call runs. Devices are ``cpu:<node>`` and ``gpu:<index>``. ``experts`` is given for
    moe_experts only and covers every expert once: where each lives and runs, while ``device`` is where the op's
    input is and its sum is wanted. ``streamed``: the op runs on its GPU with weights that live in CPU memory and
    are copied there in every step. ``slices`` is filled by slice_numa
    (a single one by place, where experts lie on one node as a whole). ``deferred`` is filled by defer_experts: of a
    generated token at most so many choices of experts on the CPU are added at the next MoE layer. ``in_prompts``: an
    op of the CPU that this GPU runs instead in steps of the plan's ``weight_stream``, with weights that are copied to
    it; of a transfer: both ends are on this GPU then, and nothing is moved."""

    device: str
    experts: tuple[ExpertPlacement, ...] = ()
    slices: tuple[NodeSlice, ...] = ()
    streamed: bool = False
    deferred: int = 0
    in_prompts: str = ""


Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StreamRates:
    """What the split of a layer's experts is computed from in each step. ``cpu_expert_us``, ``gpu_expert_us``: (tokens
    of an expert, microseconds), ascending. ``link_gb_per_s``: from CPU memory to the GPU; ``joint_gb_per_s``: what CPU
    memory gives to the CPU and to such copies together (``cpu_expert_us`` is without any)."""

    link_gb_per_s: float
    joint_gb_per_s: float
    cpu_expert_us: Curve
    gpu_expert_us: Curve


@dataclass(frozen=True, slots=True)
class ExpertStream:
    """Experts in CPU memory may be copied to the GPU in a step of a prompt, in waves: up to ``slots`` of a layer are
    computed together, while up to as many are on their way into the other half of the slots. ``spines_us``, one for
    each MoE layer with experts that may: (tokens of a step, microseconds) of what GPUs do between the layer before it
    on its GPU, or the step's beginning, and its routing; layers whose experts are all resident among that."""

    slots: int
    rates: StreamRates
    spines_us: tuple[Curve, ...]

    @property
    def ring(self) -> int:
        """Slots in all."""
        return 2 * self.slots

    def waves(self, experts: int) -> int:
        """Of a layer that streams up to so many experts."""
        return max(1, -(-experts // self.slots))


@dataclass(frozen=True, slots=True)
class WeightStream:
    """In steps of a prompt of at least ``tokens`` tokens weights of linear layers in CPU memory are copied to GPUs,
    which then run these layers (``Placement.in_prompts``). ``ring_bytes``: of the memory that they come to, on each of
    ``gpus``; ``bytes``: of all that is copied in a step."""

    tokens: int
    ring_bytes: int
    bytes: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Of each MoE layer with a cache whose input ``gpu`` makes, ``slots`` experts are in its memory. ``bytes``: of all
    these slots; ``bytes_per_step``: what may be copied to them under a step."""

    gpu: str
    slots: int
    bytes: int
    bytes_per_step: int


@dataclass(frozen=True, slots=True)
class ExpertCache:
    """Of each MoE layer whose experts are in CPU memory and whose input a GPU makes, as many experts as ``gpus`` say
    are in that GPU's memory as well: those in ``first`` (by layer with a cache) at load, others as the runtime decides
    by ``policy`` (``lru`` or ``lfu``) between steps of decoding."""

    policy: str
    gpus: tuple[CacheSlots, ...]
    first: tuple[tuple[int, ...], ...]

    def on(self, gpu: str) -> CacheSlots | None:
        """What ``gpu`` has; None: no layer with a cache."""
        return next((found for found in self.gpus if found.gpu == gpu), None)


@dataclass(frozen=True, slots=True)
class DiskReads:
    """The CPU's experts are more than its memory holds beside all else: ``bytes`` of them, for which there are
    ``room`` bytes. Those that are not there are read from the disk when they are chosen, at ``gb_per_s``."""

    bytes: int
    room: int
    gb_per_s: float

    @property
    def missing(self) -> float:
        """Part of the chosen experts that must be read, where all are chosen equally often."""
        return 1.0 - max(0.0, min(1.0, self.room / self.bytes))

    def us(self, wanted: float) -> float:
        """Time to read what is missing of so many bytes of chosen experts."""
        return wanted * self.missing / self.gb_per_s / 1e3


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """What a policy did with a routing trace: the part of its choices whose expert the GPU had, bytes copied a step in
    the mean, and the simulated microseconds of a step of decoding."""

    policy: str
    hit_rate: float
    bytes_per_step: float
    step_us: float


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """How ``expert_cache="auto"`` was decided: on ``steps`` steps of decoding of the routing trace ``trace``, behind
    others of it that static placement was made from and the caches were warmed with. ``figures``: of the policies that
    are possible, of which ``chosen`` is the fastest; ``refused``: why there is no cache among them (empty: there is).
    """

    trace: str
    steps: int
    figures: tuple[CacheFigures, ...]
    chosen: str
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement that was considered: the method that found it, and the simulated time of the whole mix."""

    method: str
    mix_us: float


@dataclass(frozen=True, slots=True)
class Solution:
    """How the placement was found. ``objective_us``: predicted time of the whole mix (prompt and answer of every
    sequence) of the solver's placement in its linear model; ``bound_us``: no placement is faster there; ``greedy_us``:
    what placing by gain a byte gives; ``gap`` = (objective - bound) / objective. ``candidates``: the placements that
    fit, of which the one by ``chosen`` simulates fastest (earlier ones where several do)."""

    method: str
    objective_us: float
    bound_us: float
    greedy_us: float
    gap: float
    statistics: str
    candidates: tuple[Candidate, ...] = ()
    chosen: str = ""


@dataclass(frozen=True, slots=True)
class DeferralQuality:
    """What the plan's deferral does to the model's output, measured on ``text`` with the model in float32, every token
    treated as a generated one: ``kl`` is the mean KL divergence (nats a token) of the output with deferral from that
    without, ``perplexity`` and ``undeferred_perplexity`` those of the next token with and without."""

    text: str
    tokens: int
    kl: float
    perplexity: float
    undeferred_perplexity: float


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A weight that an adapter changes: its name, and the largest rank that the adapter gives a matrix of it."""

    fqn: str
    rank: int


@dataclass(frozen=True, slots=True)
class AttachedAdapter:
    """A LoRA adapter that the plan's model is compiled with. ``sha256``: of its files. ``merged``: its deltas are added
    to the weights before these are packed."""

    name: str
    sha256: str
    merged: bool
    targets: tuple[AdapterTarget, ...]


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """Memory of GPUs, and of the CPU, for LoRA adapters that are loaded at run time: ``count`` of them, each with pairs
    of ranks up to ``rank`` for every weight that adapters may change; ``experts``: on GPUs, for routed experts too.
    ``decode_us``: predicted, of a step of decoding whose tokens all have one on attention, dense layers and experts."""

    count: int
    rank: int
    experts: bool = True
    decode_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Order on a lane (``cpu:0``) and whether all threads of the lane must meet before the op starts."""

    lane: str
    index: int
    barrier_before: bool


@dataclass(frozen=True, slots=True)
class ArenaSlot:
    """Bytes [offset, offset + bytes) of the arena belong to ``value``, which is a value's id or
    ``workspace:<op id>``."""

    value: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LaneShare:
    """Busy time of one lane in a predicted timeline."""

    lane: str
    busy_us: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Prediction of one phase by the lane simulation: total time of a step of ``tokens`` tokens (the mean over
    sampled routings, ``low_us`` and ``high_us`` their 10th and 90th percentile), busy time per lane, time per role
    (what its ops occupied, in order of their share), and the critical path: the time that each of its members
    (role, with the lane where there are several) holds the step up, longest first."""

    phase: str
    tokens: int
    total_us: float
    tokens_per_s: float
    lanes: tuple[LaneShare, ...]
    roles: tuple[tuple[str, float], ...]
    critical: tuple[tuple[str, float], ...] = ()
    low_us: float = 0.0
    high_us: float = 0.0
