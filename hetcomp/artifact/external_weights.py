"""Weights that an artifact refers to in the files that it was compiled from, instead of having a copy of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from hetcomp.artifact.weight_files import Chunk, tensor_name
from hetcomp.backends import packing
from hetcomp.errors import HetcompError
from hetcomp.ir.native_format import native_format
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import Value, ValueKind
from hetcomp.prefetch import prefetch
from hetcomp.stored_rows import Places, StoredRows, runs_of

_FLOAT_FORMATS = ("f32", "bf16")


class RowReader(Protocol):
    """What is asked of a checkpoint: :meth:`hetcomp.frontend.checkpoint.BaseCheckpoint.stored_rows`."""

    def stored_rows(self, value: Value, by_number: bool) -> StoredRows | str:
        """Where the rows of a weight lie, or (``by_number``) each of its numbers; or why they cannot be used."""
        ...


@dataclass(frozen=True)
class ExternalRecord:
    """A weight in other files. ``stored``: how its bytes are made, as the runtime reads it; ``bytes`` and ``xxh3_64``
    are those in memory."""

    name: str
    bytes: int
    xxh3_64: str
    stored: Mapping[str, Any]
    node: int = 0

    def place(self) -> dict[str, Any]:
        """Where the weight is, for a manifest."""
        return {"stored": self.stored}


class ExternalWeights:
    """Which weights need no copy. ``cuts``: by id of a part the checkpoint's weight, and the cut. ``changed``: names of
    parameters whose numbers are not those of the files."""

    def __init__(
        self, reader: RowReader, cuts: Mapping[str, tuple[Value, Cut]], changed: frozenset[str] = frozenset()
    ) -> None:
        self._reader = reader
        self._cuts = cuts
        self._changed = changed
        self._files: dict[Path, dict[str, Any]] = {}
        self._known: dict[str, dict[str, Any] | str] = {}
        # Bytes in memory that are packed into the artifact all the same, by reason.
        self.packed: Counter[str] = Counter()

    def sources(self) -> list[dict[str, Any]]:
        """The files, by the numbers that ``stored`` has of them, as they were when they were first asked for."""
        return list(self._files.values())

    def stored(self, value: Value) -> dict[str, Any] | None:
        """How the weight's bytes are made of the files; None if they are packed into the artifact."""
        if value.id not in self._known:
            rows = self._rows(value)
            self._known[value.id] = rows if isinstance(rows, str) else self._described(value, rows)
            if isinstance(rows, str):
                self.packed[rows] += packing.packed_bytes(value)
        found = self._known[value.id]
        return None if isinstance(found, str) else found

    def _rows(self, value: Value) -> StoredRows | str:
        """The weight's rows, or why there are none."""
        if value.kind is ValueKind.CONST:
            return "computed when compiling"
        whole, cut = self._cuts.get(value.id, (value, None))
        if value.fqn in self._changed or whole.fqn in self._changed:
            return "merged with an adapter"
        by_number = value.type.layout == packing.ROW_MAJOR
        native = native_format(whole, value.type.layout)
        if native is not None and (by_number or native.format != value.format or native.inexact):
            return f"converted from {native.label} to {'f32' if by_number else value.format}"
        if native is None and not by_number and value.format not in _FLOAT_FORMATS:
            return f"quantised to {value.format}"
        if cut is not None and cut.zero:
            return "zeros"
        rows = self._reader.stored_rows(whole, by_number)
        if cut is None or isinstance(rows, str):
            return rows
        wanted = rows.cut(0, cut.experts) if cut.experts else rows
        part = None if wanted is None else wanted.cut(cut.axis, cut.runs)
        return "cut within a block of columns" if part is None else part

    def _described(self, value: Value, rows: StoredRows) -> dict[str, Any]:
        shape = [int(d) for d in value.type.shape]
        by_number = value.type.layout == packing.ROW_MAJOR
        count = 1 if by_number else packing.matrices(value)
        numbers = {i: self._number(file) for i, file in enumerate(rows.files)}

        def matrices(places: Places) -> list[list[list[int]]]:
            each = places.reshape(count, -1)
            return [[[numbers[file], *run] for file, *run in runs_of(matrix)] for matrix in each]

        entry: dict[str, Any] = {
            "format": "f32" if by_number else value.format,
            "layout": value.type.layout,
            "numbers": rows.numbers,
            "rows": int(np.prod(shape)) if by_number else shape[-2],
            "columns": rows.columns,
            "matrices": matrices(rows.places),
        }
        if rows.line:
            entry["line"] = rows.line
        if rows.scales is not None and rows.scales.line:
            entry["scale_line"] = rows.scales.line
        if rows.scales is not None:
            entry |= {
                "scales": rows.scales.type,
                "scale_columns": rows.scales.columns,
                "scale_matrices": matrices(rows.scales.places),
            }
        return entry

    def _number(self, file: Path) -> int:
        if file not in self._files:
            try:
                found = file.stat()
            except OSError as error:
                raise HetcompError(f"cannot read {file}: {error.strerror or error}") from error
            self._files[file] = {"path": str(file), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
        return list(self._files).index(file)


def record_external(
    values: Sequence[Value],
    external: ExternalWeights,
    chunks: Generator[Chunk],
    advance: Callable[[int, str], None],
) -> list[ExternalRecord]:
    """Reads and packs the weights as :func:`hetcomp.artifact.weight_files.write_weights` does, but keeps only the hash
    that the runtime must find when it has made them again. Raises as that."""
    records = []
    with closing(prefetch(chunks, "hetcomp-pack")) as stream:
        for value in values:
            digest, size, name = xxhash.xxh3_64(), packing.packed_bytes(value), tensor_name(value)
            stored, done = external.stored(value), 0
            while done < size:
                owner, chunk = next(stream, (None, None))
                if owner is not value or chunk is None or done + chunk.size > size:
                    raise HetcompError(f"Weight {name} does not pack to the plan's {size} bytes; report this bug.")
                digest.update(chunk.data)
                done += chunk.size
                advance(chunk.size, name)
                del chunk  # before the next one is asked for
            assert stored is not None
            records.append(ExternalRecord(name, size, digest.hexdigest(), stored))
    return records
