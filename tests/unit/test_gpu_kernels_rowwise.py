"""GPU kernels of norms, rotary embedding, routing, elementwise ops and row selection, interpreted, against
the plan interpreter's meaning of each op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.gpu.argmax import argmax
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference import plan_interpreter
from tests.reference.kernel_harness import Step, activation
from tests.reference.kernel_numbers import draw
from tests.reference.triton_harness import emit, request, run

DIMS = {"T": 64, "R": 64}
FEW = settings(max_examples=6, deadline=None)
COUNTS = st.one_of(st.tuples(st.integers(1, 9), st.just(True)), st.tuples(st.integers(0, 9), st.just(False)))


def _row(id: str, *shape: int) -> Value:
    return activation(id, "T", *shape)


def _ids(id: str, *shape: int) -> Value:
    return Value(id, TensorType(DType.I32, ("T", *shape)), ValueKind.ACT)


def _meaning(attrs: Any, arrays: list[np.ndarray], step: Any = None) -> list[np.ndarray]:
    """What the op means, in float64."""
    tensors = [torch.from_numpy(a.astype(np.float64) if a.dtype == np.float32 else a) for a in arrays]
    made = plan_interpreter._KINDS[attrs.kind](attrs, tensors, step)
    return [t.numpy() for t in (made if isinstance(made, tuple) else (made,))]


def _run(attrs, operands, arrays, outputs, count, step: Step | None = None) -> list[np.ndarray]:
    rows, exact = count
    asked = request(attrs, operands, outputs, DIMS, rows if exact else None)
    shapes = [((rows, *o.type.shape[1:]), np.int32 if o.type.dtype is DType.I32 else np.float32) for o in outputs]
    return run(asked, arrays, shapes, rows=rows, grid_rows=rows if exact else rows + 3, step=step)


@pytest.mark.parametrize(
    ("groups", "width", "offset"), [(1, 1, 0.0), (3, 7, 1.0), (1, 33, 0.0), (10, 128, 1.0), (1, 1500, 0.0)]
)
@FEW
@given(count=COUNTS, seed=st.integers(0, 99))
def test_rms_norm(groups, width, offset, count, seed):
    rng = np.random.default_rng(seed)
    attrs = ops.RmsNorm(width, 1e-5, groups, offset)
    x, w = draw(rng, (count[0], groups * width)), draw(rng, (width,))
    (y,) = _run(attrs, [_row("x", groups * width), activation("w", width)], [x, w], [_row("y", groups * width)], count)
    np.testing.assert_allclose(y, _meaning(attrs, [x, w])[0], rtol=3e-6, atol=1e-7)


def test_rms_norm_of_huge_and_zero_rows():
    x = np.stack([np.full(64, 1e18), np.zeros(64), np.full(64, 1e-30)]).astype(np.float32)
    attrs = ops.RmsNorm(64, 1e-6)
    w = np.ones(64, np.float32)
    (y,) = _run(attrs, [_row("x", 64), activation("w", 64)], [x, w], [_row("y", 64)], (3, True))
    np.testing.assert_allclose(y, [[1] * 64, [0] * 64, [1e-27] * 64], rtol=1e-5, atol=0)


@FEW
@given(count=COUNTS, width=st.sampled_from([1, 37, 2100]), seed=st.integers(0, 99))
def test_layer_norm_of_numbers_far_from_zero(count, width, seed):
    rng = np.random.default_rng(seed)
    x, w, b = draw(rng, (count[0], width)) + np.float32(1000), draw(rng, (width,)), draw(rng, (width,))
    operands = [_row("x", width), activation("w", width), activation("b", width)]
    attrs = ops.LayerNorm(width, 1e-5)
    (y,) = _run(attrs, operands, [x, w, b], [_row("y", width)], count)
    # The mean of numbers around 1000 is off by a few of their 6e-5, times the weight; the mean of squares less the
    # square of the mean would be off by 0.06.
    np.testing.assert_allclose(y, _meaning(attrs, [x.astype(np.float64), w, b])[0], rtol=0, atol=2e-3)


@FEW
@given(count=COUNTS, half=st.integers(1, 33), start=st.integers(0, 1_000_000))
def test_rope_table(count, half, start):
    attrs = ops.RopeTable(2 * half, 1.25)
    positions = np.arange(start, start + count[0], dtype=np.int32)
    inv_freq = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    outputs = [_row("c", half), _row("s", half)]
    cos, sin = _run(attrs, [_ids("p"), activation("f", half)], [positions, inv_freq], outputs, count)
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angle) * 1.25, rtol=0, atol=4e-7)
    np.testing.assert_allclose(sin, np.sin(angle) * 1.25, rtol=0, atol=4e-7)


@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize(("heads", "dim", "rotary", "offset"), [(3, 10, 4, 3), (1, 2, 2, 0), (40, 64, 64, 0)])
@FEW
@given(count=COUNTS, seed=st.integers(0, 99))
def test_rope(style, heads, dim, rotary, offset, count, seed):
    rng = np.random.default_rng(seed)
    attrs = ops.Rope(heads, dim, rotary, offset, style)
    x = draw(rng, (count[0], heads, dim))
    cos, sin = draw(rng, (count[0], rotary // 2)), draw(rng, (count[0], rotary // 2))
    operands = [_row("x", heads, dim), _row("c", rotary // 2), _row("s", rotary // 2)]
    (y,) = _run(attrs, operands, [x, cos, sin], [_row("y", heads, dim)], count)
    np.testing.assert_allclose(y, _meaning(attrs, [x, cos, sin])[0], rtol=0, atol=2e-6)


ROUTES = [
    ops.Route(60, 4, "softmax", normalise=True),  # Qwen2-MoE
    ops.Route(8, 2, "softmax", normalise=True),  # Mixtral
    ops.Route(32, 4, "topk_softmax", normalise=False),  # GPT-OSS
    ops.Route(
        256, 8, "sigmoid", True, 1e-20, groups=8, top_groups=4, group_score="top2", scaling=2.5, bias=True
    ),  # DeepSeek-V3
    ops.Route(160, 6, "softmax", False, groups=8, top_groups=3, outside_groups="zero", scaling=16.0),  # DeepSeek-V2
    ops.Route(16, 2, "sparse_mixer", normalise=False, jitter=0.01),  # Phi-MoE
    ops.Route(15, 3, "sigmoid", True, groups=3, top_groups=2, bias=True),
    ops.Route(3, 3, "softmax", normalise=False),
    ops.Route(1, 1, "topk_softmax", normalise=False),
]


def _route(attrs: ops.Route, logits: np.ndarray, bias: np.ndarray, count) -> list[np.ndarray]:
    operands = [_row("l", attrs.experts), *([activation("b", attrs.experts)] * attrs.bias)]
    outputs = [_ids("i", attrs.top_k), _row("w", attrs.top_k)]
    return _run(attrs, operands, [logits, *([bias] if attrs.bias else [])], outputs, count)


@pytest.mark.parametrize("attrs", ROUTES, ids=lambda a: f"{a.scoring}-{a.top_k}of{a.experts}-{a.groups}")
@FEW
@given(count=COUNTS, seed=st.integers(0, 99))
def test_route(attrs, count, seed):
    rng = np.random.default_rng(seed)
    logits, bias = draw(rng, (count[0], attrs.experts)) * np.float32(2), draw(rng, (attrs.experts,))
    ids, weights = _route(attrs, logits, bias, count)
    want_ids, want = _meaning(attrs, [logits, bias])
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("attrs", ROUTES, ids=lambda a: f"{a.scoring}-{a.top_k}of{a.experts}-{a.groups}")
def test_equal_scores_go_to_the_lower_expert(attrs):
    logits, bias = np.zeros((2, attrs.experts), np.float32), np.zeros(attrs.experts, np.float32)
    logits[1, ::2] = 1.0
    ids, _ = _route(attrs, logits, bias, (2, True))
    np.testing.assert_array_equal(ids, _meaning(attrs, [logits, bias])[0])


@pytest.mark.parametrize(
    ("attrs", "inputs", "width"),
    [
        (ops.Glu(37), (37, 37), 37),
        (ops.Glu(1500, "swiglu_oai", 1.702, 2.0), (1500, 1500), 1500),
        (ops.Glu(5, "gelu_tanh"), (5, 5), 5),
        *((ops.Activation(f), (37,), 37) for f in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")),
        (ops.Add(), (1500, 1500), 1500),
        (ops.Mul(), (37, 37), 37),
        (ops.Mul(), (37, 1), 37),
        (ops.Scale(0.3), (37,), 37),
        (ops.Slice(3, 20), (37,), 17),
        (ops.Concat(), (5, 12, 20), 37),
    ],
    ids=lambda v: v.kind + getattr(v, "function", "") if hasattr(v, "kind") else str(v),
)
@FEW
@given(count=COUNTS, seed=st.integers(0, 99))
def test_elementwise(attrs, inputs, width, count, seed):
    rng = np.random.default_rng(seed)
    arrays = [draw(rng, (count[0], w)) * np.float32(3) for w in inputs]
    (y,) = _run(attrs, [_row(f"x{i}", w) for i, w in enumerate(inputs)], arrays, [_row("y", width)], count)
    np.testing.assert_allclose(y, _meaning(attrs, arrays)[0], rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("count", [(3, True), (3, False)])
def test_slice_and_concat_of_heads(count):
    """The last axis is cut; an input of one head is repeated over the heads of the others."""
    rng = np.random.default_rng(0)
    x, shared = draw(rng, (3, 4, 10)), draw(rng, (3, 1, 6))
    (y,) = _run(ops.Slice(2, 9), [_row("x", 4, 10)], [x], [_row("y", 4, 7)], count)
    np.testing.assert_array_equal(y, x[..., 2:9])
    (y,) = _run(ops.Concat(), [_row("x", 4, 10), _row("s", 1, 6)], [x, shared], [_row("y", 4, 16)], count)
    np.testing.assert_array_equal(y, np.concatenate([x, np.repeat(shared, 4, 1)], -1))


@FEW
@given(count=COUNTS, width=st.sampled_from([1, 19, 1500]))
def test_select_rows(count, width):
    rng = np.random.default_rng(0)
    x, chosen = draw(rng, (12, width)), rng.integers(0, 12, count[0]).astype(np.int32)
    outputs = [activation("y", "R", width)]
    (y,) = _run(ops.SelectRows(), [_row("x", width)], [x], outputs, count, Step(logit_rows=chosen))
    np.testing.assert_array_equal(y, x[chosen])


def test_what_has_no_kernel_is_refused_by_name():
    asked = request(ops.Transfer("cpu", "gpu"), [_row("x", 3)], [_row("y", 3)], DIMS)
    with pytest.raises(HetcompError, match=r"compile model\.layers\.0\.test: there is no GPU kernel for 'transfer'"):
        emit(asked)


@pytest.mark.parametrize("vocab", [1, 700, 1024, 2500])
@FEW
@given(count=COUNTS, seed=st.integers(0, 99))
def test_argmax_is_the_first_of_the_largest(vocab, count, seed):
    rng = np.random.default_rng(seed)
    rows, exact = count
    logits = rng.integers(-40, 40, (rows, vocab)).astype(np.float32)  # with ties
    (best,) = run(argmax(vocab, max(rows, 1), exact), [logits], [((rows,), np.int32)], rows=rows)
    np.testing.assert_array_equal(best, logits.argmax(axis=-1) if rows else [])


@pytest.mark.parametrize(("value", "finds"), [(np.nan, -1), (np.inf, -1), (-np.inf, 3)])
def test_argmax_tells_of_logits_that_are_not_finite(value, finds):
    logits = np.zeros((2, 2000), np.float32)
    logits[:, 3] = 1
    logits[0, 1500] = value
    (best,) = run(argmax(2000, 2, True), [logits], [((2,), np.int32)], rows=2)
    assert best.tolist() == [finds, 3]
    (best,) = run(argmax(2000, 1, True), [np.full((1, 2000), -np.inf, np.float32)], [((1,), np.int32)], rows=1)
    assert best.tolist() == [-1]
