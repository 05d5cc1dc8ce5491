"""Texts as windows of tokens, for running a model of transformers on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from hetcomp.errors import HetcompError
from hetcomp.frontend.source import ModelSource

WINDOW = 512
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def token_ids(source: ModelSource, text: Path) -> list[int]:
    """Token ids of the UTF-8 file ``text``. Raises HetcompError if it cannot be read, has fewer than two tokens, or the
    model has no tokenizer."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Text {text} cannot be read: {error}; expected a UTF-8 file.") from None
    # Without any of these transformers makes a tokenizer that knows no words.
    if source.folder is None or not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise HetcompError(f"{source.name} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is in its folder.")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise HetcompError(f"{source.name} has no tokenizer that transformers can read: {reason}") from error
    ids: list[int] = tokenizer(content, verbose=False).input_ids
    if len(ids) < 2:
        raise HetcompError(f"Text {text} has {len(ids)} tokens; some thousands are needed.")
    return ids


def all_windows(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The texts, cut into windows of at most WINDOW tokens."""
    return [list(ids[i : i + WINDOW]) for ids in texts for i in range(0, len(ids), WINDOW)]


def spread_windows(texts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Windows of at most WINDOW tokens, about ``tokens`` in all, an equal part of every text and evenly spread over
    it."""
    share = max(2, tokens // len(texts))
    found: list[list[int]] = []
    for ids in texts:
        length = min(WINDOW, share, len(ids))
        count = max(1, min(share, len(ids)) // length)
        step = (len(ids) - length) / max(1, count - 1)
        starts = [round(i * step) for i in range(count)]
        found += [list(ids[start : start + length]) for start in starts]
    return found
