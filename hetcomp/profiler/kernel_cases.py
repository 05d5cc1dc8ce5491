"""Which of our kernels are timed, on which operands: the points of the profile's kernel curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hetcomp.backends import packing
from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.backends.select_kernels import choose, default_backends
from hetcomp.hardware.figures import KernelName
from hetcomp.hardware.tuning import KernelTuning
from hetcomp.ir import ops
from hetcomp.ir.ops import Attrs
from hetcomp.ir.plan import Op, Value, ValueKind
from hetcomp.ir.types import CACHE_DTYPES, DType, TensorType

# Shapes of a mid-size MoE layer; a curve is used for others in proportion to their weights.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 64, 8
# Experts, top-k, hidden and intermediate size of the wide experts: DeepSeek-V3's, of which each row of activations is
# shared by most weights. As many as show the kernel at work; a few tens of tokens take long on few cores.
WIDE_EXPERTS = (4, 2, 7168, 2048)
# Formats that gain from width, 1.3 to 1.5 times from 4 to 32 tokens on AMX; bf16 does not (0.96 to 1.07 from 4 tokens
# on, docs/decisions/cost-from-our-kernels.md).
_WIDE_FORMATS = ("q8", "q4")
ROWS, COLUMNS = 2048, 2048
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
DELTA_KEY_HEADS, DELTA_HEADS = 8, 16  # of HEAD_DIM, too
CONTEXT = 16384
MOST_TOKENS = 4096
# Width of the small operands: a second shape shows what a kernel pays for rows of activations besides its weights and
# for short streams, and in few tokens what it takes when caches hold the weights.
SMALL = 256
SMALL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512)
# Activations of the long tail take turns over this much, as those of a step's many ops do.
TAIL_BYTES = 96 << 20
# Most weights that take turns to be cold (kernel_probe.cpp.j2 calls no point more often).
_MOST_SETS = 400
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
POSITIONS = (128, 512, 2048, 8192, 16383)
PROMPTS = (16, 64, 256, 512, 1024)
SMALL_POSITIONS, SMALL_PROMPTS = (128, 512, 2048), (16, 64, 256, 1024)
ROW_COUNTS = (1, 4, 16, 64, 512)
COARSE = (1, 8, 64, 512)
# Between one token and many lies the bend from memory to compute, which no line through few points follows. With 64
# tokens an expert fills several tiles; more would take a second a call and show the same.
COARSE_EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# With AMX the height of a register tile shows (16 tokens take 1.4 times as long as 12, which fill one, and 13 what 16
# do), and from 64 tokens on tiles of bf16 multiply quantised weights (docs/decisions/amx-for-many-tokens.md), 1.3 to
# 1.5 times as fast: steps, with a point on either side.
_AMX_EXPERT_TOKENS = (12, 13, 24, 25, 48, 63, 128, 256)
# From this many rows on activations come from another core's cache, or from memory: so they do in a step, whose ops
# divide their rows differently.
_TURNING_ROWS = 16


@dataclass(frozen=True)
class Operand:
    """An input of a timed kernel, as kernel_probe.cpp.j2 describes it."""

    kind: str
    bytes: int
    sets: int = 1


@dataclass(frozen=True)
class Case:
    """One point of a curve. ``work``: what the curve's rate counts, in one call."""

    size: int
    rows: int
    work: float
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    position: int = 0
    output_sets: int = 1

    def stream_bytes(self) -> int:
        """Memory of the operands that take turns, all their sets."""
        turning = [o for o in self.inputs if o.kind in ("w", "s")]
        outputs = sum(self.outputs) if self.output_sets > 1 else 0
        return (sum(o.bytes for o in turning) + outputs) * max((o.sets for o in turning), default=1)


@dataclass(frozen=True)
class CurvePlan:
    """A curve to measure: its kernel and its points."""

    name: KernelName
    variant: str
    weight_format: str
    shape: dict[str, int]
    kernel: Kernel
    cases: tuple[Case, ...]


Emit = Callable[[Attrs, Sequence[Value], Sequence[Value]], Kernel]


class Detail(StrEnum):
    """How much is measured: ``FULL``, all curves of the usual formats, attention and elementwise kinds (through TVM)
    included; ``COARSE``, few points of the other formats; ``QUICK``, few points of the usual ones, of large matrices
    and wide experts only."""

    FULL = "full"
    COARSE = "coarse"
    QUICK = "quick"


# Formats by how much of them is measured: those of most use everything, the others few points.
_FORMATS = {
    Detail.FULL: ("f32", "bf16", "q8", "q4"),
    Detail.COARSE: ("fp8", "mxfp4"),
    Detail.QUICK: ("f32", "bf16", "q8", "q4"),
}


def curve_plans(
    isa: Isa, detail: Detail, cold_bytes: int, tunings: tuple[KernelTuning, ...] = ()
) -> Iterator[CurvePlan]:
    """The curves of one instruction set. cold_bytes: memory over which weights take turns to be cold."""
    emit = _emitter(isa, tunings)
    for form in _FORMATS[detail]:
        yield from _linear(emit, form, detail, cold_bytes)
        yield from _experts(emit, form, detail, isa, cold_bytes)
    if detail is Detail.FULL:
        for dtype in CACHE_DTYPES:
            yield from _attention(emit, dtype, cold_bytes)
        yield from _gated_delta(emit, cold_bytes)
        yield from _tail(emit, cold_bytes)


def expert_plan(isa: Isa, tuning: KernelTuning, sizes: Sequence[int], cold_bytes: int) -> CurvePlan:
    """As many experts as a token chooses, of the constants and the format of ``tuning``, at ``sizes`` (tokens)."""
    shape = (4, 4, HIDDEN, INTERMEDIATE)
    return _expert_curve(_emitter(isa, (tuning,)), tuning.weight_format, "dram", shape, sizes, cold_bytes)


def linear_plan(isa: Isa, tuning: KernelTuning, tokens: Sequence[int], cold_bytes: int) -> CurvePlan:
    """A linear op of the constants and the format of ``tuning``, at ``tokens`` rows."""
    return _cold_linear(_emitter(isa, (tuning,)), tuning.weight_format, tokens, cold_bytes)


def _emitter(isa: Isa, tunings: tuple[KernelTuning, ...]) -> Emit:
    backends = default_backends()

    def emit(attrs: Attrs, inputs: Sequence[Value], outputs: Sequence[Value]) -> Kernel:
        dims = {"T": MOST_TOKENS, "R": MOST_TOKENS, "slots": 1, "context": CONTEXT}
        ask = KernelRequest(Op("op", attrs, (), ()), tuple(inputs), tuple(outputs), isa, dims, tunings)
        return choose(backends, ask).emit(ask)

    return emit


def stream_bytes(plans: Sequence[CurvePlan]) -> int:
    """Memory that the operands which take turns need at most."""
    return max(case.stream_bytes() for plan in plans for case in plan.cases)


def bytes_a_weight(weight_format: str) -> float:
    """Packed bytes of an element of the matrix of ``linear``."""
    return packing.matrix_bytes(ROWS, COLUMNS, weight_format) / (ROWS * COLUMNS)


def _act(id: str, *shape: int | str, dtype: DType = DType.F32) -> Value:
    return Value(id, TensorType(dtype, shape), ValueKind.ACT)


def _weight(id: str, shape: tuple[int, ...], form: str, layout: str) -> Value:
    return Value(id, TensorType(DType.F32, shape, layout), ValueKind.WEIGHT, fqn=id, format=form)


def _sets(cold_bytes: int, each: int) -> int:
    """How many sets of operands of ``each`` bytes take turns."""
    return max(1, min(cold_bytes // each, _MOST_SETS))


def _linear(emit: Emit, form: str, detail: Detail, cold_bytes: int) -> Iterator[CurvePlan]:
    yield _cold_linear(emit, form, TOKENS if detail is Detail.FULL else COARSE, cold_bytes)
    if detail is not Detail.QUICK:
        yield _linear_curve(emit, form, "cache", (SMALL, SMALL), _small_tokens(detail), 0)


def _cold_linear(emit: Emit, form: str, tokens: Sequence[int], cold_bytes: int) -> CurvePlan:
    return _linear_curve(emit, form, "dram", (ROWS, COLUMNS), tokens, cold_bytes)


def _linear_curve(
    emit: Emit, form: str, variant: str, shape: tuple[int, int], tokens: Sequence[int], cold_bytes: int
) -> CurvePlan:
    rows, columns = shape
    weight = _weight("w", shape, form, packing.PANELS)
    size = packing.packed_bytes(weight)
    kernel = emit(ops.Linear(columns, rows), [_act("x", "T", columns), weight], [_act("y", "T", rows)])
    operand = Operand("w", size, _sets(cold_bytes, size))
    cases = tuple(
        Case(t, t, float(rows * columns), (Operand("a", 4 * t * columns), operand), (4 * t * rows,)) for t in tokens
    )
    return CurvePlan("linear", variant, form, {"out_features": rows, "in_features": columns}, kernel, cases)


def _experts(emit: Emit, form: str, detail: Detail, isa: Isa, cold_bytes: int) -> Iterator[CurvePlan]:
    coarse = _expert_tokens(COARSE_EXPERT_TOKENS, isa)
    sizes = _expert_tokens(EXPERT_TOKENS, isa) if detail is Detail.FULL else coarse
    yield _expert_curve(emit, form, "dram", (EXPERTS, TOP_K, HIDDEN, INTERMEDIATE), sizes, cold_bytes)
    if form in _WIDE_FORMATS and _expert_bytes(form, WIDE_EXPERTS) <= cold_bytes:
        yield _expert_curve(emit, form, "wide", WIDE_EXPERTS, coarse, cold_bytes)
    if detail is not Detail.QUICK:
        # Small enough that the second-level caches of two cores hold all experts that a call touches.
        shape = (8, 2, SMALL, SMALL // 2)
        yield _expert_curve(emit, form, "small", shape, _small_tokens(detail), cold_bytes)
        yield _expert_curve(emit, form, "cache", shape, _small_tokens(detail), 0)


def _expert_tokens(sizes: Sequence[int], isa: Isa) -> Sequence[int]:
    return sorted({*sizes, *_AMX_EXPERT_TOKENS}) if isa is Isa.AMX_BF16 else sizes


def _small_tokens(detail: Detail) -> Sequence[int]:
    return SMALL_TOKENS if detail is Detail.FULL else COARSE


def _expert_weights(form: str, shape: tuple[int, int, int, int]) -> tuple[Value, Value]:
    experts, _, hidden, width = shape
    gate_up = _weight("gate_up", (experts, 2 * width, hidden), form, packing.PANELS_GLU)
    return gate_up, _weight("down", (experts, hidden, width), form, packing.PANELS)


def _expert_bytes(form: str, shape: tuple[int, int, int, int]) -> int:
    return sum(packing.packed_bytes(weight) for weight in _expert_weights(form, shape))


def _expert_curve(
    emit: Emit, form: str, variant: str, shape: tuple[int, int, int, int], sizes: Sequence[int], cold_bytes: int
) -> CurvePlan:
    experts, top_k, hidden, width = shape
    gate_up, down = _expert_weights(form, shape)
    each = packing.packed_bytes(gate_up), packing.packed_bytes(down)
    routed = (_act("ids", "T", top_k, dtype=DType.I32), _act("weights", "T", top_k))
    kernel = emit(
        ops.MoeExperts(experts, top_k, hidden, width),
        [_act("x", "T", hidden), *routed, gate_up, down],
        [_act("y", "T", hidden)],
    )
    sets = _sets(cold_bytes, sum(each))
    cases = []
    for size in sizes:
        tokens = 1 if size == 1 else size * experts // top_k
        if tokens > MOST_TOKENS:
            continue
        touched = min(experts, tokens * top_k)
        inputs = (
            Operand("a", 4 * tokens * hidden),
            Operand("i", experts, top_k),
            Operand("d", 4 * tokens * top_k, top_k),
            Operand("w", each[0], sets),
            Operand("w", each[1], sets),
        )
        cases.append(Case(size, tokens, 3.0 * touched * hidden * width, inputs, (4 * tokens * hidden,)))
    names = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": width}
    return CurvePlan("moe_experts", variant, form, names, kernel, tuple(cases))


def _attention(emit: Emit, dtype: DType, cold_bytes: int) -> Iterator[CurvePlan]:
    large, small = (HEADS, KV_HEADS, HEAD_DIM), (HEADS // 4, KV_HEADS // 2, HEAD_DIM // 2)
    yield from _attention_curves(emit, dtype, "dram", large, (POSITIONS, PROMPTS), cold_bytes)
    yield from _attention_curves(emit, dtype, "small", small, (SMALL_POSITIONS, SMALL_PROMPTS), cold_bytes)
    yield from _attention_curves(emit, dtype, "cache", small, (SMALL_POSITIONS, ()), 0)


def _attention_curves(
    emit: Emit,
    dtype: DType,
    variant: str,
    heads: tuple[int, int, int],
    sizes: tuple[Sequence[int], Sequence[int]],
    cold_bytes: int,
) -> Iterator[CurvePlan]:
    n_heads, kv_heads, dim = heads
    type_ = TensorType(dtype, ("slots", kv_heads, "context", dim))
    states = [Value(n, type_, ValueKind.STATE) for n in ("k", "v")]
    row = n_heads * dim
    kernel = emit(
        ops.Attention(n_heads, kv_heads, dim, dim, dim**-0.5),
        [_act("q", "T", n_heads, dim), *states],
        [_act("y", "T", n_heads, dim)],
    )
    size = type_.bytes({"slots": 1, "context": CONTEXT})
    sets = _sets(cold_bytes, 2 * size)
    shape = {"heads": n_heads, "kv_heads": kv_heads, "head_dim": dim}

    def case(size_: int, rows: int, position: int, macs: float) -> Case:
        inputs = (Operand("a", 4 * rows * row), Operand("s", size, sets), Operand("s", size, sets))
        return Case(size_, rows, macs, inputs, (4 * rows * row,), position)

    positions, prompts = sizes
    decode = tuple(case(p, 1, p, 2.0 * row * (p + 1)) for p in positions)
    prefill = tuple(case(t, t, t - 1, 2.0 * row * t * (t + 1) / 2) for t in prompts)
    yield CurvePlan("attention_decode", variant, dtype.value, shape, kernel, decode)
    if prefill:
        yield CurvePlan("attention_prefill", variant, dtype.value, shape, kernel, prefill)


def _gated_delta(emit: Emit, cold_bytes: int) -> Iterator[CurvePlan]:
    heads, dim = DELTA_HEADS, HEAD_DIM
    row = (2 * DELTA_KEY_HEADS + heads) * dim
    type_ = TensorType(DType.F32, ("slots", heads, dim, dim))
    kernel = emit(
        ops.GatedDelta(DELTA_KEY_HEADS, heads, dim, dim, dim**-0.5, 1e-6),
        [
            _act("x", "T", row),
            *(_act(n, "T", heads) for n in "ab"),
            *(_act(n, heads) for n in "ld"),
            Value("s", type_, ValueKind.STATE),
        ],
        [_act("y", "T", heads, dim)],
    )
    state = type_.bytes({"slots": 1})

    def case(rows: int, sets: int) -> Case:
        gates, per_head = Operand("a", 4 * rows * heads), Operand("a", 4 * heads)
        inputs = (Operand("a", 4 * rows * row), gates, gates, per_head, per_head, Operand("s", state, sets))
        work = float(rows * heads * dim * dim)
        return Case(rows, rows, work, inputs, (4 * rows * heads * dim,), rows)  # from position 1 on: the state is read

    shape = {"k_heads": DELTA_KEY_HEADS, "v_heads": heads, "k_dim": dim, "v_dim": dim}
    cold = tuple(case(rows, _sets(cold_bytes, state)) for rows in ROW_COUNTS)
    yield CurvePlan("gated_delta", "dram", "f32", shape, kernel, cold)
    yield CurvePlan("gated_delta", "cache", "f32", shape, kernel, (case(1, 1),))


def _tail(emit: Emit, cold_bytes: int) -> Iterator[CurvePlan]:
    x, y = _act("x", "T", HIDDEN), _act("y", "T", HIDDEN)
    norm = Value("w", TensorType(DType.F32, (HIDDEN,)), ValueKind.WEIGHT, fqn="w", format="f32")
    rows = HEADS * HEAD_DIM
    wide, turned = _act("x", "T", HEADS, HEAD_DIM), _act("y", "T", HEADS, HEAD_DIM)
    angles = [_act(n, "T", HEAD_DIM // 2) for n in ("cos", "sin")]
    logits, ids = _act("l", "T", EXPERTS), _act("i", "T", TOP_K, dtype=DType.I32)
    chosen = _act("r", "T", TOP_K)
    cache = Value("k", TensorType(DType.BF16, ("slots", KV_HEADS, "context", HEAD_DIM)), ValueKind.STATE)
    append = _act("x", "T", KV_HEADS, HEAD_DIM)
    gate, up, glu = (_act(n, "T", INTERMEDIATE) for n in ("g", "u", "z"))
    taps = Value("w", TensorType(DType.F32, (HIDDEN, 1, 4)), ValueKind.WEIGHT, fqn="w", format="f32")
    history = Value("h", TensorType(DType.F32, ("slots", 3, HIDDEN)), ValueKind.STATE)
    kinds: list[tuple[Attrs, list[Value], list[Value], int]] = [
        (ops.RmsNorm(HIDDEN, 1e-6), [x, norm], [y], HIDDEN),
        (ops.Rope(HEADS, HEAD_DIM, HEAD_DIM), [wide, *angles], [turned], rows),
        (ops.Add(), [x, _act("x2", "T", HIDDEN)], [y], HIDDEN),
        (ops.Route(EXPERTS, TOP_K, "softmax", True), [logits], [ids, chosen], 2 * TOP_K),
        (ops.Glu(INTERMEDIATE), [gate, up], [glu], INTERMEDIATE),
        (ops.KvAppend(KV_HEADS, HEAD_DIM), [append, cache], [], KV_HEADS * HEAD_DIM),
        (ops.CausalConv(HIDDEN, 4), [x, taps, history], [y], HIDDEN),
    ]
    for attrs, inputs, outputs, width in kinds:
        cases = []
        for t in ROW_COUNTS:
            dims = {"T": t, "slots": 1, "context": CONTEXT}
            made = tuple(v.type.bytes(dims) for v in outputs)
            moved = sum(v.type.bytes(dims) for v in inputs) + sum(made)
            # Of a KV cache only the new rows are touched, so that more of it must take turns.
            turning = cold_bytes if any(v.type.is_cache for v in inputs) else min(TAIL_BYTES, cold_bytes)
            sets = _sets(turning, moved) if t >= _TURNING_ROWS else 1
            operands = tuple(
                Operand("s" if v.kind is ValueKind.STATE else "w", v.type.bytes(dims), sets) for v in inputs
            )
            cases.append(Case(t, t, float(t * width), operands, made, t - 1, sets))
        kernel = emit(attrs, inputs, outputs)
        yield CurvePlan("elementwise", attrs.kind, "f32", {"width": width}, kernel, tuple(cases))
