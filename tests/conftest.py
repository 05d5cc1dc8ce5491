"""Options and fixtures of the whole suite."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Triton decides at its import whether kernels are interpreted, and torch imports it when it likes. Whoever compiles GPU
# kernels does it in processes of its own (hetcomp/backends/gpu/compile_worker.py), which do not listen to this.
os.environ["TRITON_INTERPRET"] = "1"

Golden = Callable[[Path, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` rewrites golden files instead of comparing with them."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files from what the code does")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden(path, text)``: the file at ``path`` must hold ``text``; the difference is shown."""
    update = request.config.getoption("--update-golden")

    def check(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        if kept != text:
            lines = difflib.unified_diff(
                kept.splitlines(), text.splitlines(), f"{path} (kept)", "now", lineterm="", n=2
            )
            shown = "\n".join(list(lines)[:80])
            pytest.fail(f"{path.name} is no longer true; look, then run pytest --update-golden:\n{shown}")

    return check
