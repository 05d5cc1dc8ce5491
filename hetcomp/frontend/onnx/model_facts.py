"""What an ONNX model does not say itself: which tokens end an answer, how many positions it was made for. From
genai_config.json (onnxruntime-genai) or config.json (transformers, optimum) in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import ModelInfo

# Of the metadata of graphs that hetcomp exported: the Plan's facts about the model, and its config as written.
MODEL_KEY, CONFIG_KEY = "hetcomp.model", "hetcomp.config"
# Positions of a model about which nothing says how many it was made for.
UNKNOWN_POSITIONS = 1 << 17


@dataclass(frozen=True)
class ModelFacts:
    """``raw``: the config as written, empty if there is none. ``positions``: None if nothing says. ``provider``:
    what other processor than a CPU onnxruntime shall run it on, by its name there."""

    raw: dict[str, Any]
    model_type: str
    positions: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    provider: str


def model_facts(folder: Path) -> ModelFacts:
    """Facts from the folder's files. Raises HetcompError for one that is damaged."""
    genai = _read(folder / "genai_config.json")
    config = _read(folder / "config.json")
    inside = genai.get("model")
    model = inside if isinstance(inside, dict) else {}
    eos = model.get("eos_token_id", config.get("eos_token_id"))
    kind = config.get("model_type", model.get("type"))
    return ModelFacts(
        raw=config or genai,
        model_type=kind if isinstance(kind, str) else "onnx",
        positions=_whole(model.get("context_length")) or _whole(config.get("max_position_embeddings")),
        eos_token_ids=tuple(e for e in map(_whole, eos if isinstance(eos, list) else [eos]) if e is not None),
        bos_token_id=_whole(model.get("bos_token_id", config.get("bos_token_id"))),
        provider=_provider(model),
    )


def _provider(model: dict[str, Any]) -> str:
    found: Any = model
    for key in ("decoder", "session_options", "provider_options"):
        found = found.get(key) if isinstance(found, dict) else None
    names = [str(n) for entry in found if isinstance(entry, dict) for n in entry] if isinstance(found, list) else []
    return next((n for n in names if n.lower() != "cpu"), "")


def exported_info(metadata: Mapping[str, str], origin: str) -> tuple[ModelInfo, dict[str, Any]] | None:
    """Facts and config in the metadata of a graph that hetcomp exported; None of others. Raises HetcompError if they
    are damaged."""
    if MODEL_KEY not in metadata:
        return None
    try:
        info = TypeAdapter(ModelInfo).validate_json(metadata[MODEL_KEY])
        config = TypeAdapter(dict[str, Any]).validate_json(metadata.get(CONFIG_KEY, "{}"))
    except ValidationError as error:
        raise HetcompError(f"{origin}: the metadata {MODEL_KEY} is damaged: {error.errors()[0]['msg']}") from error
    return info, config


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HetcompError(f"cannot read {path}: {error}") from error
    if not isinstance(made, dict):
        raise HetcompError(f"{path} holds no JSON object")
    return made
