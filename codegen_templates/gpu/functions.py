"""Activation functions, f32, as hetcomp/ir/ops.py names them."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Saturates: exp overflows to infinity, 2 / infinity is 0.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    if FUNCTION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif FUNCTION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif FUNCTION == "relu":
        return tl.maximum(x, 0.0)
    elif FUNCTION == "tanh":
        return tanh(x)
    else:
        tl.static_assert(FUNCTION == "sigmoid")
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def glu(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """function(gate) * up, or swiglu_oai (hetcomp.ir.ops.MoeExperts)."""
    if FUNCTION == "swiglu_oai":
        g = tl.minimum(gate, LIMIT)
        u = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (u + 1.0) * g / (1.0 + tl.exp(-ALPHA * g))
    else:
        return activate(gate, FUNCTION) * up
