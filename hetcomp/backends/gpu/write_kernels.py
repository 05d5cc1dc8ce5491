"""Writes an artifact's ``gpu/`` folder: cubins by architecture and ``kernels.json``, their launch table."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetcomp.backends.gpu.compile_kernels import CompiledKernel
from hetcomp.backends.gpu.tile_choices import MeasuredTile

_SCHEMA = [1, 0]


def write_kernels(kernels: Sequence[CompiledKernel], folder: Path, tiles: Sequence[MeasuredTile] = ()) -> list[str]:
    """Writes ``sm_<cc>/<name>.cubin`` for every kernel and ``kernels.json`` into ``folder`` and returns the files'
    names relative to it. ``tiles``: those that were measured, for whoever wants to know; nothing reads them."""
    written = []
    table = []
    for made in kernels:
        file = f"sm_{made.cc}/{made.kernel.name}.cubin"
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made.cubin, target)
        written.append(file)
        table.append(_entry(made, file))
    measured = [{"launches": tile.key, "candidate": tile.chosen, "us": tile.us} for tile in tiles]
    text = json.dumps({"schema": _SCHEMA, "kernels": table, "tiles": measured}, indent=1)
    (folder / "kernels.json").write_text(text, encoding="utf-8")
    return [*written, "kernels.json"]


def _entry(made: CompiledKernel, file: str) -> dict[str, Any]:
    return {
        "name": made.kernel.name,
        "entry": made.entry,
        "cc": made.cc,
        "file": file,
        "sha256": hashlib.sha256(made.cubin.read_bytes()).hexdigest(),
        "num_warps": made.num_warps,
        "shared_bytes": made.shared_bytes,
        "global_scratch_bytes": made.global_scratch_bytes,
        "arguments": [
            {"name": name, "type": "ptr" if kind.startswith("*") else kind} for name, kind in made.kernel.arguments
        ],
    }
