"""The Plan as JSON: canonical to write, strict to read."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import SCHEMA, Plan


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def to_json(plan: Plan) -> str:
    """The plan as JSON; equal plans give equal text."""
    return _adapter().dump_json(plan, indent=1).decode()


def from_json(text: str) -> Plan:
    """Reads a plan. Raises HetcompError if the text is no JSON, of another schema, or breaks the schema; the
    message names the path in the document."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise HetcompError(f"The plan is not valid JSON ({error}); it is damaged. Compile the model again.") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if not (isinstance(schema, list) and len(schema) == 2 and schema[0] == SCHEMA[0]):
        raise HetcompError(
            f"The plan has schema {schema}, this hetcomp reads {SCHEMA[0]}.x; "
            "compile the model again with this version, or update hetcomp."
        )
    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise HetcompError(f"The plan is damaged at {path}: {first['msg']}. Compile the model again.") from None


def read_plan(path: Path) -> Plan:
    """The plan in the file ``path``. Raises HetcompError, which names it, as :func:`from_json`, and if it cannot be
    read."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(f"Plan {path} cannot be read: {error}.") from None
    except HetcompError as error:
        raise HetcompError(f"{path}: {error}") from None


def plan_hash(plan: Plan) -> str:
    """SHA-256 (hex) of the plan's JSON text."""
    return hashlib.sha256(to_json(plan).encode()).hexdigest()
