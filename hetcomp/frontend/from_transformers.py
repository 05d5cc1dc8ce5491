"""Models whose graph is traced from transformers' code: folders, GGUF files, modules in memory, configs of the zoo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from hetcomp.errors import HetcompError
from hetcomp.frontend import trace
from hetcomp.frontend.checkpoint import BaseCheckpoint, ModuleCheckpoint
from hetcomp.frontend.folder_checkpoint import FolderCheckpoint
from hetcomp.frontend.folder_tensors import has_weights
from hetcomp.frontend.gguf.checkpoint import GgufCheckpoint
from hetcomp.frontend.given import Given, config_digest
from hetcomp.frontend.source import ModelSource, resolve
from hetcomp.frontend.traced_model import TracedModel
from hetcomp.ir.plan import ModelInfo


def given_model(model: str | Path | nn.Module) -> Given:
    """What ``model`` stands for. Raises HetcompError as source.resolve does."""
    source = resolve(model)

    def traced(context: int) -> tuple[TracedModel, BaseCheckpoint | None]:
        made = trace.trace(trace.meta_model(source.model_class, source.config), context)
        notes = (*_text_part_notes(source), *_longrope_notes(source.config, context))
        return replace(made, notes=notes), _checkpoint(source, made)

    method = None if source.quantisation is None else source.quantisation.method
    # Predicting further tokens (mtp), images.
    left_out = "|".join(source.model_class._keys_to_ignore_on_load_unexpected or ["$^"])
    info = _model_info(source)
    return Given(info, source.config, source.raw, source.folder, traced, method, source.gguf, left_out=left_out)


def _checkpoint(source: ModelSource, traced: TracedModel) -> BaseCheckpoint | None:
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
        config_sha256=config_digest(source.raw),
    )
