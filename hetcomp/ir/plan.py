"""The Plan: what is computed, where and when. Typed, torch-free, immutable; passes rewrite it purely.

A Plan holds *templates* (straight-line lists of ops over named values) and *calls* of them in order. As
lowered it has one template with all ops; `fold_layers` replaces equal layers by one template called once a
layer with other weights. Value ids are unique within their scope: the plan's own values (weights, states,
inputs, outputs and the activations handed from call to call) or a template's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hetcomp.ir.annotations import (
    AdapterRoom,
    ArenaSlot,
    AttachedAdapter,
    CacheChoice,
    Cost,
    DeferralQuality,
    DiskReads,
    ExpertCache,
    ExpertStream,
    Mix,
    Placement,
    Schedule,
    Solution,
    Timeline,
    WeightStream,
)
from hetcomp.ir.ops import Attrs
from hetcomp.ir.types import Dim, TensorType

SCHEMA = (1, 8)  # major: readers refuse another; minor: fields were added


class ValueKind(StrEnum):
    """What a value is; decides who owns its memory."""

    ACT = "act"  # activation, lives in the arena
    WEIGHT = "weight"  # from the checkpoint, packed into the artifact
    CONST = "const"  # small tensor computed at compile time (rope's inv_freq), stored like a weight
    STATE = "state"  # KV cache, or what a recurrence has come to; lives as long as the session
    INPUT = "input"  # given with each step: ids, positions
    OUTPUT = "output"  # logits


@dataclass(frozen=True, slots=True)
class Quantised:
    """How a quantised tensor [.., rows, columns] is stored, from the checkpoint's config and headers.

    ``scheme`` and ``label`` name it, for the reader and for people (``FP8, blocks of 128 x 128``). ``block``: rows and
    columns that share a scale. ``parts``: what is stored, by what it is for (``codes``, ``scales``, ``zeros``, ...).
    ``format`` is the weight format that holds it; where that is not exact, ``inexact`` says why. ``bits`` of a weight,
    scales included. ``act_order``: its groups of columns are scattered, as the part ``groups`` says (GPTQ's g_idx)."""

    scheme: str
    label: str
    block: tuple[int, int]
    parts: tuple[tuple[str, CheckpointTensor], ...]
    format: str
    inexact: str
    bits: float
    act_order: bool = False

    def part(self, name: str) -> CheckpointTensor:
        """What is stored for ``name``; KeyError if there is none."""
        return dict(self.parts)[name]


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of the checkpoint, found from the headers alone. ``offset`` counts from the file's start. Of a
    quantised one, shape and name are those of the numbers that it stands for, the others those of its codes."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    quantised: Quantised | None = None


@dataclass(frozen=True, slots=True)
class WeightSource:
    """How a weight comes out of the checkpoint.

    ``plain``: one tensor. ``stack``: E tensors joined along a new first axis (per-expert checkpoints).
    ``stack_pair``: 2 E tensors, gate and up of expert 0, of expert 1, ...; each pair joined along the rows.
    ``concat``: tensors joined along the rows.
    Then, in this order: ``transpose`` swaps the last two axes (GPT-OSS stores [E, in, out]);
    ``deinterleave`` moves even rows to the front, odd ones behind them (GPT-OSS's gate_up; on a bias it acts
    on the last axis); ``head_split`` (heads, start,
    stop) reads [heads * n, k] as [heads, n, k] and keeps rows start..stop of every head, and
    ``head_transpose`` swaps its last two axes (MLA's absorbed key projection); ``row_runs`` keeps the rows (numbers, of
    a bias) start..stop of each run, one run behind the other (a part of what is projected in one for all heads).
    """

    recipe: str
    tensors: tuple[CheckpointTensor, ...]
    transpose: bool = False
    deinterleave: bool = False
    head_split: tuple[int, int, int] | None = None
    head_transpose: bool = False
    row_runs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value. ``fqn``: the parameter's name in the transformers model (weights), the state's or input's
    name. ``view``: how the weight is cut out of the parameter, filled by lowering (see WeightSource).
    ``source``: filled by bind_weights. ``format``: weight format, filled by choose_formats. ``data``: the
    numbers of a CONST."""

    id: str
    type: TensorType
    kind: ValueKind
    fqn: str | None = None
    view: WeightSource | None = None
    source: WeightSource | None = None
    format: str | None = None
    data: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. ``layer`` is None outside of layers and inside a folded template; ``role`` says what it is
    in the field's words (``attn.q``, ``moe.experts``, ``lm_head``); ``origin`` is the module path it came from
    (``model.layers.*.self_attn.q_proj`` in a folded template)."""

    id: str
    attrs: Attrs
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None = None
    role: str = ""
    origin: str = ""
    cost: Cost | None = None
    schedule: Schedule | None = None

    @property
    def kind(self) -> str:
        """Name of the op kind, e.g. ``linear``."""
        return self.attrs.kind


@dataclass(frozen=True, slots=True)
class Template:
    """A list of ops in order. ``params`` are the formal values bound by a call: weights, states, consts, inputs,
    activations in; ``results`` the values (act or output) handed out. ``arena`` is filled by plan_memory."""

    name: str
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    params: tuple[str, ...]
    results: tuple[str, ...]
    arena: tuple[ArenaSlot, ...] = ()

    def value(self, id: str) -> Value:
        """The value called ``id``; KeyError if there is none."""
        return self.value_map()[id]

    def value_map(self) -> dict[str, Value]:
        """Values by id."""
        return {v.id: v for v in self.values}


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a template. ``args`` and ``results`` name values of the plan, in the order of the template's
    params and results. ``placements`` is filled by place: one entry an op."""

    template: str
    layer: int | None
    args: tuple[str, ...]
    results: tuple[str, ...]
    placements: tuple[tuple[str, Placement], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the model that the runtime and the reports need."""

    name: str
    architecture: str
    model_type: str
    vocab: int
    hidden: int
    layers: int
    max_positions: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    config_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module's text. ``dims`` fixes the bounds of T, R, slots and context. ``established`` names the
    invariants that the passes run so far have established. ``mix`` is the use that it is optimised for,
    ``solution`` how its placement was found; ``stream``: experts are streamed to the GPU in prefill; ``weight_stream``:
    weights of linear layers are; ``expert_cache``: some experts are on the GPU, others from step to step. ``disk``:
    experts are read from the disk. ``deferral``: what deferring experts was measured to cost, if it was;
    ``cache_choice``: how the policy of the expert cache was found, if a routing trace decided. ``adapters``: what
    changes the model's weights; ``adapter_room``: what there is memory for that changes them at run time (None:
    nothing on GPUs)."""

    model: ModelInfo
    dims: tuple[Dim, ...]
    values: tuple[Value, ...]
    templates: tuple[Template, ...]
    calls: tuple[Call, ...]
    schema: tuple[int, int] = SCHEMA
    established: tuple[str, ...] = ()
    arena_bytes: int = 0
    call_arena: tuple[ArenaSlot, ...] = ()
    timelines: tuple[Timeline, ...] = ()
    mix: Mix | None = None
    solution: Solution | None = None
    stream: ExpertStream | None = None
    weight_stream: WeightStream | None = None
    deferral: DeferralQuality | None = None
    expert_cache: ExpertCache | None = None
    disk: DiskReads | None = None
    cache_choice: CacheChoice | None = None
    adapters: tuple[AttachedAdapter, ...] = ()
    adapter_room: AdapterRoom | None = None
    notes: tuple[str, ...] = field(default=())

    def dim(self, name: str) -> Dim:
        """The dimension called ``name``; KeyError if there is none."""
        for d in self.dims:
            if d.name == name:
                return d
        raise KeyError(name)

    def max_dims(self) -> dict[str, int]:
        """Upper bounds of all dimensions, for sizes."""
        return {d.name: d.max for d in self.dims}

    def value_map(self) -> dict[str, Value]:
        """The plan's own values by id."""
        return {v.id: v for v in self.values}

    def template(self, name: str) -> Template:
        """The template called ``name``; KeyError if there is none."""
        for t in self.templates:
            if t.name == name:
                return t
        raise KeyError(name)

    def map_templates(self, new: Mapping[str, Template]) -> Plan:
        """This plan with the templates of ``new`` in place of those of the same name."""
        return replace(self, templates=tuple(new.get(t.name, t) for t in self.templates))
