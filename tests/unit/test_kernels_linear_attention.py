"""Generated kernels of causal_conv and gated_delta against numpy in float64, and against transformers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.ir.ops import CausalConv, GatedDelta
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.ir.types import DType, TensorType
from tests.reference.kernel_harness import (
    CompiledKernel,
    Step,
    activation,
    aligned,
    code,
    emit,
    isas_here,
    weakest_and_best,
)
from tests.reference.kernel_numbers import EPS, Floats, draw
from tests.reference.linear_attention_reference import causal_conv_reference, gated_delta_reference

SLOTS, ROWS = 3, 64
CONVS = {
    # Whole panels; and several tasks, the last of a panel and a bit.
    "whole": CausalConv(channels=32, width=4),
    "tails": CausalConv(channels=275, width=3, function="none", bias=True),
}
DELTAS = {
    "whole": GatedDelta(k_heads=1, v_heads=2, k_dim=16, v_dim=64, scale=0.25, l2_eps=1e-6),
    # Gates of more than 16 heads, heads of one key in two lots of them, a block of which the last panel has no column.
    "tails": GatedDelta(k_heads=6, v_heads=18, k_dim=21, v_dim=41, scale=21**-0.5, l2_eps=1e-6),
    "narrow": GatedDelta(k_heads=2, v_heads=2, k_dim=3, v_dim=5, scale=1.0),
}


@functools.cache
def _conv(name: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted_conv(CONVS[name], isa), isa)


@functools.cache
def _delta(name: str, isa: Isa) -> CompiledKernel:
    return CompiledKernel(_emitted_delta(DELTAS[name], isa), isa)


def _state(*shape: int) -> Value:
    return Value("s", TensorType(DType.F32, ("slots", *shape)), ValueKind.STATE)


def _emitted_conv(a: CausalConv, isa: Isa) -> Kernel:
    inputs = [activation("x", "T", a.channels), activation("w", a.channels, 1, a.width)]
    inputs += [_state(a.width - 1, a.channels), *([activation("b", a.channels)] if a.bias else [])]
    return emit(a, inputs, [activation("y", "T", a.channels)], isa, {"T": ROWS, "slots": SLOTS})


def _emitted_delta(a: GatedDelta, isa: Isa) -> Kernel:
    inputs = [activation("qkv", "T", 2 * a.k_heads * a.k_dim + a.v_heads * a.v_dim)]
    inputs += [activation(i, "T", a.v_heads) for i in ("a", "b")] + [activation(i, a.v_heads) for i in ("l", "d")]
    inputs += [_state(a.v_heads, a.k_dim, a.v_dim)]
    return emit(a, inputs, [activation("y", "T", a.v_heads, a.v_dim)], isa, {"T": ROWS, "slots": SLOTS})


def test_instruction_sets_of_a_level_share_their_code():
    """So that the others need no runs of their own."""
    for isa in Isa:
        for conv in CONVS.values():
            assert code(_emitted_conv(conv, isa)) == code(_emitted_conv(conv, isa.level))
        for delta in DELTAS.values():
            assert code(_emitted_delta(delta, isa)) == code(_emitted_delta(delta, isa.level))


def _kept(numbers: Floats) -> Floats:
    """An aligned copy that a kernel may change."""
    copy = aligned(numbers.nbytes).view(np.float32).reshape(numbers.shape)
    copy[...] = numbers
    return copy


@dataclass
class _Case:
    """What an op computes with: ``inputs`` in the order of the kernel's, of which those of ``by_row`` have rows and
    ``state`` is the state; ``width`` of a row of the result. ``history``: rows of a state that are the last rows."""

    kernel: CompiledKernel
    inputs: list[Floats]
    by_row: tuple[int, ...]
    state: int
    width: int
    history: bool

    def run(self, step: Step, threads: int, rows: slice | list[int] = slice(None)) -> Floats:
        """The result for ``rows`` of the inputs, of which ``step`` tells; the state is changed. What is stored and
        counts for nothing, for it is of positions below 0, is NaN."""
        assert step.positions is not None
        assert step.slots is not None
        stored = self.inputs[self.state]
        for slot in np.unique(step.slots):
            first = step.positions[step.slots == slot][0]
            stored[slot, : max(0, stored.shape[1] - first) if self.history else len(stored[slot]) * (first == 0)] = np.nan
        cut = [x[rows] if i in self.by_row else x for i, x in enumerate(self.inputs)]
        shape = len(step.slots), self.width
        (y,) = self.kernel(cut, [shape], rows=shape[0], threads=threads, step=step, in_place=[self.state])
        return y

    def again(self) -> _Case:
        """The same with a state of its own."""
        inputs = [_kept(x) if i == self.state else x for i, x in enumerate(self.inputs)]
        return replace(self, inputs=inputs)


def _conv_case(name: str, isa: Isa, rows: int, seed: int) -> _Case:
    a, rng = CONVS[name], np.random.default_rng(seed)
    state = _kept(draw(rng, (SLOTS, a.width - 1, a.channels)))
    inputs = [draw(rng, (rows, a.channels)), draw(rng, (a.channels, 1, a.width)), state]
    inputs += [draw(rng, (a.channels,))] if a.bias else []
    return _Case(_conv(name, isa), inputs, (0,), 2, a.channels, history=True)


def _delta_case(name: str, isa: Isa, rows: int, seed: int) -> _Case:
    a, rng = DELTAS[name], np.random.default_rng(seed)
    gates = [draw(rng, (rows, a.v_heads)) * np.float32(3) for _ in ("a", "b")]
    # As checkpoints have them: exp(a_log) in 1 .. 16.
    per_head = [np.log(rng.uniform(1, 16, a.v_heads)).astype(np.float32), draw(rng, (a.v_heads,)) - np.float32(3)]
    qkv = draw(rng, (rows, 2 * a.k_heads * a.k_dim + a.v_heads * a.v_dim))
    state = _kept(draw(rng, (SLOTS, a.v_heads, a.k_dim, a.v_dim)))
    return _Case(_delta(name, isa), [qkv, *gates, *per_head, state], (0, 1, 2), 5, a.v_heads * a.v_dim, history=False)


@st.composite
def _steps(draw_: st.DrawFn) -> Step:
    """Rows of one to three slots, each slot's adjacent and at rising positions."""
    positions: list[int] = []
    slots: list[int] = []
    for slot in draw_(st.permutations(range(SLOTS)))[: draw_(st.integers(1, SLOTS))]:
        rows = draw_(st.one_of(st.just(1), st.integers(1, 20)))
        past = draw_(st.integers(0, 5))
        positions += range(past, past + rows)
        slots += [slot] * rows
    return Step(np.array(positions, np.int32), np.array(slots, np.int32))


def _doubles(inputs: list[Floats]) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in inputs]


_PROPERTY = settings(max_examples=12, deadline=None)


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("name", list(CONVS))
@_PROPERTY
@given(step=_steps(), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_causal_conv(isa, name, step, threads, seed):
    a, case = CONVS[name], _conv_case(name, isa, len(step.slots), seed)
    x, weight, state, *bias = _doubles(case.inputs)
    want, bound = causal_conv_reference(a, x, weight, state, *(bias or [np.zeros(a.channels)]), step)
    assert (np.abs(case.run(step, threads) - want) <= bound).all()
    np.testing.assert_array_equal(case.inputs[2], state)  # of other slots, too


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("name", list(DELTAS))
@_PROPERTY
@given(step=_steps(), threads=st.integers(1, 3), seed=st.integers(0, 999))
def test_gated_delta(isa, name, step, threads, seed):
    a, case = DELTAS[name], _delta_case(name, isa, len(step.slots), seed)
    before = case.inputs[5].copy()
    *inputs, state = _doubles(case.inputs)
    want, bound, errors = gated_delta_reference(a, *inputs, state, step)
    y = case.run(step, threads).reshape(want.shape)
    assert (np.abs(y - want) <= bound).all()
    assert (np.abs(case.inputs[5] - state) <= errors[:, :, None]).all()
    others = np.setdiff1d(np.arange(SLOTS), step.slots)
    np.testing.assert_array_equal(case.inputs[5][others], before[others])


@pytest.mark.parametrize("isa", weakest_and_best())
@pytest.mark.parametrize("make", [_conv_case, _delta_case])
@_PROPERTY
@given(
    name=st.sampled_from(["whole", "tails"]),
    cuts=st.sets(st.integers(1, 23), max_size=6),
    past=st.integers(0, 2),
    threads=st.integers(1, 3),
)
def test_a_prompt_in_pieces_gives_the_bytes_of_the_whole(isa, make, name, cuts, past, threads):
    """And so do its rows one at a time, in steps with other sequences' rows before and behind: decode is prefill."""
    rows = 24
    case = make(name, isa, rows, past)
    pieces, alone = case.again(), case.again()
    whole = case.run(_rows(past, rows), threads)
    edges = [0, *sorted(cuts), rows]
    parts = [
        pieces.run(_rows(past + first, last - first), 1, slice(first, last))
        for first, last in zip(edges, edges[1:], strict=False)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(pieces.inputs[case.state], case.inputs[case.state])
    batch = [_beside_others(alone, past, t) for t in range(rows)]
    np.testing.assert_array_equal(np.stack(batch), whole)
    np.testing.assert_array_equal(alone.inputs[case.state][1], case.inputs[case.state][1])


def _rows(first: int, rows: int) -> Step:
    return Step(np.arange(first, first + rows, dtype=np.int32), np.ones(rows, np.int32))


def _beside_others(case: _Case, past: int, t: int) -> Floats:
    """Row t of slot 1 in a step in which slots 0 and 2 have rows with the same numbers."""
    step = Step(np.array([7, past + t, 9], np.int32), np.array([2, 1, 0], np.int32))
    return case.run(step, 2, [t] * 3)[1]


@pytest.mark.parametrize("isa", weakest_and_best())
def test_decays_near_0_and_1_and_keys_of_zero(isa):
    """States are forgotten at once, or kept; a key of zero length neither reads nor writes."""
    a, case = DELTAS["whole"], _delta_case("whole", isa, 6, 1)
    qkv, gate, *_ = case.inputs
    gate[:3], gate[3:] = 60.0, -60.0
    qkv[4, 16:32] = 0.0
    *inputs, state = _doubles(case.inputs)
    want, bound, errors = gated_delta_reference(a, *inputs, state, _rows(3, 6))
    y = case.run(_rows(3, 6), 1).reshape(want.shape)
    assert (np.abs(y - want) <= bound).all()
    assert (np.abs(case.inputs[5] - state) <= errors[:, :, None]).all()


def test_transformers_agrees():
    """Both of its forms; the chunked one adds up in another order, in chunks of 64 rows."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs  # seconds, for this test alone

    name, rows = "whole", 50
    a, case = DELTAS[name], _delta_case(name, isas_here()[-1], rows, 3)
    qkv, gate, b, a_log, dt_bias = (torch.from_numpy(x) for x in case.inputs[:5])
    q, k, v = (
        part.unflatten(-1, (-1, dim))[None]
        for part, dim in zip(qkv.split([a.k_dim, a.k_dim, 2 * a.v_dim], -1), (a.k_dim, a.k_dim, a.v_dim), strict=True)
    )
    q, k = q.repeat_interleave(2, 2), k.repeat_interleave(2, 2)
    g = -a_log.exp() * torch.nn.functional.softplus(gate + dt_bias)
    ask = {"g": g[None], "beta": b.sigmoid()[None], "initial_state": None, "output_final_state": True}
    y = case.run(_rows(0, rows), 2).reshape(rows, 2, a.v_dim)
    for rule in (theirs.torch_recurrent_gated_delta_rule, theirs.torch_chunk_gated_delta_rule):
        want, state = rule(q, k, v, use_qk_l2norm_in_kernel=True, **ask)
        # Both round; a chunk's exponents are sums of up to 64 rows' and as large as these.
        limit = EPS * (4 + np.sqrt(a.k_dim) + np.abs(g.sum(0).numpy()).max())
        np.testing.assert_allclose(y, want[0].numpy(), rtol=0, atol=limit * np.abs(y).max())
        np.testing.assert_allclose(case.inputs[5][1], state[0].numpy(), rtol=0, atol=limit * state.abs().max())
