"""From a model of transformers to the Plan: trace, lower, fold; and the checkpoint that has its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from hetcomp.errors import HetcompError

# As a module: its main function has the same name.
from hetcomp.frontend import fold_layers
from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.frontend.given import Given, config_digest
from hetcomp.frontend.lower import lower_to_plan
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


def find(model: str | Path | nn.Module) -> Given:
    """What ``model`` stands for. Raises HetcompError as :func:`load` does."""
    if not isinstance(model, nn.Module) and Path(model).suffix == ".onnx" and Path(model).is_file():
        return _from_onnx(Path(model))
    # Here: ONNX files need no transformers.
    try:
        from hetcomp.frontend.from_transformers import given_model
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise HetcompError(
            f"{model} is read with transformers, which is not installed; install it, or give an ONNX file (hetcomp "
            "export-onnx makes one)"
        ) from None
    return given_model(model)


def _from_onnx(path: Path) -> Given:
    # Here, since all that onnx consists of is imported with it.
    from hetcomp.frontend.onnx.import_model import model_info, read_model, traced_model

    model = read_model(path)
    raw = model.facts.raw if model.exported is None else model.exported[1]
    info = model_info(model, config_digest(raw))
    return Given(info, SimpleNamespace(), raw, path.parent, lambda context: traced_model(model, context), onnx=path)


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
