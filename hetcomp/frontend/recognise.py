"""Recognises modules and functions of transformers by what they compute, on random numbers on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hetcomp.errors import HetcompError

RopeStyle = Literal["half", "interleaved", "interleaved_to_half"]
# inv_freq of these depends on the length of the sequence, so no constant table can stand for it.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class RopeTableData:
    """Frequencies of one rotary module: ``inv_freq`` of rotary_dim / 2 floats; cos and sin times ``scaling``.

    ``width`` is the last dimension that the module's forward returns (rotary_dim, or half of it).
    ``complex_pair``: it returns cos + i sin in one tensor (DeepSeek-V2). ``by_axis``: positions may be given for three
    axes (time, height, width), which gives the same where they are equal (Qwen's mrope)."""

    inv_freq: tuple[float, ...]
    scaling: float
    width: int
    complex_pair: bool = False
    by_axis: bool = False


@dataclass(frozen=True)
class ExpertsForm:
    """What an experts module computes between its two products; see ir.ops.MoeExperts."""

    function: str
    alpha: float
    limit: float
    interleaved: bool


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))


def random_numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed, the same ones for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def glu_reference(function: str, gate: Tensor, up: Tensor, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """function(gate) * up as ir.ops.MoeExperts and Glu define it."""
    if function == "swiglu_oai":
        g = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "relu": nn.functional.relu,
    }
    return functions[function](gate) * up


def experts_form(module: nn.Module, path: str) -> ExpertsForm:
    """Runs the module's gate on random numbers and finds the function that gives the same."""
    name = type(module).__name__
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        raise HetcompError(
            f"{path}: experts of class {name} have no gate or a norm of their own, which hetcomp does not compile yet"
        )
    # Wide enough that clamps at GPT-OSS's limit of 7 are reached.
    gate_up = random_numbers(64, 48, seed=3, scale=6.0)
    apply_gate: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]
    want = apply_gate(gate_up)
    alpha, limit = float(getattr(module, "alpha", 0.0) or 0.0), float(getattr(module, "limit", 0.0) or 0.0)
    candidates = [("silu", 0.0, 0.0), ("gelu", 0.0, 0.0), ("gelu_tanh", 0.0, 0.0), ("relu", 0.0, 0.0)]
    if limit > 0:
        candidates.append(("swiglu_oai", alpha, limit))
    for interleaved in (False, True):
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
        for function, a, b in candidates:
            if _close(want, glu_reference(function, gate, up, a, b)):
                return ExpertsForm(function, a, b, interleaved)
    raise HetcompError(f"{path}: the activation of {name} is none that hetcomp knows")


def real_copy(module: nn.Module) -> nn.Module:
    """The module with random CPU parameters in place of its own; shares nothing that is written to."""
    clone = copy.copy(module)
    clone.__dict__ = dict(module.__dict__)
    clone._parameters = {
        k: nn.Parameter(random_numbers(*p.shape, seed=7) + 0.5, requires_grad=False) if p is not None else None
        for k, p in module._parameters.items()
    }
    return clone


def rms_form(module: nn.Module) -> tuple[float, float] | None:
    """(eps, weight_offset) if the module is an RMS norm over the last dimension, else None."""
    if list(module._parameters) != ["weight"] or module._buffers or list(module.children()):
        return None
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return None
    eps_candidates = {float(v) for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2}
    clone = real_copy(module)
    # Small enough that eps shows in the result.
    x = torch.cat([random_numbers(3, weight.shape[0], seed=1), random_numbers(3, weight.shape[0], seed=2, scale=1e-3)])
    try:
        want = clone(x)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(want, Tensor):
        return None
    normed_by = {e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) for e in eps_candidates}
    for eps, normed in normed_by.items():
        for offset in (0.0, 1.0):
            if _close(want, normed * (clone._parameters["weight"] + offset)):  # type: ignore[operator]
                return eps, offset
    return None


def rope_table_data(module: nn.Module, path: str, context: int) -> RopeTableData | None:
    """Rebuilds the rotary module on the CPU from its config (its buffers have no data on the meta device). It is tried
    as part of a sequence of ``context`` positions, whose length decides which of its frequencies longrope takes."""
    config = getattr(module, "config", None)
    rope_type = getattr(module, "rope_type", "default")
    if rope_type == "dynamic":
        raise HetcompError(
            f"{path}: rope type {rope_type!r} changes its frequencies with the length of the sequence, which "
            "hetcomp does not compile; use default, linear, llama3, longrope or yarn"
        )
    if config is None or not isinstance(rope_type, str):
        return None
    with torch.device("cpu"):
        real = type(module)(config).float()
    positions = torch.tensor([[0, 1, min(5, context - 1), context - 1]])
    got: object = real(torch.zeros(1, 4, 8), positions)
    scaling = float(getattr(real, "attention_scaling", 1.0))
    if rope_type == "longrope" and isinstance(got, tuple):
        scaling = float(got[0].flatten()[0])  # a cosine of 0; of Phi-MoE it is not the module's attribute
    # Of longrope it is the one for this length, but for Phi-MoE, which always takes the original one.
    candidates = [getattr(real, name) for name in ("inv_freq", "original_inv_freq") if hasattr(real, name)]
    made = (_table_of(got, positions, torch.as_tensor(inv_freq).float(), scaling) for inv_freq in candidates)
    table = next((table for table in made if table is not None), None)
    return None if table is None else replace(table, by_axis=_takes_axes(real, positions, got))


def _takes_axes(module: nn.Module, positions: Tensor, got: object) -> bool:
    """Whether the module gives the same for positions by axis, all equal."""
    try:
        by_axis = module(torch.zeros(1, 4, 8), positions.expand(3, *positions.shape))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    pairs = (
        zip(by_axis, got, strict=True) if isinstance(got, tuple) and isinstance(by_axis, tuple) else [(by_axis, got)]
    )
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def _table_of(got: object, positions: Tensor, inv_freq: Tensor, scaling: float) -> RopeTableData | None:
    """The table that gives what a module made of ``positions``; None if it is not of these frequencies."""
    angles = positions[..., None].float() * inv_freq
    if isinstance(got, Tensor) and got.is_complex():
        same = _close(got.real, angles.cos() * scaling) and _close(got.imag, angles.sin() * scaling)
        return RopeTableData(tuple(inv_freq.tolist()), scaling, angles.shape[-1], True) if same else None
    if not (isinstance(got, tuple) and len(got) == 2):
        return None
    cos, sin = got
    for repeat in (2, 1):
        emb = torch.cat([angles] * repeat, dim=-1)
        if _close(cos, emb.cos() * scaling) and _close(sin, emb.sin() * scaling):
            return RopeTableData(tuple(inv_freq.tolist()), scaling, emb.shape[-1])
    return None


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, style: str) -> Tensor:
    """ir.ops.Rope with offset 0 on x[..., head_dim]; cos and sin broadcast to x[..., rotary_dim / 2]."""
    h = rotary_dim // 2
    rest = x[..., rotary_dim:]
    if style == "half":
        a, b = x[..., :h], x[..., h:rotary_dim]
    else:
        a, b = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    ra, rb = a * cos - b * sin, b * cos + a * sin
    if style == "interleaved":
        return torch.cat([torch.stack([ra, rb], -1).flatten(-2), rest], -1)
    return torch.cat([ra, rb, rest], -1)


def rope_style(function: Callable[..., Any], table: RopeTableData, head_dim: int) -> RopeStyle | None:
    """The style in which ``function`` rotates heads of ``head_dim`` with such a table; None: none of ours."""
    rotary_dim = 2 * len(table.inv_freq)
    cos, sin = (random_numbers(1, 5, rotary_dim // 2, seed=s) for s in (11, 12))
    q, k = random_numbers(1, 3, 5, head_dim, seed=13), random_numbers(1, 2, 5, head_dim, seed=14)
    repeats = table.width // cos.shape[-1]
    given = [torch.complex(cos, sin)] if table.complex_pair else [torch.cat([t] * repeats, -1) for t in (cos, sin)]
    try:
        got = function(q, k, *given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not (isinstance(got, tuple) and len(got) == 2):
        return None
    styles: tuple[RopeStyle, ...] = ("half", "interleaved", "interleaved_to_half")
    for style in styles:
        want = [rope_reference(x, cos[:, None], sin[:, None], rotary_dim, style) for x in (q, k)]
        if _close(got[0], want[0]) and _close(got[1], want[1]):
            return style
    return None
