"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hetcomp.errors import HetcompError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="HF folder, zoo name, or (plan) an artifact.")]
Hw = Annotated[str, typer.Option("--hw", help="auto, preset:NAME, or a profile file.")]
Formats = Annotated[
    str,
    typer.Option("--formats", help="auto, f32, bf16, q8, fp8, q4, mxfp4, or role=format,.. (experts, attention, ..)."),
]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Positions of the KV cache.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences kept at once.")]
IsaList = Annotated[str, typer.Option("--isa", help="auto (the profile's), or a list: avx512,avx2.")]
StopAfter = Annotated[str | None, typer.Option("--stop-after", metavar="PASS", help="Print the plan after PASS.")]
DumpDir = Annotated[Path | None, typer.Option("--dump-dir", help="Write the plan after every pass here.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def formats_of(text: str) -> str | dict[str, str]:
    """One format for all roles, or formats by role. Raises HetcompError."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    for role, equals, form in pairs:
        if not (role and equals and form):
            raise HetcompError(f"--formats {text} is not understood; write one format or role=format,role=format.")
    return {role.strip(): form.strip() for role, _, form in pairs}


def isas_of(text: str) -> list[str] | None:
    """Instruction sets, None for the profile's best."""
    return None if text == "auto" else [part.strip() for part in text.split(",")]
