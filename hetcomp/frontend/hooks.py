"""Everything that knows the inside of transformers: what is replaced while a model is traced.

Nothing is replaced on the strength of a name. A name only proposes a candidate; the candidate is run on
random numbers on the CPU and replaced if a ``hetcomp::`` op gives the same numbers. What is not recognised
stays as it is and is traced as aten ops. All patches are undone when the context manager is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hetcomp.errors import HetcompError
from hetcomp.frontend import custom_ops  # noqa: F401  (defines torch.ops.hetcomp)
from hetcomp.frontend.recognise import (
    ExpertsForm,
    RopeStyle,
    RopeTableData,
    experts_form,
    rms_form,
    rope_style,
    rope_table_data,
)
from hetcomp.frontend.recognise_delta_net import DeltaNetForm, compute, delta_net_form

IMPLEMENTATION = "hetcomp"
_KNOWN_OPERANDS = frozenset({"position_ids", "cache_position"})


@dataclass
class Hooks:
    """What was recognised in one model."""

    rope_tables: list[RopeTableData] = field(default_factory=list)
    rms_norms: int = 0
    rope_functions: list[str] = field(default_factory=list)


class _NoLayers(list[Any]):
    """In place of the caches of layers, which are asked for where a layer keeps another state than keys and values and
    was not recognised."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __getitem__(self, layer: SupportsIndex | slice) -> NoReturn:
        named = self._model.named_modules()
        found = [f"{path} ({type(m).__name__})" for path, m in named if getattr(m, "layer_idx", None) == layer]
        raise HetcompError(
            f"layer {layer}, {found[-1] if found else 'unnamed'}, keeps the state of a convolution or recurrence and "
            "computes otherwise than a gated delta net (as Qwen3-Next's), the only such layer that hetcomp compiles"
        )


class TracingCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A KV cache that only says what is appended: update() emits ``hetcomp::kv_append``. Layers of ``model`` that keep
    other states are refused."""

    def __init__(self, context: int, model: nn.Module) -> None:
        super().__init__(layers=[])
        self.layers = _NoLayers(model)
        self._context = context

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The layer's caches after the write."""
        pair: tuple[Tensor, Tensor] = torch.ops.hetcomp.kv_append(key_states, value_states, layer_idx, self._context)
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0: positions are always given."""
        return 0

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        """False of the whole model. Only layers with a state of another kind ask for themselves."""
        return False if layer_idx is None else bool(self.layers[layer_idx])

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
    # A sliding window is always in the arguments: flash attention, which sees no mask, needs it there too.
    _refuse_unknown(module, kwargs)
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


def _refuse_unknown(module: nn.Module, kwargs: dict[str, object]) -> None:
    """An operand that hetcomp's attention does not know would be lost silently."""
    unknown = sorted(k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _KNOWN_OPERANDS)
    if unknown or kwargs.get("is_causal") is False:
        what = ", ".join(unknown) or "is_causal=False"
        raise HetcompError(f"{type(module).__name__} calls attention with {what}, which hetcomp does not compile")


def _experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
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


# ---------------------------------------------------------------- linear attention


def _replace_delta_nets(model: PreTrainedModel, patches: _Patches) -> None:
    """Puts ``hetcomp::causal_conv`` and ``gated_delta`` in place of what gated delta nets do. Others keep their own
    forward, which asks for states (see _NoLayers)."""
    known: dict[tuple[object, ...], DeltaNetForm | None] = {}
    for module in model.modules():
        if not hasattr(module, "A_log"):
            continue
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k != "layer_idx"}
        key = (type(module), *sorted(plain.items(), key=lambda item: item[0]))
        if key not in known:
            known[key] = delta_net_form(module)
        form = known[key]
        if form is not None:
            patches.set(module, "forward", _delta_net_forward(module, form))


def _delta_net_forward(module: nn.Module, form: DeltaNetForm) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, cache_params: Cache | None = None, **kwargs: object) -> Tensor:
        if kwargs.get("attention_mask") is not None:
            raise HetcompError(f"{type(module).__name__} is given a mask, which hetcomp does not compile")
        return compute(module, form, hidden_states, torch.ops.hetcomp)

    return forward


# ---------------------------------------------------------------- norms


def _replace_norms(model: PreTrainedModel, patches: _Patches, hooks: Hooks) -> None:
    known: dict[tuple[type, int, tuple[tuple[str, float], ...]], tuple[float, float] | None] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        weight = module._parameters.get("weight")
        floats = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, float)))
        key = (type(module), 0 if weight is None else weight.numel(), floats)
        if key not in known:
            known[key] = rms_form(module)
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


def _replace_rotary_tables(model: PreTrainedModel, patches: _Patches, hooks: Hooks, context: int) -> None:
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        table = rope_table_data(module, path, context)
        if table is None:
            continue
        hooks.rope_tables.append(table)
        patches.set(module, "forward", _table_forward(path, len(hooks.rope_tables) - 1, table))


class _ComplexTable(tuple[Tensor, Tensor]):
    """Stands for the complex tensor cos + i sin; a model may only move it and hand it on."""

    def to(self, *args: object, **kwargs: object) -> _ComplexTable:
        return self


def _table_forward(path: str, index: int, table: RopeTableData) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if position_ids.dim() == 3:  # by time, height and width: of a text all are the place in it
            if not table.by_axis:
                raise HetcompError(f"{path} is given positions of several kinds, which hetcomp does not compile")
            position_ids = position_ids[0]
        pair: tuple[Tensor, Tensor] = torch.ops.hetcomp.rope_table(position_ids, index, table.width)
        return _ComplexTable(pair) if table.complex_pair else pair

    return forward


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
                    style = rope_style(function, table, rotary_dim + rest)
                    if style is not None:
                        styles[table.width, table.complex_pair, rest > 0] = style
            if styles:
                rotary_dims = {w: 2 * len(t.inv_freq) for (w, _), t in tables.items()}
                patches.set_item(namespace, key, _rope_function(function, styles, rotary_dims))
                hooks.rope_functions.append(key)


def _rope_function(original: Callable[..., Any], styles: _Styles, rotary_dims: dict[int, int]) -> Callable[..., Any]:
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
            known[key] = experts_form(module, path)
        patches.set(module, "_hetcomp_form", known[key])


def _select_implementations(model: PreTrainedModel, patches: _Patches) -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        patches.set(config, "_attn_implementation_internal", IMPLEMENTATION)
        patches.set(config, "_experts_implementation_internal", IMPLEMENTATION)


@contextmanager
def tracing_hooks(model: PreTrainedModel, context: int) -> Iterator[Hooks]:
    """Prepares ``model`` (float32, on the meta device) for tracing with ``context`` positions; undone on leaving.

    Raises HetcompError naming the module for what is recognised but not compiled.
    """
    hooks, patches = Hooks(), _Patches()
    try:
        with torch.no_grad():
            _select_implementations(model, patches)
            _bypass_mla(model, patches)
            _mark_experts(model, patches)
            _replace_delta_nets(model, patches)
            _replace_norms(model, patches, hooks)
            _replace_rotary_tables(model, patches, hooks, context)
            _replace_rope_functions(model, patches, hooks)
        yield hooks
    finally:
        patches.undo()
