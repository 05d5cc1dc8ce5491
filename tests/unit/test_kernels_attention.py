"""Generated kernels of attention and kv_append against numpy in float64."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends import packing
from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.ir.ops import Attention, KvAppend
from hetcomp.ir.types import DType
from tests.reference.attention_reference import attention_reference, poison_the_future
from tests.reference.kernel_harness import (
    CompiledKernel,
    Step,
    activation,
    aligned,
    build,
    cache,
    code,
    emit,
    isas_here,
    weakest_and_best,
)
from tests.reference.kernel_numbers import EPS, draw, from_fp8, from_q8_cache, to_fp8, to_q8_cache

CONTEXT, SLOTS, ROWS = 700, 3, 160
GQA = Attention(heads=6, kv_heads=2, head_dim=36, v_head_dim=36, scale=0.2)
VARIANTS = {
    "gqa": (GQA, DType.F32),
    "gqa-bf16": (GQA, DType.BF16),
    "window-sinks": (
        Attention(heads=4, kv_heads=2, head_dim=16, v_head_dim=32, scale=0.25, window=70, sinks=True),
        DType.BF16,
    ),
    "softcap": (
        Attention(heads=2, kv_heads=2, head_dim=9, v_head_dim=5, scale=0.9, softcap=3.0),
        DType.F32,
    ),
    "mla": (
        Attention(heads=16, kv_heads=1, head_dim=40, v_head_dim=32, scale=0.15, shared_kv=True, sinks=True),
        DType.BF16,
    ),
    "many-heads": (
        Attention(heads=100, kv_heads=1, head_dim=8, v_head_dim=16, scale=0.3),
        DType.F32,
    ),
    # Whole vectors and few rows: the kernel reads the cache without copies of its blocks.
    "direct": (Attention(heads=14, kv_heads=2, head_dim=48, v_head_dim=80, scale=0.2, softcap=5.0), DType.F32),
    "direct-bf16": (
        Attention(heads=10, kv_heads=2, head_dim=64, v_head_dim=64, scale=0.2, window=70, sinks=True),
        DType.BF16,
    ),
    "direct-mla": (Attention(heads=3, kv_heads=1, head_dim=80, v_head_dim=64, scale=0.15, shared_kv=True), DType.BF16),
    "q8": (Attention(heads=8, kv_heads=2, head_dim=64, v_head_dim=48, scale=0.2), DType.Q8),
    "q8-odd": (Attention(heads=6, kv_heads=2, head_dim=36, v_head_dim=7, scale=0.2), DType.Q8),
    "q8-window-sinks": (
        Attention(heads=4, kv_heads=2, head_dim=16, v_head_dim=32, scale=0.25, window=70, sinks=True),
        DType.Q8,
    ),
    "fp8": (Attention(heads=8, kv_heads=2, head_dim=64, v_head_dim=48, scale=0.2), DType.FP8),
    "fp8-odd": (Attention(heads=6, kv_heads=2, head_dim=36, v_head_dim=7, scale=0.2), DType.FP8),
    "fp8-mla": (
        Attention(heads=16, kv_heads=1, head_dim=80, v_head_dim=64, scale=0.15, shared_kv=True, window=70, sinks=True),
        DType.FP8,
    ),
    "q8-mla": (
        Attention(heads=16, kv_heads=1, head_dim=80, v_head_dim=64, scale=0.15, shared_kv=True, softcap=5.0),
        DType.Q8,
    ),
}


@functools.cache
def _kernel(name: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted(name, isa), isa)


def _emitted(name: str, isa: Isa) -> Kernel:
    a, dtype = VARIANTS[name]
    inputs = [activation("q", "T", a.heads, a.head_dim), cache("k", dtype, a.kv_heads, a.head_dim)]
    inputs += [] if a.shared_kv else [cache("v", dtype, a.kv_heads, a.v_head_dim)]
    inputs += [activation("s", a.heads)] if a.sinks else []
    dims = {"T": ROWS, "slots": SLOTS, "context": CONTEXT}
    return emit(a, inputs, [activation("y", "T", a.heads, a.v_head_dim)], isa, dims)


def test_instruction_sets_of_a_level_share_their_code():
    """So that the others need no runs of their own."""
    for isa in Isa:
        for name in VARIANTS:
            assert code(_emitted(name, isa)) == code(_emitted(name, isa.level))
        for dtype in (DType.F32, DType.BF16, DType.Q8, DType.FP8):
            appends = (
                emit(KvAppend(2, 13), [activation("x", "T", 2, 13), cache("k", dtype, 2, 13)], [], each, {"T": ROWS})
                for each in (isa, isa.level)
            )
            assert len({code(append) for append in appends}) == 1


def _stored(numbers: npt.NDArray[np.float32], dtype: DType) -> npt.NDArray[np.generic]:
    if dtype is DType.Q8:
        return to_q8_cache(numbers)
    if dtype is DType.FP8:
        return to_fp8(numbers)
    return packing.to_bf16_bits(numbers) if dtype is DType.BF16 else numbers


def _draw_cache(rng: np.random.Generator, heads: int, dim: int, dtype: DType) -> npt.NDArray[np.float32]:
    """Numbers that the cache holds exactly: the reference is of what the kernel reads."""
    shape = SLOTS, heads, CONTEXT, dim
    if dtype is DType.Q8:
        return from_q8_cache(to_q8_cache(draw(rng, shape)), CONTEXT, dim)
    if dtype is DType.FP8:
        return from_fp8(to_fp8(draw(rng, shape)))
    numbers = draw(rng, shape)
    return numbers if dtype is DType.F32 else packing.to_f32(packing.to_bf16_bits(numbers))


def _check(name: str, isa: Isa, step: Step, threads: int, seed: int) -> None:
    a, dtype = VARIANTS[name]
    rng = np.random.default_rng(seed)
    assert step.slots is not None
    rows = len(step.slots)
    step.context = CONTEXT
    q, sinks = draw(rng, (rows, a.heads, a.head_dim)), draw(rng, (a.heads,))
    k = _draw_cache(rng, a.kv_heads, a.head_dim, dtype)
    v = k[..., : a.v_head_dim] if a.shared_kv else _draw_cache(rng, a.kv_heads, a.v_head_dim, dtype)
    poison_the_future(k, v, step)
    inputs = [
        q,
        _stored(k, dtype),
        *([] if a.shared_kv else [_stored(v, dtype)]),
        *([sinks] if a.sinks else []),
    ]
    shape = (rows, a.heads, a.v_head_dim)
    kernel = _kernel(name, isa)
    (y,) = kernel(inputs, [shape], rows=rows, threads=threads, step=step)
    want, bound = attention_reference(a, *(n.astype(np.float64) for n in (q, k, v, sinks)), step)
    assert (np.abs(y - want) <= bound).all()
    (alone,) = kernel(inputs, [shape], rows=rows, threads=1, step=step)
    np.testing.assert_array_equal(y, alone)


@st.composite
def _steps(draw_: st.DrawFn) -> Step:
    """Tokens of one to three slots, each slot's tokens adjacent and at rising positions."""
    positions, slots = [], []
    for slot in draw_(st.permutations(range(SLOTS)))[: draw_(st.integers(1, SLOTS))]:
        tokens = draw_(st.one_of(st.just(1), st.integers(1, 40)))
        past = draw_(st.one_of(st.integers(0, 5), st.integers(0, CONTEXT - tokens)))
        positions += range(past, past + tokens)
        slots += [slot] * tokens
    return Step(np.array(positions, np.int32), np.array(slots, np.int32))


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("name", list(VARIANTS))
@settings(max_examples=12, deadline=None)
@given(step=_steps(), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_attention(isa, name, step, threads, seed):
    _check(name, isa, step, threads, seed)


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize(("past", "tokens"), [(0, ROWS), (500, 100), (CONTEXT - 1, 1), (0, 1), (62, 8)], ids=str)
def test_prefill_and_decode_of_one_sequence(isa, past, tokens):
    positions = np.arange(past, past + tokens, dtype=np.int32)
    for name in ("gqa", "window-sinks", "direct-bf16", "q8", "q8-mla", "fp8", "fp8-mla"):
        _check(name, isa, Step(positions, np.ones(tokens, np.int32)), 2, past)


def test_scores_far_apart_do_not_overflow():
    a, _ = VARIANTS["gqa"]
    rng = np.random.default_rng(0)
    k = draw(rng, (SLOTS, a.kv_heads, CONTEXT, a.head_dim)) * np.float32(300)
    v = draw(rng, (SLOTS, a.kv_heads, CONTEXT, a.v_head_dim))
    for tokens in (1, 20):
        q = draw(rng, (tokens, a.heads, a.head_dim)) * np.float32(300)
        positions = np.arange(600, 600 + tokens, dtype=np.int32)
        step = Step(positions, np.zeros(tokens, np.int32), context=CONTEXT)
        (y,) = _kernel("gqa", isas_here()[-1])([q, k, v], [(tokens, a.heads, a.v_head_dim)], rows=tokens, step=step)
        for t in range(tokens):
            for h in range(a.heads):
                best = np.argmax(k[0, h // 3, : positions[t] + 1].astype(np.float64) @ q[t, h])
                np.testing.assert_allclose(y[t, h], v[0, h // 3, best], rtol=1e-5, atol=1e-6)


@functools.cache
def _append(dtype: DType, dim: int, isa: Isa) -> CompiledKernel:
    inputs = [activation("x", "T", 2, dim), cache("k", dtype, 2, dim)]
    return build(KvAppend(2, dim), inputs, [], isa, {"T": ROWS})


def _cache_bytes(dtype: DType, dim: int) -> int:
    return cache("k", dtype, 2, dim).type.bytes({"slots": SLOTS, "context": CONTEXT})


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@settings(max_examples=15, deadline=None)
@given(step=_steps(), threads=st.integers(1, 3))
def test_kv_append(dtype, isa, step, threads):
    step.context = CONTEXT
    rows = len(step.slots)
    x = draw(np.random.default_rng(0), (rows, 2, 13))
    size = _cache_bytes(dtype, 13)
    want = np.random.default_rng(1).integers(0, 255, size, np.uint8)
    state = aligned(size)
    state[:] = want
    _append(dtype, 13, isa)([x, state], [], rows=rows, threads=threads, step=step, in_place=[1])
    typed = want.view(np.float32 if dtype is DType.F32 else np.uint16).reshape(SLOTS, 2, CONTEXT, 13)
    typed[step.slots, :, step.positions] = _stored(x, dtype)
    np.testing.assert_array_equal(state, want)


def _scale_bytes(context: int, dim: int) -> slice:
    """Where the scales of a slot's head are."""
    return slice(context * -(-dim // 32) * 32, None)


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("dim", [13, 32, 80, 128])
@settings(max_examples=8, deadline=None)
@given(step=_steps(), threads=st.integers(1, 3), exponent=st.integers(-9, 5))
def test_kv_append_in_q8(dim, isa, step, threads, exponent):
    """Every byte of codes and scales, and nothing else, is written; numbers come back to half a scale."""
    step.context = CONTEXT
    rows = len(step.slots)
    x = draw(np.random.default_rng(0), (rows, 2, dim)) * np.float32(10.0**exponent)
    x[0, 0, : min(dim, 32)] = 0
    size = _cache_bytes(DType.Q8, dim)
    state = aligned(size)
    state[:] = 0x55
    _append(DType.Q8, dim, isa)([x, state], [], rows=rows, threads=threads, step=step, in_place=[1])
    numbers = np.zeros((SLOTS, 2, CONTEXT, dim), np.float32)
    numbers[step.slots, :, step.positions] = x
    want = to_q8_cache(numbers)
    split = _scale_bytes(CONTEXT, dim).start
    written = np.zeros((SLOTS, CONTEXT), bool)
    written[step.slots, step.positions] = True
    for part in (slice(None, split), slice(split, None)):
        rows_of = want[..., part].reshape(SLOTS, 2, CONTEXT, -1)
        rows_of[np.broadcast_to(~written[:, None], rows_of.shape[:-1])] = 0x55
        want[..., part] = rows_of.reshape(SLOTS, 2, -1)
    got = state.reshape(SLOTS, 2, -1)
    np.testing.assert_array_equal(got, want)
    read = from_q8_cache(got, CONTEXT, dim)[step.slots, :, step.positions]
    scales = np.ascontiguousarray(got[..., split:]).view(np.float16).reshape(SLOTS, 2, CONTEXT, -1)
    half = np.repeat(scales[step.slots, :, step.positions].astype(np.float64), 32, -1)[..., :dim] / 2
    assert (np.abs(read - x.astype(np.float64)) <= half * (1 + 127 * EPS)).all()


def test_kv_append_keeps_nan_and_infinity():
    x = np.zeros((1, 2, 13), np.float32)
    x[0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    x[0, 1, 0] = np.array([0x7F800001], np.uint32).view(np.float32)[0]  # rounding its mantissa gives infinity
    state = aligned(_cache_bytes(DType.BF16, 13))
    step = Step(np.array([5], np.int32), np.array([1], np.int32), context=CONTEXT)
    _append(DType.BF16, 13, isas_here()[-1])([x, state], [], rows=1, step=step, in_place=[1])
    got = packing.to_f32(state.view(np.uint16).reshape(SLOTS, 2, CONTEXT, 13)[1, :, 5])
    np.testing.assert_array_equal(got, x[0])


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_q8_cannot_hold_becomes_nan_in_its_group_alone(isa, bad):
    """3e38 / 127 is beyond fp16: loud, not clipped."""
    x = draw(np.random.default_rng(2), (1, 2, 80))
    x[0, 1, 40] = bad
    state = aligned(_cache_bytes(DType.Q8, 80))
    step = Step(np.array([5], np.int32), np.array([1], np.int32), context=CONTEXT)
    _append(DType.Q8, 80, isa)([x, state], [], rows=1, step=step, in_place=[1])
    with np.errstate(invalid="ignore"):
        got = from_q8_cache(state.reshape(SLOTS, 2, -1), CONTEXT, 80)[1, :, 5]
    assert np.isnan(got[1, 32:64]).all()
    assert np.isfinite(got[0]).all()
    assert np.isfinite(got[1, :32]).all()
    assert np.isfinite(got[1, 64:]).all()


@pytest.mark.parametrize("isa", weakest_and_best())
def test_every_number_that_fp8_can_meet(isa):
    """All codes, the numbers half-way between two of them, what lies beside these, and what is beyond the range."""
    codes = from_fp8(np.arange(127, dtype=np.uint8))
    halves = (codes[1:] + codes[:-1]) / 2
    numbers = np.concatenate(
        [codes, halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(0))]
    )
    numbers = np.concatenate([numbers, [448.1, 463.9, 464.1, 1e6, 3e38, np.inf, np.nan, 1e-9, 1e-45]]).astype(
        np.float32
    )
    numbers = np.concatenate([numbers, -numbers])
    x = np.zeros((2, 2, len(numbers)), np.float32)
    x[0, 1] = numbers
    state = aligned(_cache_bytes(DType.FP8, len(numbers)))
    state[:] = 0
    step = Step(np.array([5, 6], np.int32), np.array([1, 0], np.int32), context=CONTEXT)
    _append(DType.FP8, len(numbers), isa)([x, state], [], rows=2, step=step, in_place=[1])
    got = state.reshape(SLOTS, 2, CONTEXT, -1)[1, 1, 5]
    np.testing.assert_array_equal(from_fp8(got), from_fp8(to_fp8(numbers)))
    assert (got[~np.isnan(numbers)] >> 7 == np.signbit(numbers[~np.isnan(numbers)])).all()
    assert from_fp8(got).max(initial=0, where=np.isfinite(from_fp8(got))) == 448
