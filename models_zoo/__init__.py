"""The models that come with hetcomp: the trained demo-moe and shapes of well-known models (``configs/``)."""

from __future__ import annotations

from pathlib import Path

from hetcomp.errors import HetcompError

_ROOT = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names that :func:`find` knows, sorted."""
    return sorted(path.parent.name for path in [*_ROOT.glob("*/config.json"), *_ROOT.glob("configs/*/config.json")])


def find(name: str) -> Path:
    """Folder of the zoo model ``name``: a config.json and, for demo-moe, weights and tokenizer beside it.

    Raises HetcompError, listing the names, if there is no such model.
    """
    if name in names():
        for folder in (_ROOT / name, _ROOT / "configs" / name):
            if (folder / "config.json").is_file():
                return folder
    raise HetcompError(f"The zoo has no model {name!r}; it has {', '.join(names())}.")


def unsupported(name: str) -> str | None:
    """Why the zoo model ``name`` cannot be traced yet; None if it can."""
    note = _ROOT / "configs" / name / "unsupported.txt"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def evaluation_texts() -> list[Path]:
    """Small texts of several domains (``models_zoo/eval``), held out of demo-moe's training; see DATA.md."""
    return sorted((_ROOT / "eval").glob("*.txt"))


def routing_traces() -> dict[str, Path]:
    """Recorded routing of demo-moe (files that ``RoutingTrace.read`` reads), by the name of the text of ``eval``."""
    return {path.stem: path for path in sorted((_ROOT / "demo-moe" / "routing").glob("*.safetensors"))}
