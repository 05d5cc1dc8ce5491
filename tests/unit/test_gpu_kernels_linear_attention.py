"""GPU kernels of the causal convolution and the gated delta rule, interpreted, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from hetcomp.backends.gpu.linear_attention import CHUNK
from hetcomp.errors import HetcompError
from hetcomp.ir import ops
from hetcomp.ir.plan import Value, ValueKind
from tests.reference.kernel_harness import Step, activation, state
from tests.reference.kernel_numbers import EPS, draw
from tests.reference.triton_harness import emit, request, run

SLOTS = 4
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """A step's runs of rows of a slot each: slot, first position, rows. ``exact``: as a graph for exactly as many.
    ``f32``: of a plan in which nothing may be rounded."""

    runs: tuple[tuple[int, int, int], ...]
    exact: bool
    f32: bool = False

    @property
    def count(self) -> int:
        return sum(rows for _, _, rows in self.runs)

    def step(self) -> Step:
        slots = [slot for slot, _, rows in self.runs for _ in range(rows)]
        positions = [first + i for _, first, rows in self.runs for i in range(rows)]
        return Step(positions=np.array(positions, np.int32), slots=np.array(slots, np.int32))


# Decode; a short prompt, others' next tokens behind it, rows that pad; rows beginning and going on; a batch too large
# for an exact graph; none; a prompt in f32.
MIXED = (
    Rows(((2, 7, 1),), True),
    Rows(((1, 0, 4), (0, 3, 1), (2, 1, 2)), True),
    Rows(((0, 0, 1), (SLOTS, 0, 1), (SLOTS, 0, 1), (SLOTS, 0, 1)), True),
    Rows(((3, 0, 1), (1, 9, 3), (0, 1, 37), (2, 0, 2)), False),
    Rows((), False),
    Rows(((1, 3, 21),), False, f32=True),
)


def _run(attrs, operands, arrays, states, rows: Rows, width: int) -> tuple[Floats, Floats]:
    """The op's result and the states behind it. What nobody may read of the states is NaN."""
    y = activation("y", "T", width)
    asked = request(attrs, operands, [y], {"T": 200}, rows.count if rows.exact else None, f32=rows.f32)
    changed = states.copy()
    at = next(i for i, value in enumerate(operands) if value.kind is ValueKind.STATE)
    given_ = [*arrays[:at], changed, *arrays[at:]]
    count = rows.count
    grid = count if rows.exact else 200
    (result,) = run(
        asked,
        given_,
        [((count, width), np.float32)],
        rows=count,
        grid_rows=grid,
        step=rows.step(),
        changed={at: changed},
    )
    return result, changed


def _states(rng: np.random.Generator, rows: Rows, *shape: int) -> Floats:
    """States of all slots and of the rows of nobody: NaN where a sequence begins, and of slots without rows."""
    states = np.full((SLOTS + 1, *shape), np.nan, np.float32)
    for slot, first, _ in rows.runs:
        if first > 0:
            states[slot] = draw(rng, shape)
    return states


CONVOLUTIONS = ((5, 4, "silu", False), (70, 2, "none", True), (130, 3, "silu", True))  # channels, width, function, bias


@pytest.mark.parametrize(
    ("channels", "width", "function", "bias", "rows"),
    [
        *((*CONVOLUTIONS[i % 3], rows) for i, rows in enumerate(MIXED)),
        *((*CONVOLUTIONS[0], rows) for rows in (MIXED[1], MIXED[3])),
        (*CONVOLUTIONS[1], Rows(((1, 5, 80),), False)),
        (*CONVOLUTIONS[2], Rows(((1, 0, 33),), False)),
    ],
    ids=str,
)
def test_causal_conv(channels, width, function, bias, rows):
    rng = np.random.default_rng(0)
    attrs = ops.CausalConv(channels, width, function, bias)
    x, w, b = draw(rng, (rows.count, channels)), draw(rng, (channels, 1, width)), draw(rng, (channels,))
    states = _states(rng, rows, width - 1, channels)
    for slot, first, _ in rows.runs:
        states[slot, : max(0, width - 1 - first)] = np.nan  # rows in front of position 0
    operands = [
        activation("x", "T", channels),
        activation("w", channels, 1, width),
        state("state", width - 1, channels),
    ]
    operands += [activation("b", channels)] * bias
    y, after = _run(attrs, operands, [x, w, *([b] * bias)], states, rows, channels)
    want_states, t = states.copy(), 0
    for slot, first, count in rows.runs:
        before = np.where(np.isnan(states[slot]), 0, states[slot]) if first > 0 else np.zeros_like(states[slot])
        of_slot = np.concatenate([before, x[t : t + count]]).astype(np.float64)
        taps = np.stack([of_slot[j : j + count] for j in range(width)])
        sums = np.einsum("jtc,cj->tc", taps, w[:, 0].astype(np.float64)) + bias * b
        want = sums / (1 + np.exp(-sums)) if function == "silu" else sums
        np.testing.assert_allclose(y[t : t + count], want, rtol=0, atol=3e-6)
        want_states[slot] = of_slot[count:]
        t += count
    np.testing.assert_array_equal(after, want_states)


@dataclass(frozen=True)
class Delta:
    """Operands of a gated_delta."""

    attrs: ops.GatedDelta
    qkv: Floats
    a: Floats
    b: Floats
    a_log: Floats
    dt_bias: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, attrs: ops.GatedDelta, count: int) -> Delta:
        width = 2 * attrs.k_heads * attrs.k_dim + attrs.v_heads * attrs.v_dim
        a, b, dt_bias = (
            draw(rng, shape) for shape in ((count, attrs.v_heads), (count, attrs.v_heads), (attrs.v_heads,))
        )
        a_log = np.log(rng.uniform(0.01, 16, attrs.v_heads)).astype(np.float32)  # as models begin
        return cls(attrs, draw(rng, (count, width)), a, b * 2, a_log, dt_bias - 2)

    def operands(self) -> tuple[list[Value], list[Floats]]:
        a = self.attrs
        names = ("qkv", "a", "b")
        values = [activation(name, "T", getattr(self, name).shape[1]) for name in names]
        values += [activation(name, a.v_heads) for name in ("a_log", "dt_bias")]
        values.append(state("state", a.v_heads, a.k_dim, a.v_dim))
        return values, [self.qkv, self.a, self.b, self.a_log, self.dt_bias]


def _delta_rule(given_: Delta, states: Floats, rows: Rows) -> tuple[Doubles, Doubles]:
    """The definition (hetcomp.ir.ops.GatedDelta) in float64, and the states behind it."""
    a, n = given_.attrs, rows.count
    q, k, v = np.split(given_.qkv.astype(np.float64), [a.k_heads * a.k_dim, 2 * a.k_heads * a.k_dim], axis=1)
    q, k = (x.reshape(n, a.k_heads, a.k_dim) for x in (q, k))
    v = v.reshape(n, a.v_heads, a.v_dim)
    if a.l2_eps > 0:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + a.l2_eps) for x in (q, k))
    q, k = (np.repeat(x, a.v_heads // a.k_heads, axis=1) for x in (q * a.scale, k))
    decay = np.exp(
        -np.exp(given_.a_log.astype(np.float64)) * np.logaddexp(0, given_.a.astype(np.float64) + given_.dt_bias)
    )
    beta = 1 / (1 + np.exp(-given_.b.astype(np.float64)))
    out, after, t = np.zeros((n, a.v_heads, a.v_dim)), states.astype(np.float64), 0
    for slot, first, count in rows.runs:
        s = after[slot] if first > 0 else np.zeros(states.shape[1:])
        for row in range(t, t + count):
            s = s * decay[row][:, None, None]
            new = beta[row][:, None] * (v[row] - np.einsum("hk,hkv->hv", k[row], s))
            s = s + k[row][:, :, None] * new[:, None, :]
            out[row] = np.einsum("hk,hkv->hv", q[row], s)
        after[slot] = s
        t += count
    return out.reshape(n, a.v_heads * a.v_dim), after


SHAPES = (
    ops.GatedDelta(k_heads=2, v_heads=4, k_dim=16, v_dim=16, scale=0.25, l2_eps=1e-6),
    ops.GatedDelta(k_heads=1, v_heads=1, k_dim=5, v_dim=19, scale=0.4),
    ops.GatedDelta(k_heads=1, v_heads=2, k_dim=33, v_dim=40, scale=0.2, l2_eps=1e-6),
)


@pytest.mark.parametrize(
    ("attrs", "rows"),
    [*((SHAPES[0], rows) for rows in MIXED), (SHAPES[1], MIXED[1]), (SHAPES[2], MIXED[3])],
    ids=str,
)
def test_gated_delta_row_by_row(attrs, rows):
    rng = np.random.default_rng(1)
    given_ = Delta.draw(rng, attrs, rows.count)
    if attrs.l2_eps == 0:  # keys longer than 1 let the state grow
        given_.qkv[:] *= 0.3
    states = _states(rng, rows, attrs.v_heads, attrs.k_dim, attrs.v_dim)
    y, after = _run(attrs, *given_.operands(), states, rows, attrs.v_heads * attrs.v_dim)
    want, want_states = _delta_rule(given_, states, rows)
    # f32 sums of k_dim products a row, what is left of the rows before decays.
    np.testing.assert_allclose(
        y, want, rtol=0, atol=EPS * 8 * np.sqrt(attrs.k_dim) * max(1, np.abs(want).max(initial=0))
    )
    np.testing.assert_allclose(after, want_states, rtol=0, atol=2e-6 * max(1, np.nan_to_num(np.abs(want_states)).max()))


# One chunk and a part of one; several, continued; whole chunks.
LONG = (Rows(((1, 0, CHUNK + 6),), False), Rows(((2, 3, 3 * CHUNK + 5),), False), Rows(((0, 0, 2 * CHUNK),), False))


def _check_chunks(given_: Delta, rows: Rows, seed: int, growth: float = 1.0) -> None:
    """Queries, keys, values, w, S, v' and q . k are rounded to bf16, by at most 2^-8 of themselves and 2^-9 in the root
    of the mean square: where what is rounded is not larger than the result, the differences' stays at that of seven
    such roundings, and none is larger than a few of them. ``growth``: where it is larger."""
    attrs = given_.attrs
    states = _states(np.random.default_rng(seed), rows, attrs.v_heads, attrs.k_dim, attrs.v_dim)
    y, after = _run(attrs, *given_.operands(), states, rows, attrs.v_heads * attrs.v_dim)
    want, want_states = _delta_rule(given_, states, rows)
    (slot, _, _), *_ = rows.runs
    for got, exact in ((y, want), (after[slot], want_states[slot])):
        apart = got - exact
        assert np.sqrt((apart**2).mean()) <= growth * np.sqrt(7) * 2.0**-9 * np.sqrt((exact**2).mean())
        assert np.abs(apart).max() <= growth * 6 * 2.0**-9 * np.abs(exact).max()
    others = np.arange(SLOTS + 1) != slot
    np.testing.assert_array_equal(after[others], states[others])


@pytest.mark.parametrize(("attrs", "rows"), [*zip(SHAPES, LONG, strict=True), (SHAPES[0], LONG[1])], ids=str)
def test_gated_delta_in_chunks(attrs, rows):
    given_ = Delta.draw(np.random.default_rng(2), attrs, rows.count)
    if attrs.l2_eps == 0:
        given_.qkv[:] *= 0.3
    _check_chunks(given_, rows, 3)


def test_chunks_of_keys_that_are_alike():
    """Each value takes the place of the one before, so that a row's result is the sum of a chunk's differences v' of
    values, whose roundings do not cancel. Powers of A would be as large as binomial coefficients of 64."""
    rows, attrs = LONG[0], SHAPES[0]
    given_ = Delta.draw(np.random.default_rng(4), attrs, rows.count)
    keys = given_.qkv[:, attrs.k_heads * attrs.k_dim : 2 * attrs.k_heads * attrs.k_dim]
    keys[:] = keys[:1] + keys * np.float32(0.01)
    _check_chunks(replace(given_, a=given_.a - 20, b=given_.b + 10), rows, 5, np.sqrt(CHUNK))


@pytest.mark.parametrize("rows", [LONG[0], Rows(((1, 0, 4),), True)], ids=str)
def test_decays_beyond_what_exp_can_say(rows):
    """Of all or nothing from one row to the next: none is infinite or not a number."""
    attrs = SHAPES[0]
    given_ = Delta.draw(np.random.default_rng(6), attrs, rows.count)
    extreme = np.where(np.arange(rows.count) % 3 == 1, np.float32(1e30), np.float32(-1e30))
    _check_chunks(replace(given_, a=np.repeat(extreme[:, None], attrs.v_heads, axis=1)), rows, 7)


def test_keys_too_wide_for_a_gpu_are_refused():
    attrs = ops.GatedDelta(k_heads=1, v_heads=1, k_dim=300, v_dim=16, scale=1.0)
    operands, _ = Delta.draw(np.random.default_rng(0), attrs, 1).operands()
    with pytest.raises(HetcompError, match=r"keys of 300 in a recurrent state are too wide; expected at most 128"):
        emit(request(attrs, operands, [activation("y", "T", 16)], {"T": 64}))
