"""Packed weights on disk: safetensors files of raw bytes, written as a stream.

Every tensor is U8 (its packed layout is in the plan) and begins at a multiple of 64 bytes of the file, so that it
can be used where it is mapped. The header is padded with spaces to reach that, as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import Value
from hetcomp.prefetch import prefetch

ALIGNMENT = 64
DATA_ALIGNMENT = 4096  # of the first tensor in a file: a page
SHARD_BYTES = 4 << 30

Chunk = tuple[Value, NDArray[np.uint8]]  # contiguous bytes of a weight


@dataclass(frozen=True)
class WeightRecord:
    """Where a packed weight is. ``offset`` counts from the start of the file; ``node`` indexes the artifact's NUMA
    nodes."""

    name: str
    file: str
    offset: int
    bytes: int
    xxh3_64: str
    node: int = 0

    def place(self) -> dict[str, Any]:
        """Where the weight is, for a manifest."""
        return {"file": self.file, "offset": self.offset}


def write_weights(
    values: Sequence[Value],
    sizes: Sequence[int],
    chunks: Generator[Chunk],
    folder: Path,
    advance: Callable[[int, str], None],
    stem: str = "weights",
    shard_bytes: int = SHARD_BYTES,
) -> list[WeightRecord]:
    """Streams the packed weights into ``<stem>-NNNNN.safetensors`` files of about ``shard_bytes``.

    values, sizes: the weights and their packed bytes (multiples of 64). ``chunks`` yields the values' bytes in the same
    order, in chunks of any size; the next chunk is made while the last is written, in a thread of its own, and no more
    than these two exist. ``advance(bytes, name)`` is called after each chunk. Raises HetcompError if a weight packs to
    another size than announced; what ``chunks`` raises and OSError of the disk pass through.
    """
    records: list[WeightRecord] = []
    with closing(prefetch(chunks, "hetcomp-pack")) as stream:
        for number, shard in enumerate(_shards(list(zip(values, sizes, strict=True)), shard_bytes), start=1):
            file = f"{stem}-{number:05d}.safetensors"
            records.extend(_write_shard(shard, stream, folder, file, advance))
    return records


def _shards(items: list[tuple[Value, int]], limit: int) -> Iterator[list[tuple[Value, int]]]:
    shard: list[tuple[Value, int]] = []
    filled = 0
    for value, size in items:
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append((value, size))
        filled += size
    if shard:
        yield shard


def _write_shard(
    shard: list[tuple[Value, int]],
    chunks: Iterator[Chunk],
    folder: Path,
    file: str,
    advance: Callable[[int, str], None],
) -> list[WeightRecord]:
    names = [tensor_name(value) for value, _ in shard]
    header = _header(names, [size for _, size in shard])
    records = []
    with create(folder / file) as handle:
        handle.write(header)
        offset = len(header)
        for name, (value, size) in zip(names, shard, strict=True):
            digest = xxhash.xxh3_64()
            written = 0
            while written < size:
                owner, chunk = next(chunks, (None, None))
                if owner is not value or chunk is None or written + chunk.size > size:
                    raise HetcompError(f"Weight {name} does not pack to the plan's {size} bytes; report this bug.")
                handle.write(chunk.data)
                digest.update(chunk.data)
                written += chunk.size
                advance(chunk.size, name)
                del chunk  # before the next one is asked for
            records.append(WeightRecord(name, file, offset, size, digest.hexdigest()))
            offset += size
    return records


def create(path: Path) -> BinaryIO:
    """A new file of weights."""
    return path.open("wb")


def tensor_name(value: Value) -> str:
    """Name of a weight in the files: the parameter's name; cut-out parts of one carry the value's id."""
    if value.view is None or (value.view.head_split is None and not value.view.row_runs):
        return value.fqn or value.id
    return f"{value.fqn or value.id}#{value.id}"


def _header(names: Sequence[str], sizes: Sequence[int]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "hetcomp-packed"}}
    position = 0
    for name, size in zip(names, sizes, strict=True):
        if size % ALIGNMENT or name in entries:
            raise HetcompError(f"Weight {name} cannot be stored: {size} bytes, or its name is taken; report this bug.")
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % DATA_ALIGNMENT
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
