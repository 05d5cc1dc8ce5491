"""Recognises gated delta nets of transformers (linear attention) by what they compute, on random numbers on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hetcomp.frontend.recognise import random_numbers, real_copy

# What proposes a module: these sizes, and these parts.
_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
_PARTS = ("conv1d", "norm", "out_proj", "A_log", "dt_bias")
_COLUMNS = 24  # of the trial's projections, which are cut to so many: a model's own would take hundreds of MB
_TOKENS = 70  # transformers computes them in chunks of 64
# Chunks and one token after the other sum in other orders, in float32, over 70 tokens: seen up to 3e-6.
_TOLERANCE = 3e-5
_L2_EPS = (1e-6, 1e-5, 0.0)  # FLA's, another, no norm of queries and keys

# Projects x [1, T, hidden]: queries, keys and values in a row, the output's gate z, and a and b of the delta rule.
Projections = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class DeltaNetForm:
    """How a module computes with its parts; fields as those of ir.ops.CausalConv, GatedDelta and RmsNorm."""

    projections: Projections
    conv_function: str
    scale: float
    l2_eps: float
    norm_eps: float
    norm_offset: float


class Kernels(Protocol):
    """What a delta net is put together from: torch.ops.hetcomp, or a reference of it."""

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, function: str) -> Tensor: ...

    def gated_delta(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        layer: int,
        k_heads: int,
        v_heads: int,
        k_dim: int,
        v_dim: int,
        scale: float,
        l2_eps: float,
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor: ...


def compute(module: Any, form: DeltaNetForm, x: Tensor, kernels: Kernels) -> Tensor:  # noqa: ANN401
    """The module's output for x [1, T, hidden] in the order of positions, the first one 0 or what the states follow."""
    layer = int(module.layer_idx)
    k_heads, v_heads, k_dim, v_dim = (int(getattr(module, name)) for name in _SIZES)
    qkv, z, a, b = form.projections(module, x)
    mixed = kernels.causal_conv(qkv, module.conv1d.weight, module.conv1d.bias, layer, form.conv_function)
    y = kernels.gated_delta(
        mixed,
        a,
        b,
        module.A_log,
        module.dt_bias,
        layer,
        k_heads,
        v_heads,
        k_dim,
        v_dim,
        form.scale,
        form.l2_eps,
    )
    normed = kernels.rms_norm(y, module.norm.weight, form.norm_eps, form.norm_offset)
    gated = normed.flatten(-2) * nn.functional.silu(z)
    out: Tensor = module.out_proj(gated)
    return out


# ---------------------------------------------------------------- how the input is projected


def _separate(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401
    return module.in_proj_qkv(x), module.in_proj_z(x), module.in_proj_a(x), module.in_proj_b(x)


def _by_key_head(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401
    """Each key head's rows of q, k, v and z together, and those of b and a."""
    heads, each = module.num_k_heads, module.num_v_heads // module.num_k_heads
    k_dim, v_dim = module.head_k_dim, each * module.head_v_dim
    q, k, v, z = module.in_proj_qkvz(x).unflatten(-1, (heads, -1)).split([k_dim, k_dim, v_dim, v_dim], -1)
    b, a = module.in_proj_ba(x).unflatten(-1, (heads, -1)).split([each, each], -1)
    return torch.cat([part.flatten(-2) for part in (q, k, v)], -1), z.flatten(-2), a.flatten(-2), b.flatten(-2)


_PROPOSED: tuple[Projections, ...] = (_separate, _by_key_head)


# ---------------------------------------------------------------- the trial


def delta_net_form(module: nn.Module) -> DeltaNetForm | None:
    """The form that gives the same numbers as the module's own forward; None if none does, or it is no delta net."""
    if not all(hasattr(module, name) for name in (*_SIZES, *_PARTS, "layer_idx")):
        return None
    small = _small_copy(module)
    if small is None:
        return None
    # Small enough in some rows that l2_eps and the norm's eps show in the result.
    sizes = torch.logspace(0, -4, _TOKENS)[torch.randperm(_TOKENS, generator=torch.Generator().manual_seed(4))]
    x = random_numbers(1, _TOKENS, _COLUMNS, seed=5) * sizes[:, None]
    try:
        want = small(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    if not isinstance(want, Tensor):
        return None
    return next((form for form in _candidates(small) if _same(small, form, x, want)), None)


def _same(module: nn.Module, form: DeltaNetForm, x: Tensor, want: Tensor) -> bool:
    try:
        got = compute(module, form, x, _Reference())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if got.shape != want.shape:
        return False
    # By row, since rows have sizes of their own.
    error, size = (t.abs().amax(-1) for t in (got - want, want))
    return bool((error <= _TOLERANCE * size.clamp(min=1e-6)).all())


def _candidates(module: Any) -> Iterator[DeltaNetForm]:  # noqa: ANN401
    eps = sorted({float(v) for v in vars(module.norm).values() if isinstance(v, float) and 0 < v < 1e-2})
    scales = (float(module.head_k_dim) ** -0.5, 1.0)
    return itertools.starmap(
        DeltaNetForm, itertools.product(_PROPOSED, ("silu", "none"), scales, _L2_EPS, eps, (0.0, 1.0))
    )


def _small_copy(module: nn.Module) -> nn.Module | None:
    """The module with random CPU parameters, and but a few columns of what it reads and rows of what it returns. None
    if its convolution is not one of each channel by itself, over its row and some before it, or linear layers have
    biases."""
    conv = module.conv1d
    if not isinstance(conv, nn.Conv1d) or conv.groups != conv.in_channels or conv.kernel_size[0] < 2:
        return None
    small = real_copy(module)
    small._modules = {}
    for name, child in module._modules.items():
        if isinstance(child, nn.Linear):
            if child._parameters["bias"] is not None:
                return None
            rows, columns = (_COLUMNS, child.in_features) if name == "out_proj" else (child.out_features, _COLUMNS)
            linear = nn.Linear(columns, rows, bias=False)
            linear.weight = nn.Parameter(random_numbers(rows, columns, seed=len(name)) / columns**0.5, False)
            small._modules[name] = linear
        else:
            small._modules[name] = None if child is None else real_copy(child)
    return small


class _Reference:
    """The kernels, written out: ir.ops.CausalConv, GatedDelta and RmsNorm over one sequence from position 0."""

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, function: str) -> Tensor:
        padded = nn.functional.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        y = nn.functional.conv1d(padded, weight, bias, groups=len(weight)).transpose(1, 2)
        return nn.functional.silu(y) if function == "silu" else y

    def gated_delta(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        layer: int,
        k_heads: int,
        v_heads: int,
        k_dim: int,
        v_dim: int,
        scale: float,
        l2_eps: float,
    ) -> Tensor:
        q, k, v = torch.split(qkv[0], [k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], -1)
        q, k = (t.reshape(-1, k_heads, k_dim).repeat_interleave(v_heads // k_heads, 1) for t in (q, k))
        if l2_eps > 0:
            q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + l2_eps) for t in (q, k))
        decay = torch.exp(-a_log.exp() * nn.functional.softplus(a[0] + dt_bias))
        state, rows = torch.zeros(v_heads, k_dim, v_dim), []
        for t, values in enumerate(v.reshape(-1, v_heads, v_dim)):
            state = state * decay[t, :, None, None]
            known = torch.einsum("hk,hkv->hv", k[t], state)
            state = state + torch.einsum("hk,hv->hkv", k[t], b[0, t, :, None].sigmoid() * (values - known))
            rows.append(torch.einsum("hk,hkv->hv", q[t] * scale, state))
        return torch.stack(rows)[None]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + weight_offset)
