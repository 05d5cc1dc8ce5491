"""What an op has to do in a step: FLOPs, bytes and multiply-adds, independent of where it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.target import KernelTarget
from hetcomp.passes.phases import Phase

Values = Mapping[str, Value]


@dataclass(frozen=True)
class Work:
    """Of one op in one step. ``weights``: elements of weight matrices passed over (of the experts that get tokens);
    ``borders``: their rows and columns added up (activations that a row of work reads and writes). ``group``: rows that
    each of them meets (tokens an expert for moe_experts, else the op's rows); ``written``: elements of its outputs.
    ``weight_format`` is the matrices' (most numbers', where an op's have two), ``state_format`` the KV cache's."""

    rows: int
    flops: float
    weight_bytes: float
    act_bytes: float
    state_bytes: float
    weights: float
    borders: float
    group: float
    written: float
    weight_format: str
    state_format: str

    @property
    def bytes(self) -> float:
        """All bytes moved."""
        return self.weight_bytes + self.act_bytes + self.state_bytes


def work_of(op: Op, values: Values, step: Phase, target: KernelTarget) -> Work:
    """The work of ``op`` in ``step``; experts are assumed to be chosen uniformly."""
    rows = _rows(op, values, step)
    dims = {"T": step.tokens, "R": rows, "slots": step.sequences, "context": step.position}
    weight_bytes, states, acts, weights, state_form = 0.0, 0.0, 0.0, 0.0, "f32"
    formats = Counter({"f32": 0})
    for i, name in enumerate((*op.inputs, *op.outputs)):
        value = values[name]
        if value.kind in (ValueKind.WEIGHT, ValueKind.CONST):
            share = share_read(op, i, rows)
            weight_bytes += target.packed_bytes(value) * share
            if len(value.type.shape) > 1:
                weights += value.type.numel({}) * share
            if value.format not in (None, "f32"):
                formats[value.format] += value.type.numel({})
        elif value.kind is ValueKind.STATE:
            states += _state_bytes(op, value, step)
            state_form = value.type.dtype.value
        else:
            acts += value.type.bytes(dims)
    # kv_append has no output: it writes its input to the cache.
    made = op.outputs or op.inputs[:1]
    written = math.fsum(values[o].type.numel(dims) for o in made)
    flops = _FLOPS.get(op.kind, _elementwise)(op, step, rows, written)
    group = float(rows)
    if isinstance(op.attrs, ops.MoeExperts):
        group = rows * op.attrs.top_k / expected_experts(op.attrs.experts, op.attrs.top_k, rows)
    borders = _borders(op, weights)
    form = max(formats, key=lambda form: formats[form])
    return Work(rows, flops, weight_bytes, acts, states, weights, borders, group, written, form, state_form)


def activation_bytes(value: Value, step: Phase) -> float:
    """Bytes of an activation in a step."""
    rows = _rows_of(value, step)
    return float(value.type.bytes({"T": step.tokens, "R": rows, "slots": 1, "context": 1}))


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that ``tokens`` tokens are expected to choose if the choice is uniform."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)


def share_read(op: Op, operand: int, rows: int) -> float:
    """Part of a weight operand that a step of ``rows`` rows reads: the chosen experts, the rows of an embedding."""
    if isinstance(op.attrs, ops.MoeExperts):
        return expected_experts(op.attrs.experts, op.attrs.top_k, rows) / op.attrs.experts
    if isinstance(op.attrs, ops.Embed) and operand == 1:
        return min(1.0, rows / op.attrs.vocab)
    return 1.0


def _borders(op: Op, weights: float) -> float:
    a = op.attrs
    if isinstance(a, ops.Linear):
        return float(a.in_features + a.out_features)
    if isinstance(a, ops.HeadLinear):
        return float(a.heads * (a.in_features + a.out_features))
    if isinstance(a, ops.MoeExperts):
        return weights * expert_borders(a.hidden, a.intermediate)
    return 0.0


def expert_borders(hidden: int, intermediate: int) -> float:
    """Borders a weight of an expert's three matrices."""
    return (2 * hidden + 3 * intermediate) / (3 * hidden * intermediate)


def visible(window: int, step: Phase) -> float:
    """Mean number of positions that a token of the step attends to."""
    first = step.position - step.tokens // step.sequences + 1
    mean = (first + step.position) / 2
    return min(mean, window) if window else mean


def _rows(op: Op, values: Values, step: Phase) -> int:
    return _rows_of(values[(op.outputs or op.inputs)[0]], step)


def _rows_of(value: Value, step: Phase) -> int:
    # Of a prompt only the last row's logits are wanted; of a decode step one row a sequence.
    return step.sequences if value.type.shape[:1] == ("R",) else step.tokens


def _state_bytes(op: Op, value: Value, step: Phase) -> float:
    if not value.type.is_cache:  # read and written whole
        return 2.0 * value.type.bytes({"slots": 1}) * step.sequences
    per_position = value.type.bytes({"slots": 1, "context": 1})
    if isinstance(op.attrs, ops.Attention):
        last = min(step.position, op.attrs.window) if op.attrs.window else step.position
        return float(per_position * last * step.sequences)
    return float(per_position * step.tokens)


def _linear(op: Op, step: Phase, rows: int, written: float) -> float:
    a = op.attrs
    heads = a.heads if isinstance(a, ops.HeadLinear) else 1
    assert isinstance(a, (ops.Linear, ops.HeadLinear))
    return 2.0 * rows * heads * a.in_features * a.out_features


def _experts(op: Op, step: Phase, rows: int, written: float) -> float:
    a = op.attrs
    assert isinstance(a, ops.MoeExperts)
    return 6.0 * rows * a.top_k * a.hidden * a.intermediate


def _attention(op: Op, step: Phase, rows: int, written: float) -> float:
    a = op.attrs
    assert isinstance(a, ops.Attention)
    return 2.0 * rows * a.heads * (a.head_dim + a.v_head_dim) * visible(a.window, step)


def _causal_conv(op: Op, step: Phase, rows: int, written: float) -> float:
    a = op.attrs
    assert isinstance(a, ops.CausalConv)
    return 2.0 * rows * a.channels * a.width


def _gated_delta(op: Op, step: Phase, rows: int, written: float) -> float:
    """Of each element of the state: its decay, and a multiply-add for k . S, for the update and for q . S."""
    a = op.attrs
    assert isinstance(a, ops.GatedDelta)
    return 7.0 * rows * a.v_heads * a.k_dim * a.v_dim


def _none(op: Op, step: Phase, rows: int, written: float) -> float:
    return 0.0


def _elementwise(op: Op, step: Phase, rows: int, written: float) -> float:
    """About four operations an element: the long tail is bound by memory and latency, not by these."""
    return 4.0 * written


_FLOPS: dict[str, Callable[[Op, Phase, int, float], float]] = {
    "linear": _linear,
    "head_linear": _linear,
    "moe_experts": _experts,
    "attention": _attention,
    "causal_conv": _causal_conv,
    "gated_delta": _gated_delta,
    "embed": _none,
    "kv_append": _none,
    "select_rows": _none,
    "slice": _none,
    "concat": _none,
    "transfer": _none,
}
