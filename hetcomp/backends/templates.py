"""The Jinja environment of the code templates."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

_PACKAGE = "hetcomp.codegen_templates"


@cache
def environment() -> Environment:
    """Environment over ``codegen_templates``; an undefined name in a template is an error."""
    return Environment(
        loader=FunctionLoader(_load),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(name: str, **values: Any) -> str:  # noqa: ANN401 - template variables are of any type
    """Renders ``codegen_templates/<name>``."""
    return environment().get_template(name).render(**values)


def _load(name: str) -> str | None:
    path = resources.files(_PACKAGE).joinpath(*name.split("/"))
    return path.read_text(encoding="utf-8") if path.is_file() else None
