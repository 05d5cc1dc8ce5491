"""What the user gave, before a context is chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetcomp.frontend.checkpoint import BaseCheckpoint
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.frontend.traced_model import TracedModel
from hetcomp.ir.plan import ModelInfo


@dataclass(frozen=True)
class Given:
    """``trace`` makes a graph for a context, with the checkpoint. ``config``: has the numbers of routers as attributes.
    ``left_out``: a pattern of the checkpoint's tensors that the model's class does without by design."""

    info: ModelInfo
    config: object
    raw: dict[str, Any]
    folder: Path | None
    trace: Callable[[int], tuple[TracedModel, BaseCheckpoint | None]]
    quantised_by: str | None = None
    gguf: ModelFiles | None = None
    onnx: Path | None = None
    left_out: str = "$^"


def config_digest(raw: dict[str, Any]) -> str:
    """SHA-256 of a config as written."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()
