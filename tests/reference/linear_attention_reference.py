"""Causal convolution and the gated delta rule in float64, and the error that a kernel may make."""

from __future__ import annotations

import numpy as np

from hetcomp.ir.ops import CausalConv, GatedDelta
from tests.reference.kernel_harness import Step
from tests.reference.kernel_numbers import EPS, Doubles, dot_error


def causal_conv_reference(
    a: CausalConv, x: Doubles, weight: Doubles, state: Doubles, bias: Doubles, step: Step
) -> tuple[Doubles, Doubles]:
    """The convolution [T, channels] and the error it may have; leaves in ``state`` what the next step needs."""
    assert step.positions is not None
    assert step.slots is not None
    y, bound = np.zeros_like(x), np.zeros_like(x)
    taps = weight[:, 0].T
    for t, (position, slot) in enumerate(zip(step.positions, step.slots, strict=True)):
        state[slot, : max(0, a.width - 1 - position)] = 0  # rows before position 0
        window = np.concatenate([state[slot], x[t : t + 1]])
        state[slot] = window[1:]
        products = [*(taps * window), *([bias] if a.bias else [])]
        s = np.sum(products, axis=0)
        error = dot_error(len(products), np.abs(products).sum(0))
        sigmoid = 1 / (1 + np.exp(-s))
        # silu's slope is 1.1 at most; exp, the sum, the quotient and the product are a few units in the last place.
        silu = a.function == "silu"
        y[t], bound[t] = (s * sigmoid, 1.1 * error + 8 * EPS * np.abs(s * sigmoid)) if silu else (s, error)
    return y, bound


def gated_delta_reference(
    a: GatedDelta,
    qkv: Doubles,
    gate: Doubles,
    b: Doubles,
    a_log: Doubles,
    dt_bias: Doubles,
    state: Doubles,
    step: Step,
) -> tuple[Doubles, Doubles, Doubles]:
    """The rule [T, v_heads, v_dim], the error it may have, and that of the states, [slots, v_heads, v_dim] for all rows
    of a column; leaves in ``state`` what the next step needs.

    A state's error goes the way of the state: a row multiplies it by decay * (I - beta k k^T), whose norm is at most the
    decay where k is at most 1 long. So the Euclidean norm of a column's error shrinks with every row, and what the row's
    own arithmetic adds is added to it."""
    assert step.positions is not None
    assert step.slots is not None
    heads, keys = a.v_heads, a.k_heads * a.k_dim
    y = np.zeros((len(qkv), heads, a.v_dim))
    bound, errors = np.zeros_like(y), np.zeros((len(state), heads, a.v_dim))
    # Of a sum over k_dim products, and of a length.
    summing = EPS * (4 + np.sqrt(a.k_dim))
    length = summing if a.l2_eps else 0.0
    for t, (position, slot) in enumerate(zip(step.positions, step.slots, strict=True)):
        if position == 0:
            state[slot] = 0
            errors[slot] = 0
        q, k = (qkv[t, i * keys : (i + 1) * keys].reshape(a.k_heads, a.k_dim) for i in (0, 1))
        if a.l2_eps:
            q, k = (v / np.sqrt((v * v).sum(-1, keepdims=True) + a.l2_eps) for v in (q, k))
        q, k = (np.repeat(v, heads // a.k_heads, axis=0) for v in (q * a.scale, k))
        v = qkv[t, 2 * keys :].reshape(heads, a.v_dim)
        x = gate[t] + dt_bias
        exponent = np.exp(a_log) * np.logaddexp(0, x)
        decay, beta = np.exp(-exponent)[:, None], 1 / (1 + np.exp(-b[t]))[:, None]
        # The rounding of x and of the exponent are errors of what they are exponents of; exp() stops at 2^-126.
        off_decay = decay * EPS * (4 + exponent * (8 + np.abs(x)))[:, None] + 2.0**-125
        off_beta = beta * 6 * EPS

        def read(vectors: Doubles, columns: Doubles) -> Doubles:
            return np.einsum("hk,hkv->hv", vectors, columns)

        before = state[slot]
        seen, magnitude = read(k, before), read(np.abs(k), np.abs(before))
        missing = v - decay * seen
        delta = beta * missing
        after = decay[..., None] * before + k[..., None] * delta[:, None]
        off_seen = (off_decay + decay * (summing + length)) * magnitude
        off_delta = beta * off_seen + (off_beta + beta * (length + 3 * EPS)) * (np.abs(v) + decay * magnitude)
        off_after = (
            (off_decay + EPS * decay)[..., None] * np.abs(before)
            + np.abs(k[..., None]) * (off_delta + (length + EPS) * np.abs(delta))[:, None]
            + EPS * np.abs(after)
        )
        norm = np.maximum(1, np.abs(1 - beta * (k * k).sum(-1, keepdims=True)))
        errors[slot] = decay * norm * errors[slot] + np.linalg.norm(off_after, axis=1)
        state[slot] = after
        y[t] = read(q, after)
        bound[t] = np.linalg.norm(q, axis=-1, keepdims=True) * errors[slot] + (summing + length + 2 * EPS) * read(
            np.abs(q), np.abs(after)
        )
    return y, bound, errors
