"""Where the weights of an artifact are: in it, or in files that it refers to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetcomp.errors import HetcompError

_ALIGNMENT = 64  # of what can be used where it is mapped


@dataclass(frozen=True)
class SourceFile:
    """A file outside of the artifact. ``state``: as it was, touched (written since, which is looked at when loading),
    of another size, or missing."""

    path: str
    bytes: int
    state: str


@dataclass(frozen=True)
class WeightPlaces:
    """Bytes of weights in memory: ``packed`` in the artifact's own files, ``repacked`` from others when it is loaded,
    ``mapped`` from others as they are. ``reasons``: why what is packed is not elsewhere too, with its bytes; empty if
    nobody wanted it to be."""

    packed: int
    repacked: int
    mapped: int
    sources: tuple[SourceFile, ...]
    reasons: Mapping[str, int]

    def in_words(self) -> str:
        """One line, one more for each source and reason."""
        lines = [f"weights: {in_words(self.packed)} in the artifact"]
        if self.sources:
            lines[0] += (
                f", {in_words(self.repacked)} repacked from other files when it is loaded, {in_words(self.mapped)} "
                "mapped from them"
            )
        lines += [f"  in the artifact, {in_words(count)}: {reason}" for reason, count in self.reasons.items()]
        lines += [f"  needs {s.path} ({in_words(s.bytes)}, {s.state})" for s in self.sources]
        return "\n".join(lines)


def inspect_artifact(artifact: Path) -> WeightPlaces:
    """Reads the manifest and the GPUs' programs. Raises HetcompError if they are missing or damaged."""
    try:
        documents = list(_documents(artifact))
    except FileNotFoundError as error:
        raise HetcompError(f"{artifact} is not a hetcomp artifact: it has no {Path(error.filename).name}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HetcompError(f"{artifact} cannot be read: {error}; copy or compile it anew.") from error
    with_gpu = len(documents) > 1  # then nothing is mapped from elsewhere
    counted: Counter[str] = Counter()
    files: dict[str, SourceFile] = {}
    for document, weights in documents:
        for source in document.get("sources", ()):
            files[source["path"]] = SourceFile(source["path"], source["bytes"], _state(source))
        for weight in weights:
            counted["repacked" if with_gpu and "stored" in weight else _place(weight)] += weight["bytes"]
    return WeightPlaces(
        counted["packed"],
        counted["repacked"],
        counted["mapped"],
        tuple(files.values()),
        documents[0][0].get("packed_because", {}),
    )


def _documents(artifact: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The manifest, then each GPU's program, with the weights that it lists."""
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    yield manifest, manifest["weights"]
    for gpu in manifest.get("gpus", ()):
        program = json.loads((artifact / gpu["program"]).read_text(encoding="utf-8"))
        weights = [s for b in program["buffers"] if b["kind"] == "weight" for s in b.get("sources", ())]
        yield program, weights


def _place(weight: Mapping[str, Any]) -> str:
    """As StoredWeight::in_place of the runtime decides."""
    stored = weight.get("stored")
    if stored is None:
        return "packed"
    first = stored["matrices"][0]
    as_it_is = (
        stored["layout"] == "row_major"
        and stored["numbers"] == "F32"
        and len(first) == 1
        and first[0][3] == 4
        and first[0][1] % _ALIGNMENT == 0
        and weight["bytes"] == 4 * stored["rows"]
    )
    return "mapped" if as_it_is else "repacked"


def _state(source: Mapping[str, Any]) -> str:
    try:
        now = Path(source["path"]).stat()
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
    if now.st_size != source["bytes"]:
        return f"of {now.st_size} bytes now"
    return "as it was" if now.st_mtime_ns == source["mtime_ns"] else "touched since"


def in_words(count: int) -> str:
    """Bytes for people."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count} bytes"
