"""From a model of transformers to the Plan: trace, lower, fold; and the checkpoint that has its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hetcomp.errors import HetcompError

# As modules: their main functions have the same names.
from hetcomp.frontend import fold_layers, trace
from hetcomp.frontend.checkpoint import BaseCheckpoint, FolderCheckpoint, ModuleCheckpoint
from hetcomp.frontend.folder_tensors import has_weights
from hetcomp.frontend.gguf.checkpoint import GgufCheckpoint
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.frontend.lower import lower_to_plan
from hetcomp.frontend.source import ModelSource, resolve
from hetcomp.ir.plan import ModelInfo, Plan, ValueKind
from hetcomp.ir.printer import print_plan

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Imported:
    """A model as the passes take it over.

    ``plan`` is folded. ``checkpoint`` is None for a config without weights. ``config`` is the model's config
    as written. ``stages`` holds printed forms for dumps and docs: ``fx``, ``plan``. ``unused`` names tensors of the
    checkpoint that the Plan does not use. ``parameter_shapes``: the module's own parameters and buffers in the order in
    which it has them; ``aliases``: further names of tied parameters by the name that the Plan knows. ``gguf``: the
    GGUF files that it comes from; ``onnx``: the ONNX file.
    """

    plan: Plan
    checkpoint: BaseCheckpoint | None
    config: dict[str, Any]
    folder: Path | None
    unused: tuple[str, ...] = ()
    stages: dict[str, str] = field(default_factory=dict)
    parameter_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gguf: ModelFiles | None = None
    onnx: Path | None = None


def load(
    model: str | Path | nn.Module,
    *,
    context_length: int | None,
    max_batch: int,
    max_tokens: int,
    max_logit_rows: int,
    default_context: int = DEFAULT_CONTEXT,
) -> Imported:
    """Imports a folder, a GGUF or ONNX file, a transformers module or a zoo name, without reading a weight.

    ``context_length``: positions of the KV cache; None: the model's maximum, at most ``default_context``.
    Raises HetcompError for what is missing, damaged, unknown or not compiled, naming it.
    """
    for name, bound in (
        ("max_batch", max_batch),
        ("max_tokens", max_tokens),
        ("max_logit_rows", max_logit_rows),
    ):
        if bound < 1:
            raise HetcompError(f"{name} is {bound}; it must be at least 1")
    given = find(model)
    info = given.info
    context = _context(info, context_length, default_context)
    traced, checkpoint = given.trace(context)
    lowered = lower_to_plan(
        traced,
        given.config,
        info,
        max_tokens=min(max_tokens, context),
        max_batch=max_batch,
        context_length=context,
        max_logit_rows=min(max_logit_rows, max_tokens, context),
    )
    unused: tuple[str, ...] = ()
    if checkpoint is not None:
        weights = [v for v in lowered.values if v.kind is ValueKind.WEIGHT]
        unused = tuple(name for name in checkpoint.unused(weights) if not re.match(given.left_out, name))
    folded = fold_layers.fold_layers(lowered, _stored(lowered, checkpoint))
    if given.quantised_by is not None and checkpoint is None:
        note = (
            f"config.json says that the checkpoint is quantised ({given.quantised_by}); without its tensors "
            "auto is bf16, give --formats for what it will be"
        )
        folded = replace(folded, notes=(*folded.notes, note))
    folded = replace(folded, notes=(*folded.notes, *traced.notes))
    return Imported(
        plan=folded,
        checkpoint=checkpoint,
        config=given.raw,
        folder=given.folder,
        unused=unused,
        stages={"fx": traced.text(), "plan": print_plan(folded)},
        parameter_shapes=traced.parameter_shapes,
        aliases=traced.aliases,
        gguf=given.gguf,
        onnx=given.onnx,
    )


@dataclass(frozen=True)
class Given:
    """What the user gave, before a context is chosen. ``trace`` makes a graph for one, with the checkpoint.
    ``left_out``: a pattern of the checkpoint's tensors that the model's class does without by design."""

    info: ModelInfo
    config: PreTrainedConfig
    raw: dict[str, Any]
    folder: Path | None
    trace: Callable[[int], tuple[trace.TracedModel, BaseCheckpoint | None]]
    quantised_by: str | None = None
    gguf: ModelFiles | None = None
    onnx: Path | None = None
    left_out: str = "$^"


def find(model: str | Path | nn.Module) -> Given:
    """What ``model`` stands for. Raises HetcompError as :func:`load` does."""
    if not isinstance(model, nn.Module) and Path(model).suffix == ".onnx" and Path(model).is_file():
        return _from_onnx(Path(model))
    return _from_transformers(resolve(model))


def _from_onnx(path: Path) -> Given:
    # Here, since all that onnx consists of is imported with it.
    from hetcomp.frontend.onnx.import_model import model_info, read_model, traced_model

    model = read_model(path)
    raw = model.facts.raw if model.exported is None else model.exported[1]
    info = model_info(model, _digest(raw))
    return Given(info, PreTrainedConfig(), raw, path.parent, lambda context: traced_model(model, context), onnx=path)


def _from_transformers(source: ModelSource) -> Given:
    def traced(context: int) -> tuple[trace.TracedModel, BaseCheckpoint | None]:
        made = trace.trace(trace.meta_model(source.model_class, source.config), context)
        notes = (*_text_part_notes(source), *_longrope_notes(source.config, context))
        return replace(made, notes=notes), _checkpoint(source, made)

    method = None if source.quantisation is None else source.quantisation.method
    # Predicting further tokens (mtp), images.
    left_out = "|".join(source.model_class._keys_to_ignore_on_load_unexpected or ["$^"])
    info = _model_info(source)
    return Given(info, source.config, source.raw, source.folder, traced, method, source.gguf, left_out=left_out)


def _digest(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()


def _checkpoint(source: ModelSource, traced: trace.TracedModel) -> BaseCheckpoint | None:
    if source.module is not None:
        have = {n: tuple(t.shape) for n, t in source.module.named_parameters()}
        for name, shape in have.items():
            if traced.parameter_shapes.get(name) != shape:
                raise HetcompError(
                    f"{source.model_class.__name__}: parameter {name} of shape {list(shape)} is not what its "
                    "config describes; adapters and changed modules are not compiled, merge them first"
                )
        return ModuleCheckpoint(source.module, traced.aliases)
    if source.gguf is not None:
        return GgufCheckpoint(source.gguf, source.raw, traced.parameter_shapes, traced.aliases)
    if source.folder is None or not has_weights(source.folder):
        return None
    model_type = str(source.config.model_type)
    return FolderCheckpoint(source.folder, traced.parameter_names, model_type, traced.aliases, source.quantisation)


def _stored(plan: Plan, checkpoint: BaseCheckpoint | None) -> dict[str, str]:
    """By id of every quantised weight how it is stored: layers that differ in this share no code."""
    if checkpoint is None or not checkpoint.quantised:
        return {}
    sources = {v.id: checkpoint.source(v) for v in plan.values if v.kind is ValueKind.WEIGHT}
    labels = {
        name: dict.fromkeys(f"{t.quantised.label} {t.quantised.inexact}" if t.quantised else "" for t in source.tensors)
        for name, source in sources.items()
    }
    return {name: ", ".join(found) for name, found in labels.items()}


def _context(info: ModelInfo, wanted: int | None, default: int) -> int:
    if wanted is None:
        return min(default, info.max_positions)
    if not 1 <= wanted <= info.max_positions:
        raise HetcompError(
            f"a context of {wanted} positions was asked for; {info.name} takes 1 to {info.max_positions}"
        )
    return wanted


def _text_part_notes(source: ModelSource) -> tuple[str, ...]:
    if source.whole is None:
        return ()
    return (
        f"{source.whole} is compiled as its text part, {source.model_class.__name__}: images (and what else it takes "
        "besides text) are left out",
    )


def _longrope_notes(config: PreTrainedConfig, context: int) -> tuple[str, ...]:
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or context
    if rope.get("rope_type") != "longrope" or context <= short:
        return ()
    return (
        f"longrope: all positions are turned as those of sequences of more than {short} are, since the context is "
        f"{context}; a context of at most {short} takes what transformers takes for short sequences",
    )


def _model_info(source: ModelSource) -> ModelInfo:
    config = source.config
    sizes = {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise HetcompError(f"{source.name}: the config has no usable {name} (found {value!r})")
        sizes[name] = value
    eos = getattr(config, "eos_token_id", None)
    bos = getattr(config, "bos_token_id", None)
    return ModelInfo(
        name=source.name,
        architecture=source.model_class.__name__,
        model_type=str(config.model_type),
        vocab=sizes["vocab_size"],
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        max_positions=sizes["max_position_embeddings"],
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (eos,) if isinstance(eos, int) else (),
        bos_token_id=bos if isinstance(bos, int) else None,
        config_sha256=_digest(source.raw),
    )
