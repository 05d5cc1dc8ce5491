"""Everything that knows the inside of transformers: what is replaced while a model is traced.

Nothing is replaced on the strength of a name. A name only proposes a candidate; the candidate is run on
random numbers on the CPU and replaced if a ``hetcomp::`` op gives the same numbers. What is not recognised
stays as it is and is traced as aten ops. All patches are undone when the context manager is left.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hetcomp.errors import HetcompError
from hetcomp.frontend import custom_ops  # noqa: F401  (defines torch.ops.hetcomp)

IMPLEMENTATION = "hetcomp"
RopeStyle = Literal["half", "interleaved", "interleaved_to_half"]
# inv_freq of these depends on the length of the sequence, so no constant table can stand for it.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class RopeTableData:
    """Frequencies of one rotary module: ``inv_freq`` of rotary_dim / 2 floats; cos and sin times ``scaling``.

    ``width`` is the last dimension that the module's forward returns (rotary_dim, or half of it).
    ``complex_pair``: it returns cos + i sin in one tensor (DeepSeek-V2)."""

    inv_freq: tuple[float, ...]
    scaling: float
    width: int
    complex_pair: bool = False


@dataclass(frozen=True)
class ExpertsForm:
    """What an experts module computes between its two products; see ir.ops.MoeExperts."""

    function: str
    alpha: float
    limit: float
    interleaved: bool


@dataclass
class Hooks:
    """What was recognised in one model."""

    rope_tables: list[RopeTableData] = field(default_factory=list)
    rms_norms: int = 0
    rope_functions: list[str] = field(default_factory=list)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


class TracingCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A KV cache that only says what is appended: update() emits ``hetcomp::kv_append``."""

    def __init__(self, context: int) -> None:
        super().__init__(layers=[])
        self._context = context

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The layer's caches after the write."""
        pair: tuple[Tensor, Tensor] = torch.ops.hetcomp.kv_append(
            key_states, value_states, layer_idx, self._context
        )
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No mask is ever built, the attention op is causal by itself."""
        return query_length, 0


# ---------------------------------------------------------------- attention and experts


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    layer = int(getattr(module, "layer_idx", 0))
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    if getattr(module, "_hetcomp_mla", False):
        nope = int(module.qk_nope_head_dim)  # type: ignore[arg-type]
        out = torch.ops.hetcomp.mla_attention(
            query,
            key,
            value,
            module.kv_b_proj.weight,  # type: ignore[union-attr]
            layer,
            scale,
            nope,
            int(module.v_head_dim),  # type: ignore[arg-type]
            float(softcap or 0.0),
        )
        return out, None
    out = torch.ops.hetcomp.attention(
        query, key, value, s_aux, layer, scale, int(sliding_window or 0), float(softcap or 0.0)
    )
    return out, None


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    form: ExpertsForm = self._hetcomp_form  # type: ignore[assignment]
    bias = bool(getattr(self, "has_bias", False))
    out: Tensor = torch.ops.hetcomp.moe_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        self.gate_up_proj_bias if bias else None,
        self.down_proj_bias if bias else None,
        form.function,
        form.alpha,
        form.limit,
        bool(getattr(self, "is_transposed", False)),
        form.interleaved,
    )
    return out


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


def _experts_form(module: nn.Module, path: str) -> ExpertsForm:
    """Runs the module's gate on random numbers and finds the function that gives the same."""
    name = type(module).__name__
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        raise HetcompError(
            f"{path}: experts of class {name} have no gate or a norm of their own, which hetcomp does not "
            "compile yet"
        )
    # Wide enough that clamps at GPT-OSS's limit of 7 are reached.
    gate_up = _random(64, 48, seed=3, scale=6.0)
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


# ---------------------------------------------------------------- norms


def _real_copy(module: nn.Module) -> nn.Module:
    """The module with random CPU parameters in place of its own; shares nothing that is written to."""
    clone = copy.copy(module)
    clone.__dict__ = dict(module.__dict__)
    clone._parameters = {
        k: nn.Parameter(_random(*p.shape, seed=7) + 0.5, requires_grad=False) if p is not None else None
        for k, p in module._parameters.items()
    }
    return clone


def _rms_form(module: nn.Module) -> tuple[float, float] | None:
    """(eps, weight_offset) if the module is an RMS norm over the last dimension, else None."""
    if list(module._parameters) != ["weight"] or module._buffers or list(module.children()):
        return None
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return None
    eps_candidates = {float(v) for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2}
    clone = _real_copy(module)
    # Small enough that eps shows in the result.
    x = torch.cat([_random(3, weight.shape[0], seed=1), _random(3, weight.shape[0], seed=2, scale=1e-3)])
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


def _replace_norms(model: PreTrainedModel, patches: _Patches, hooks: Hooks) -> None:
    known: dict[tuple[type, int, tuple[tuple[str, float], ...]], tuple[float, float] | None] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        weight = module._parameters.get("weight")
        floats = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, float)))
        key = (type(module), 0 if weight is None else weight.numel(), floats)
        if key not in known:
            known[key] = _rms_form(module)
        form = known[key]
        if form is None:
            continue
        patches.set(module, "forward", _norm_forward(module, *form))
        hooks.rms_norms += 1


def _norm_forward(module: nn.Module, eps: float, offset: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.hetcomp.rms_norm(x, module.weight, eps, offset)
        return out

    return forward


# ---------------------------------------------------------------- rotary embedding


def _replace_rotary_tables(model: PreTrainedModel, patches: _Patches, hooks: Hooks) -> None:
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        table = _rope_table_data(module, path)
        if table is None:
            continue
        hooks.rope_tables.append(table)
        patches.set(module, "forward", _table_forward(len(hooks.rope_tables) - 1, table))


class _ComplexTable(tuple[Tensor, Tensor]):
    """Stands for the complex tensor cos + i sin; a model may only move it and hand it on."""

    def to(self, *args: object, **kwargs: object) -> _ComplexTable:
        return self


def _table_forward(index: int, table: RopeTableData) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = torch.ops.hetcomp.rope_table(position_ids, index, table.width)
        return _ComplexTable(pair) if table.complex_pair else pair

    return forward


def _rope_table_data(module: nn.Module, path: str) -> RopeTableData | None:
    """Rebuilds the rotary module on the CPU from its config (its buffers have no data on the meta device)."""
    config = getattr(module, "config", None)
    rope_type = getattr(module, "rope_type", "default")
    if isinstance(rope_type, str) and rope_type in _LENGTH_DEPENDENT_ROPE:
        raise HetcompError(
            f"{path}: rope type {rope_type!r} changes its frequencies with the length of the sequence, which "
            "hetcomp does not compile; use default, linear, llama3 or yarn"
        )
    if config is None or not isinstance(rope_type, str):
        return None
    with torch.device("cpu"):
        real = type(module)(config).float()
    inv_freq = torch.as_tensor(real.inv_freq).float()
    scaling = float(getattr(real, "attention_scaling", 1.0))
    positions = torch.tensor([[0, 1, 5, 100]])
    got: object = real(torch.zeros(1, 4, 8), positions)
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


def _rope_style(function: Callable[..., Any], table: RopeTableData, head_dim: int) -> RopeStyle | None:
    """The style in which ``function`` rotates heads of ``head_dim`` with such a table; None: none of ours."""
    rotary_dim = 2 * len(table.inv_freq)
    cos, sin = (_random(1, 5, rotary_dim // 2, seed=s) for s in (11, 12))
    q, k = _random(1, 3, 5, head_dim, seed=13), _random(1, 2, 5, head_dim, seed=14)
    repeats = table.width // cos.shape[-1]
    given = (
        [torch.complex(cos, sin)]
        if table.complex_pair
        else [torch.cat([t] * repeats, -1) for t in (cos, sin)]
    )
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


_Styles = dict[tuple[int, bool, bool], RopeStyle]


def _replace_rope_functions(model: PreTrainedModel, patches: _Patches, hooks: Hooks) -> None:
    """Puts ``hetcomp::rope`` in place of the apply_rotary_* functions of the model's modules."""
    tables = {(t.width, t.complex_pair): t for t in hooks.rope_tables}
    for name in sorted({type(m).__module__ for m in model.modules()}):
        namespace = vars(sys.modules[name])
        for key, function in list(namespace.items()):
            if not key.startswith("apply_rotary") or not callable(function):
                continue
            styles: _Styles = {}
            for table in tables.values():
                rotary_dim = 2 * len(table.inv_freq)
                for rest in (0, 6):
                    style = _rope_style(function, table, rotary_dim + rest)
                    if style is not None:
                        styles[table.width, table.complex_pair, rest > 0] = style
            if styles:
                rotary_dims = {w: 2 * len(t.inv_freq) for (w, _), t in tables.items()}
                patches.set_item(namespace, key, _rope_function(function, styles, rotary_dims))
                hooks.rope_functions.append(key)


def _rope_function(
    original: Callable[..., Any], styles: _Styles, rotary_dims: dict[int, int]
) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, table: Tensor | _ComplexTable, *args: object, **kwargs: object) -> object:
        complex_pair = isinstance(table, _ComplexTable)
        cos, sin = table if isinstance(table, _ComplexTable) else (table, args[0] if args else kwargs["sin"])
        integers = [a for a in args if isinstance(a, int)]
        axis = kwargs.get("unsqueeze_dim", integers[-1] if integers else 1)
        width = int(cos.shape[-1])
        partial = q.shape[-1] > rotary_dims.get(width, 0)
        style = styles.get((width, complex_pair, partial))
        if style is None:
            return original(q, k, table, *args, **kwargs)
        rope = torch.ops.hetcomp.rope
        return tuple(rope(x, cos, sin, rotary_dims[width], style, axis) for x in (q, k))

    return apply


# ---------------------------------------------------------------- the whole


class _Patches:
    """Attributes and dictionary entries set for the time of a trace."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, target: object, name: str, value: object) -> None:
        own = vars(target)
        if name in own:
            previous = own[name]
            self._undo.append(lambda: setattr(target, name, previous))
        else:
            self._undo.append(lambda: delattr(target, name))
        setattr(target, name, value)

    def set_item(self, target: dict[str, Any], key: str, value: object) -> None:
        previous = target[key]
        self._undo.append(lambda: target.__setitem__(key, previous))
        target[key] = value

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _bypass_mla(model: PreTrainedModel, patches: _Patches) -> None:
    """Hands attention the latents: cache and attention then work on the compressed row."""
    needed = ("kv_b_proj", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    for path, module in model.named_modules():
        if not hasattr(module, "kv_b_proj"):
            continue
        if not hasattr(module, "expand_kv") or not all(hasattr(module, a) for a in needed):
            raise HetcompError(
                f"{path}: multi-head latent attention of class {type(module).__name__} has no expand_kv() "
                "that hetcomp could look behind; transformers >= 5.15 is needed for this family"
            )
        patches.set(module, "expand_kv", lambda kv_nope, k_rot: (kv_nope, k_rot))
        patches.set(module, "_hetcomp_mla", True)


def _mark_experts(model: PreTrainedModel, patches: _Patches) -> None:
    known: dict[tuple[type, float, float], ExpertsForm] = {}
    for path, module in model.named_modules():
        if not hasattr(type(module), "_apply_gate") or not hasattr(module, "down_proj"):
            continue
        limits = [float(getattr(module, a, 0.0) or 0.0) for a in ("alpha", "limit")]
        key = (type(module), limits[0], limits[1])
        if key not in known:
            known[key] = _experts_form(module, path)
        patches.set(module, "_hetcomp_form", known[key])


def _select_implementations(model: PreTrainedModel, patches: _Patches) -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        patches.set(config, "_attn_implementation_internal", IMPLEMENTATION)
        patches.set(config, "_experts_implementation_internal", IMPLEMENTATION)


@contextmanager
def tracing_hooks(model: PreTrainedModel) -> Iterator[Hooks]:
    """Prepares ``model`` (float32, on the meta device) for tracing; undone on leaving.

    Raises HetcompError naming the module for what is recognised but not compiled.
    """
    hooks, patches = Hooks(), _Patches()
    try:
        with torch.no_grad():
            _select_implementations(model, patches)
            _bypass_mla(model, patches)
            _mark_experts(model, patches)
            _replace_norms(model, patches, hooks)
            _replace_rotary_tables(model, patches, hooks)
            _replace_rope_functions(model, patches, hooks)
        yield hooks
    finally:
        patches.undo()
