"""The closed set of op kinds: one frozen attribute class each, with inputs and outputs in order.

Activations are dense and token-major: ``[T, width]`` or ``[T, heads, head_dim]`` (the same memory as
``[T, heads * head_dim]``; ops may read one as the other). Batch is not a dimension: a step carries T tokens
of one or several sequences, each with its position and its KV-cache slot. ``rows`` below is T or R.

An optional input that is absent is left out; the attribute says so (``bias``, ``sinks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, slots=True)
class Embed:
    """ids i32[T], table w[vocab, width] -> f32[T, width]; rows are multiplied by ``scale``."""

    vocab: int
    width: int
    scale: float = 1.0
    kind: Literal["embed"] = "embed"


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x f32[rows, groups * width], weight f32[width] -> same shape as x.

    Normalises each run of ``width`` elements: y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset).
    ``groups`` runs a row share the weight (the heads of a q_norm; OLMoE norms the whole row: groups = 1).
    """

    width: int
    eps: float
    groups: int = 1
    weight_offset: float = 0.0
    kind: Literal["rms_norm"] = "rms_norm"


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """x f32[rows, width], weight f32[width], bias f32[width] -> f32[rows, width]: (x - mean(x)) / sqrt(var(x) + eps)
    * weight + bias, where var is the mean of squares of x - mean(x) (Phi-MoE).
    """

    width: int
    eps: float
    kind: Literal["layer_norm"] = "layer_norm"


@dataclass(frozen=True, slots=True)
class Linear:
    """x f32[rows, in_features], weight w[out_features, in_features](, bias f32[out]) -> f32[rows, out].

    y = x @ weight.T (+ bias).
    """

    in_features: int
    out_features: int
    bias: bool = False
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, slots=True)
class HeadLinear:
    """x f32[T, heads, in_features], weight w[heads, out_features, in_features] -> f32[T, heads, out_features].

    A linear of its own for every head: y[t, h] = weight[h] @ x[t, h] (MLA's absorbed projections).
    """

    heads: int
    in_features: int
    out_features: int
    kind: Literal["head_linear"] = "head_linear"


@dataclass(frozen=True, slots=True)
class RopeTable:
    """positions i32[T], inv_freq const f32[rotary_dim / 2] -> cos, sin f32[T, rotary_dim / 2].

    cos(position * inv_freq) * scaling, likewise sin; in float32 as transformers computes it.
    """

    rotary_dim: int
    scaling: float = 1.0
    kind: Literal["rope_table"] = "rope_table"


@dataclass(frozen=True, slots=True)
class Rope:
    """x f32[T, heads, head_dim], cos, sin f32[T, rotary_dim / 2] -> same shape as x.

    With h = rotary_dim / 2 and o = offset, for i < h:
    ``half``: pairs (x[o+i], x[o+h+i]), written back to the same places.
    ``interleaved``: pairs (x[o+2i], x[o+2i+1]), written back to the same places.
    ``interleaved_to_half``: pairs (x[o+2i], x[o+2i+1]), written to (o+i, o+h+i) (DeepSeek in transformers).
    A pair (a, b) becomes (a cos - b sin, b cos + a sin). Elements outside [offset, offset + rotary_dim)
    are copied.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    offset: int = 0
    style: Literal["half", "interleaved", "interleaved_to_half"] = "half"
    kind: Literal["rope"] = "rope"


@dataclass(frozen=True, slots=True)
class KvAppend:
    """x f32[T, heads, head_dim], cache state[slots, heads, context, head_dim] -> nothing.

    Writes row t to cache[slots[t], :, positions[t], :].
    """

    heads: int
    head_dim: int
    kind: Literal["kv_append"] = "kv_append"


@dataclass(frozen=True, slots=True)
class Attention:
    """q f32[T, heads, head_dim], k cache, v cache(, sinks f32[heads]) -> f32[T, heads, v_head_dim].

    Causal over the slot's cache: key positions j <= position, and j > position - window if window > 0.
    score = softcap(q . k * scale) with softcap(s) = softcap * tanh(s / softcap) if softcap > 0.
    A sink is one more logit of the head whose probability is dropped (GPT-OSS).
    Query head h reads kv head h // (heads / kv_heads). With ``shared_kv`` there is no v cache input: the
    values are the first ``v_head_dim`` elements of the keys (MLA on latents: kv_heads = 1).
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    shared_kv: bool = False
    kind: Literal["attention"] = "attention"


@dataclass(frozen=True, slots=True)
class CausalConv:
    """x f32[T, channels], weight f32[channels, 1, width], state[slots, width - 1, channels](, bias f32[channels]) ->
    f32[T, channels].

    Each channel by itself, over its row and the width - 1 before it of the same sequence: y[t] = function(sum over j of
    weight[:, 0, j] * x[t - (width - 1) + j] (+ bias)). Rows before position 0 count as 0; those before the step's first
    row of a slot are in the state, the last one last, where the op leaves those of the next step. Rows of a slot are
    neighbours in a step, in the order of their positions.
    """

    channels: int
    width: int
    function: Literal["none", "silu"] = "silu"
    bias: bool = False
    kind: Literal["causal_conv"] = "causal_conv"


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """qkv f32[T, 2 * k_heads * k_dim + v_heads * v_dim] (queries, keys, values), a f32[T, v_heads], b f32[T, v_heads],
    a_log f32[v_heads], dt_bias f32[v_heads], state[slots, v_heads, k_dim, v_dim] -> f32[T, v_heads, v_dim].

    The gated delta rule (arXiv 2412.06464), for each head h of the values, whose queries and keys are those of head
    h // (v_heads / k_heads):
        q, k = q / sqrt(sum(q^2) + l2_eps), likewise k, if l2_eps > 0; then q *= scale
        S = S * exp(-exp(a_log[h]) * softplus(a[t, h] + dt_bias[h]))
        S += k (x) (sigmoid(b[t, h]) * (v - k . S))
        y[t, h] = q . S
    S is the state of the row's slot, 0 before position 0. Rows of a slot are neighbours in a step, in the order of
    their positions.
    """

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    scale: float
    l2_eps: float = 0.0
    kind: Literal["gated_delta"] = "gated_delta"


@dataclass(frozen=True, slots=True)
class Route:
    """logits f32[T, experts](, selection bias f32[experts]) -> ids i32[T, top_k], weights f32[T, top_k].

    Always sorted by falling selection score; equal scores: lower expert first.
    ``softmax``: s = softmax(logits), weights = s of the chosen. ``sigmoid``: s = sigmoid(logits).
    ``topk_softmax``: choose by logit, weights = softmax over the chosen logits (GPT-OSS).
    ``sparse_mixer``: choose by logit; the weight of each choice is its share in a softmax over the experts not chosen
    before it whose logits l are near its own, m: (m - l) / max(|l|, m) <= 2 * jitter (Phi-MoE, arXiv 2409.12136).
    The bias is added for the choice only. Groups: experts in ``groups`` equal runs, only the best
    ``top_groups`` may be chosen; a group's score is its best (``max``) or the sum of its two best (``top2``);
    for the choice the scores (bias included) of the experts outside count as -inf (``outside_groups`` =
    ``never``; DeepSeek-V3 and GLM-4-MoE in transformers 5) or as 0.0 (``zero``; DeepSeek-V2).
    ``normalise``: weights /= sum + norm_eps. At last weights *= scaling.
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid", "topk_softmax", "sparse_mixer"]
    normalise: bool
    norm_eps: float = 0.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    outside_groups: Literal["never", "zero"] = "never"
    scaling: float = 1.0
    bias: bool = False
    jitter: float = 0.0
    kind: Literal["route"] = "route"


GluFunction = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"]


@dataclass(frozen=True, slots=True)
class MoeExperts:
    """x f32[T, hidden], ids i32[T, top_k], weights f32[T, top_k], gate_up w[experts, 2 * intermediate, hidden],
    down w[experts, hidden, intermediate](, gate_up_bias f32[experts, 2 * intermediate],
    down_bias f32[experts, hidden]) -> f32[T, hidden].

    y[t] = sum over k of weights[t, k] * (down[e] @ glu(gate_up[e] @ x[t] + bias) + bias), e = ids[t, k]. A choice e < 0
    adds nothing: in the part of a NUMA node it stands for an expert of another node.
    Rows 0 .. intermediate-1 of gate_up are the gate, the rest the up projection (checkpoints that interleave
    them are put in this order when they are packed). ``swiglu_oai``: (clamp(up, -limit, limit) + 1) *
    g * sigmoid(alpha * g) with g = min(gate, limit).
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    function: GluFunction = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    bias: bool = False
    kind: Literal["moe_experts"] = "moe_experts"


@dataclass(frozen=True, slots=True)
class Glu:
    """gate, up f32[rows, width] -> f32[rows, width]: function(gate) * up (see MoeExperts)."""

    width: int
    function: GluFunction = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    kind: Literal["glu"] = "glu"


@dataclass(frozen=True, slots=True)
class Activation:
    """x -> function(x), elementwise."""

    function: Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"]
    kind: Literal["activation"] = "activation"


@dataclass(frozen=True, slots=True)
class Add:
    """a, b of the same shape -> a + b."""

    kind: Literal["add"] = "add"


@dataclass(frozen=True, slots=True)
class Mul:
    """a f32[rows, width], b of the same shape or f32[rows, 1] (broadcast over the row) -> a * b."""

    kind: Literal["mul"] = "mul"


@dataclass(frozen=True, slots=True)
class Scale:
    """x -> x * factor."""

    factor: float
    kind: Literal["scale"] = "scale"


@dataclass(frozen=True, slots=True)
class Slice:
    """x [..., n] -> x[..., start:stop] (a copy)."""

    start: int
    stop: int
    kind: Literal["slice"] = "slice"


@dataclass(frozen=True, slots=True)
class Concat:
    """a, b, ... -> joined along the last axis; an input whose heads dimension is 1 is repeated over the heads
    of the others (DeepSeek's shared rotary key)."""

    kind: Literal["concat"] = "concat"


@dataclass(frozen=True, slots=True)
class SelectRows:
    """x f32[T, width] -> f32[R, width]: the rows named by the step's logit_rows."""

    kind: Literal["select_rows"] = "select_rows"


@dataclass(frozen=True, slots=True)
class Transfer:
    """x on one device -> x on another (inserted by insert_transfers)."""

    source: str
    target: str
    kind: Literal["transfer"] = "transfer"


AtenLiteral = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class AtenRef:
    """Argument of an aten node: input ``i`` of the op (``input``) or the result of an earlier node (``node``)."""

    source: Literal["input", "node"]
    index: int


AtenArg = AtenRef | AtenLiteral | tuple[AtenRef | AtenLiteral, ...]


@dataclass(frozen=True, slots=True)
class AtenNode:
    """One aten call: overload name (``aten.cumsum.default``), arguments, result types as torch has them
    (the leading batch dimension of 1 still there; the string ``T`` for the sequence dimension).

    ``dtype`` is torch's name without ``torch.``. In arguments the string ``T`` is the number of tokens and
    ``torch.float32`` a dtype; device, layout and memory format are left out. A call with several results has dtype
    ``tuple`` and no shape; nodes with target ``getitem`` (call, index) take them apart.
    """

    target: str
    args: tuple[AtenArg, ...]
    kwargs: tuple[tuple[str, AtenArg], ...]
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Aten:
    """The escape hatch: a region of aten ops that no kind stands for. Compiled by TVM.

    ``input_shapes`` are the torch shapes of the inputs: read contiguously, each is the value's memory (expert ids
    and positions are i32 there). ``results`` are the nodes that are the op's outputs, each with the rows first.
    """

    nodes: tuple[AtenNode, ...]
    input_shapes: tuple[tuple[int | str, ...], ...]
    input_dtypes: tuple[str, ...]
    results: tuple[int, ...]
    kind: Literal["aten"] = "aten"


Attrs = Annotated[
    Embed
    | RmsNorm
    | LayerNorm
    | Linear
    | HeadLinear
    | RopeTable
    | Rope
    | KvAppend
    | Attention
    | CausalConv
    | GatedDelta
    | Route
    | MoeExperts
    | Glu
    | Activation
    | Add
    | Mul
    | Scale
    | Slice
    | Concat
    | SelectRows
    | Transfer
    | Aten,
    Field(discriminator="kind"),
]

# Kinds whose weight operands are stored in a packed format that choose_formats decides.
WEIGHT_FORMAT_KINDS = frozenset({"embed", "linear", "head_linear", "moe_experts"})

# Kinds that write the states among their inputs; the others only read them.
STATE_WRITERS = frozenset({"kv_append", "causal_conv", "gated_delta"})
