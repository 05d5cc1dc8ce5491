"""GPU kernels of attention and kv_append, interpreted, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.ops import Attention, KvAppend
from hetcomp.ir.types import DType
from tests.reference.attention_reference import attention_reference, poison_the_future
from tests.reference.cache_blocks import cache_block, from_blocks, to_blocks
from tests.reference.kernel_harness import Step, activation, cache
from tests.reference.kernel_numbers import draw, from_fp8, to_fp8
from tests.reference.triton_harness import emit, request, run

CONTEXT, SLOTS = 700, 3
VARIANTS = {
    "gqa": (Attention(heads=6, kv_heads=2, head_dim=36, v_head_dim=36, scale=0.2), DType.F32),
    "gqa-bf16": (Attention(heads=8, kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125), DType.BF16),
    "window-sinks": (
        Attention(heads=4, kv_heads=2, head_dim=16, v_head_dim=32, scale=0.25, window=70, sinks=True),
        DType.BF16,
    ),
    "softcap": (Attention(heads=2, kv_heads=2, head_dim=9, v_head_dim=5, scale=0.9, softcap=3.0), DType.F32),
    "mla": (
        Attention(heads=20, kv_heads=1, head_dim=40, v_head_dim=32, scale=0.15, shared_kv=True, sinks=True),
        DType.BF16,
    ),
    "many-heads": (Attention(heads=40, kv_heads=1, head_dim=8, v_head_dim=16, scale=0.3), DType.F32),
    "fp8": (Attention(heads=6, kv_heads=2, head_dim=36, v_head_dim=20, scale=0.2), DType.FP8),
    "fp8-window-sinks": (
        Attention(heads=4, kv_heads=2, head_dim=16, v_head_dim=32, scale=0.25, window=70, sinks=True),
        DType.FP8,
    ),
    "fp8-mla": (
        Attention(heads=20, kv_heads=1, head_dim=40, v_head_dim=32, scale=0.15, shared_kv=True, softcap=5.0),
        DType.FP8,
    ),
    "wide": (Attention(heads=2, kv_heads=1, head_dim=288, v_head_dim=272, scale=0.06), DType.BF16),
}
BF16_ROUNDING = 2.0**-8  # of a query's element and of a probability; half of it is what rounding to nearest does


def _check(name: str, step: Step, exact: bool, seed: int = 0) -> None:
    a, dtype = VARIANTS[name]
    rng = np.random.default_rng(seed)
    assert step.slots is not None
    rows, step.context = len(step.slots), CONTEXT
    q, sinks = draw(rng, (rows, a.heads, a.head_dim)), draw(rng, (a.heads,))
    k, v = (_stored(draw(rng, (SLOTS, a.kv_heads, CONTEXT, d)), dtype) for d in (a.head_dim, a.v_head_dim))
    if a.shared_kv:
        v = k[..., : a.v_head_dim]
    poison_the_future(k, v, step)
    caches = [k] if a.shared_kv else [k, v]
    stored = [_bits(c, dtype) for c in caches]
    operands = [activation("q", "T", a.heads, a.head_dim), cache("k", dtype, a.kv_heads, a.head_dim)]
    operands += [] if a.shared_kv else [cache("v", dtype, a.kv_heads, a.v_head_dim)]
    operands += [activation("s", a.heads)] * a.sinks
    dims = {"T": rows + 5, "slots": SLOTS, "context": CONTEXT}
    outputs = [activation("y", "T", a.heads, a.v_head_dim)]
    asked = request(a, operands, outputs, dims, rows if exact else None)
    arrays = [to_blocks(c, cache_block(operands)) for c in stored]
    shape = rows, a.heads, a.v_head_dim
    (y,) = run(
        asked,
        [q, *arrays, *([sinks] if a.sinks else [])],
        [(shape, np.float32)],
        rows=rows,
        step=step,
        grid_rows=rows if exact else rows + 5,
    )
    rounding = BF16_ROUNDING if dtype is not DType.F32 else 0.0
    want, bound = attention_reference(a, *(n.astype(np.float64) for n in (q, k, v, sinks)), step, rounding)
    # Scores are scaled once more, to units of log 2: a rounding that the reference's bound does not count.
    assert (np.abs(y - want) <= 1.5 * bound).all()


def _stored(numbers: np.ndarray, dtype: DType) -> np.ndarray:
    """Numbers that the cache holds exactly."""
    if dtype is DType.FP8:
        return from_fp8(to_fp8(numbers))
    return packing.to_f32(packing.to_bf16_bits(numbers)) if dtype is DType.BF16 else numbers


def _bits(numbers: np.ndarray, dtype: DType) -> np.ndarray:
    """What the cache holds of numbers, as whole numbers."""
    if dtype is DType.FP8:
        return to_fp8(numbers)
    return packing.to_bf16_bits(numbers) if dtype is DType.BF16 else numbers.view(np.uint32)


def _step(*runs: tuple[int, int, int]) -> Step:
    """Tokens of runs (slot, first position, count)."""
    positions = np.concatenate([np.arange(first, first + count) for _, first, count in runs])
    slots = np.concatenate([np.full(count, slot) for slot, _, count in runs])
    return Step(positions.astype(np.int32), slots.astype(np.int32))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("runs", [((1, 0, 1),), ((2, 699, 1), (0, 3, 1), (1, 300, 1))], ids=["first", "three slots"])
def test_decode(name, runs):
    _check(name, _step(*runs), True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "runs",
    [((1, 0, 33),), ((2, 300, 40),), ((2, 500, 11), (0, 0, 3), (1, 240, 6))],
    ids=["one prompt", "behind many keys", "three slots"],
)
def test_prefill(name, runs):
    _check(name, _step(*runs), False)


def test_exact_steps_of_many_tokens_use_the_prefill_kernel():
    step = _step((0, 5, 17))
    _check("gqa-bf16", step, True)


def test_scores_far_apart_do_not_overflow():
    a, _ = VARIANTS["gqa"]
    rng = np.random.default_rng(0)
    k = draw(rng, (SLOTS, a.kv_heads, CONTEXT, a.head_dim)) * np.float32(300)
    v = draw(rng, (SLOTS, a.kv_heads, CONTEXT, a.v_head_dim))
    for tokens in (1, 20):
        q = draw(rng, (tokens, a.heads, a.head_dim)) * np.float32(300)
        step = _step((0, 600, tokens))
        step.context = CONTEXT
        operands = [activation("q", "T", a.heads, a.head_dim)]
        operands += [cache(n, DType.F32, a.kv_heads, a.head_dim) for n in "kv"]
        asked = request(a, operands, [activation("y", "T", a.heads, a.v_head_dim)], {"context": CONTEXT}, tokens)
        caches = [to_blocks(c, cache_block(operands)) for c in (k, v)]
        (y,) = run(asked, [q, *caches], [((tokens, a.heads, a.v_head_dim), np.float32)], rows=tokens, step=step)
        for t in range(tokens):
            for h in range(a.heads):
                best = np.argmax(k[0, h // 3, : 601 + t].astype(np.float64) @ q[t, h])
                np.testing.assert_allclose(y[t, h], v[0, h // 3, best], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.FP8])
@pytest.mark.parametrize("exact", [True, False])
def test_kv_append(dtype, exact):
    step = _step((2, 7, 3), (0, 0, 1))
    step.context = CONTEXT
    rng = np.random.default_rng(0)
    x = draw(rng, (4, 2, 13))
    # Of e4m3 every NaN is one.
    x[0, 0, :4] = [np.nan, np.inf, -np.inf if dtype is not DType.FP8 else 1e9, -0.0]
    state = rng.integers(0, 1 << 7, (SLOTS, 2, CONTEXT, 13)).astype(_bits(x, dtype).dtype)
    want = state.copy()
    want[step.slots, :, step.positions] = _bits(x, dtype)
    operands = [activation("x", "T", 2, 13), cache("k", dtype, 2, 13)]
    asked = request(KvAppend(2, 13), operands, [], {"T": 9}, 4 if exact else None)
    after, wanted = (to_blocks(c, cache_block(operands)) for c in (state, want))
    run(asked, [x, after], [], rows=4, step=step, grid_rows=4 if exact else 9, changed={1: after})
    np.testing.assert_array_equal(after, wanted)  # and between the states nothing is written


def test_every_number_that_an_fp8_cache_can_meet():
    """All codes and what lies between and beside them, appended as the CPU appends it."""
    codes = from_fp8(np.arange(127, dtype=np.uint8))
    halves = (codes[1:] + codes[:-1]) / 2
    beside = [np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(0))]
    numbers = np.concatenate([codes, halves, *beside, [448.1, 464.1, 1e6, 3e38, np.inf, 1e-9, 1e-45]])
    x = np.concatenate([numbers, -numbers]).astype(np.float32)[None, None]
    operands = [activation("x", "T", 1, x.size), cache("k", DType.FP8, 1, x.size)]
    after = to_blocks(np.zeros((1, 1, 8, x.size), np.uint8), cache_block(operands))
    step = Step(np.array([3], np.int32), np.array([0], np.int32), context=8)
    run(request(KvAppend(1, x.size), operands, [], {"T": 1}, 1), [x, after], [], rows=1, step=step, changed={1: after})
    got = from_blocks(after, 1, 8, x.size)[0, 0, 3]
    np.testing.assert_array_equal(got & 0x7F, to_fp8(x)[0, 0] & 0x7F)
    np.testing.assert_array_equal(got >> 7, np.signbit(x[0, 0]))


def test_a_q8_cache_is_refused_by_name():
    a, _ = VARIANTS["gqa"]
    operands = [activation("q", "T", 6, 36), *(cache(n, DType.Q8, 2, 36) for n in "kv")]
    with pytest.raises(HetcompError, match=r"model\.layers\.0\.test: state k has dtype q8; expected bf16 or f32 or"):
        emit(request(a, operands, [activation("y", "T", 6, 36)], {"T": 1}, 1))


def test_wide_heads_in_an_f32_cache_are_refused():
    a, _ = VARIANTS["wide"]
    operands = [activation("q", "T", 2, 288), cache("k", DType.F32, 1, 288), cache("v", DType.F32, 1, 272)]
    with pytest.raises(HetcompError, match="heads of 288 in an f32 cache are too wide for a GPU; expected a bf16"):
        emit(request(a, operands, [activation("y", "T", 2, 272)], {"T": 1}, 1))


@pytest.mark.parametrize(("window", "context", "parts"), [(0, 32, 1), (0, 300, 4), (128, 4096, 1), (129, 4096, 2)])
def test_no_part_is_always_without_keys(window, context, parts):
    a = Attention(heads=4, kv_heads=2, head_dim=64, v_head_dim=64, scale=0.1, window=window)
    operands = [activation("q", "T", 4, 64), *(cache(n, DType.F32, 2, 64) for n in "kv")]
    code = emit(request(a, operands, [activation("y", "T", 4, 64)], {"context": context}, 1))
    assert code.launches[0].grid[1].programs(1) == parts
