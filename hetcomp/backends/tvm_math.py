"""Transcendental functions as TIR expressions that vectorise.

TVM lowers ``exp`` and its kin to scalar calls of libm, one a lane. These are polynomials over f32 with an
error of at most 2 ulp (exp) and a few ulp of 1 (tanh, erf), spelled with operations that have vector
instructions. NaN goes in as NaN and comes out as NaN; infinities give the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

Expr = Any  # a TIR expression of type float32


def _f(value: float) -> Expr:
    return tirx.const(value, "float32")


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Polynomial in ``x``, highest power first."""
    value = _f(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + _f(c)
    return value


def _bind(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """``body(value)`` with ``value`` computed once."""
    var = tirx.Var("v", value.dtype if hasattr(value, "dtype") else "float32")
    return tirx.Let(var, value, body(var))


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """``x`` held in [low, high]. Not tirx.min and max: those replace NaN by the bound."""
    return tirx.Select(x < _f(low), _f(low), tirx.Select(x > _f(high), _f(high), x))


def exp(x: Expr) -> Expr:
    """e^x: Cephes' expf. 2^n is multiplied in two halves, so that results near overflow and the subnormal
    ones come out right without a branch."""
    return _bind(x, lambda x: _bind(_clamp(x, -104.0, 88.8), _exp_clamped))


def _exp_clamped(x: Expr) -> Expr:
    n = tirx.floor(x * _f(1.44269504088896341) + _f(0.5))
    return _bind(n, lambda n: _bind(x - n * _f(0.693359375) - n * _f(-2.12194440e-4), lambda r: _exp_scaled(r, n)))


def _exp_scaled(r: Expr, n: Expr) -> Expr:
    p = _horner(
        r,
        (
            1.9875691500e-4,
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ),
    )
    value = p * (r * r) + r + _f(1.0)
    whole = n.astype("int32")
    half = tirx.shift_right(whole, tirx.const(1, "int32"))
    return value * _power_of_two(half) * _power_of_two(whole - half)


def _power_of_two(n: Expr) -> Expr:
    bits = tirx.shift_left(n + tirx.const(127, "int32"), tirx.const(23, "int32"))
    return tirx.reinterpret("float32", bits)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    return _f(1.0) / (_f(1.0) + exp(_f(0.0) - x))


def tanh(x: Expr) -> Expr:
    """Cephes' tanhf: a polynomial below 0.625, 1 - 2 / (e^2|x| + 1) above."""
    return _bind(x, _tanh)


def _tanh(x: Expr) -> Expr:
    square = x * x
    small = (
        _horner(
            square,
            (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1),
        )
        * square
        * x
        + x
    )
    positive = tirx.Select(x < _f(0.0), _f(0.0) - x, x)
    large = _f(1.0) - _f(2.0) / (exp(positive * _f(2.0)) + _f(1.0))
    signed = _bind(large, lambda v: tirx.Select(x < _f(0.0), _f(0.0) - v, v))
    return tirx.Select(positive < _f(0.625), small, signed)


def erf(x: Expr) -> Expr:
    """Rational minimax approximation on [-4, 4] (the coefficients are Eigen's, also used by XLA)."""
    return _bind(x, lambda x: _bind(_clamp(x, -4.0, 4.0), _erf_clamped))


def _erf_clamped(x: Expr) -> Expr:
    square = x * x
    alpha = (
        -2.72614225801306e-10,
        2.77068142495902e-08,
        -2.10102402082508e-06,
        -5.69250639462346e-05,
        -7.34990630326855e-04,
        -2.95459980854025e-03,
        -1.60960333262415e-02,
    )
    beta = (
        -1.45660718464996e-05,
        -2.13374055278905e-04,
        -1.68282697438203e-03,
        -7.37332916720468e-03,
        -1.42647390514189e-02,
    )
    return _bind(x * _horner(square, alpha) / _horner(square, beta), lambda y: _clamp(y, -1.0, 1.0))


def silu(x: Expr) -> Expr:
    """x * sigmoid(x)."""
    return x / (_f(1.0) + exp(_f(0.0) - x))


def gelu(x: Expr) -> Expr:
    """x * Phi(x), by the error function."""
    return _f(0.5) * x * (_f(1.0) + erf(x * _f(0.70710678118654752)))


def gelu_tanh(x: Expr) -> Expr:
    """The tanh approximation of gelu: 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), computed
    as the equal x * sigmoid(2 u), which has no cancellation."""
    twice = _f(2.0 * 0.79788456080286536) * (x + _f(0.044715) * (x * x * x))
    return x / (_f(1.0) + exp(_f(0.0) - twice))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return tirx.Select(x < _f(0.0), _f(0.0), x)


def swiglu_oai(gate: Expr, up: Expr, alpha: float, limit: float) -> Expr:
    """GPT-OSS: (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)."""
    capped = tirx.Select(gate > _f(limit), _f(limit), gate)
    return (_clamp(up, -limit, limit) + _f(1.0)) * _bind(capped, lambda g: g * sigmoid(g * _f(alpha)))


UNARY: dict[str, Callable[[Expr], Expr]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
    "tanh": tanh,
}


def tree(op: Callable[[Expr, Expr], Expr], buffer: Any, n: int) -> Expr:  # noqa: ANN401
    """``op`` over buffer[0 .. n-1] as a balanced tree: short chains, and a fixed order of additions."""
    level = [buffer[i] for i in range(n)]
    while len(level) > 1:
        half = (len(level) + 1) // 2
        level = [op(level[i], level[i + half]) if i + half < len(level) else level[i] for i in range(half)]
    return level[0]


def constant(value: float) -> Expr:
    """An f32 literal."""
    return _f(value)


def glu(function: str, alpha: float, limit: float) -> Callable[[Expr, Expr], Expr]:
    """function(gate) * up of the gated units (hetcomp.ir.ops.MoeExperts)."""
    if function == "swiglu_oai":
        return lambda gate, up: swiglu_oai(gate, up, alpha, limit)
    act = UNARY[function]
    return lambda gate, up: act(gate) * up
