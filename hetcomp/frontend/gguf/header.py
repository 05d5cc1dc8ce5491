"""Headers of GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read with every bound checked.

gguf-py's GGUFReader believes the counts, lengths and offsets of a file, which comes from anywhere, and makes several
objects an array element; hence a reader of our own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.block_types import BLOCK_TYPES, BlockType
from hetcomp.ir.plan import CheckpointTensor

# An array of texts, or of numbers; arrays of arrays are in no model.
Array = list[str] | npt.NDArray[np.generic]
Fact = int | float | bool | str | Array

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
# The largest vocabularies take some 10 MB.
_MAX_HEADER = 1 << 29
# The specification's; llama.cpp's tensor names have at most 64.
_MAX_KEY, _MAX_NAME = 65535, 255
_STRING, _ARRAY = 8, 9  # of gguf_metadata_value_type
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Header:
    """``facts``: the metadata by key. ``tensors``: shapes as numpy has them, the innermost axis last; ``dtype`` is the
    name of the block type."""

    facts: Mapping[str, Fact]
    tensors: Mapping[str, CheckpointTensor]


def shown(fact: Fact | None) -> str:
    """A fact in a message: on one line, and short."""
    text = f"an array of {len(fact)}" if isinstance(fact, list | np.ndarray) else ascii(fact)
    return text if len(text) < 60 else f"{text[:57]}..."


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises HetcompError naming the file and what is wrong."""
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, path)
    except OSError as error:
        raise HetcompError(f"cannot read {path}: {error.strerror or error}") from error


def parse_header(stream: BinaryIO, size: int, path: Path) -> Header:
    """As :func:`read_header`, of a stream with ``size`` bytes; ``path`` names it."""
    cursor = _Cursor(stream, size, path)
    _check_start(cursor)
    tensors, facts = cursor.number("<Q"), cursor.number("<Q")
    # A fact takes at least 13 bytes, a tensor 32.
    cursor.check_count("tensors", tensors, 32)
    cursor.check_count("facts", facts, 13)
    found: dict[str, Fact] = {}
    for _ in range(facts):
        key = cursor.name("a key", _MAX_KEY)
        if key in found:
            raise HetcompError(f"{path}: the key {key} is there twice in the metadata")
        found[key] = _fact(cursor, key)
    alignment = found.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise HetcompError(f"{path}: general.alignment is {shown(alignment)}; expected a power of two")
    entries = [_entry(cursor) for _ in range(tensors)]
    start = cursor.at + -cursor.at % alignment
    by_name: dict[str, CheckpointTensor] = {}
    for entry in entries:
        if entry.name in by_name:
            raise HetcompError(f"{path}: the tensor {entry.name} is there twice")
        by_name[entry.name] = _placed(entry, start, alignment, path)
    _check_extent(path, list(by_name.values()), size)
    return Header(found, by_name)


class _Cursor:
    """Reads on and on, never beyond the end of the file or of what a header may take."""

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self._stream, self._size, self._limit = stream, size, min(size, _MAX_HEADER)
        self.path = path
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self._limit - self.at:
            end = "the file" if self._limit == self._size else f"the {_MAX_HEADER} bytes that a header may take"
            raise HetcompError(
                f"{self.path} is truncated or damaged: {what} of {count} bytes at byte {self.at} goes beyond the end "
                f"of {end}"
            )
        data = self._stream.read(count)
        if len(data) != count:
            raise HetcompError(f"{self.path} was truncated while it was read")
        self.at += count
        return data

    def number(self, form: str) -> int:
        found: int = struct.unpack(form, self.take(struct.calcsize(form), "a number"))[0]
        return found

    def check_count(self, what: str, count: int, each: int) -> None:
        """Raises HetcompError if so many ``what`` of at least ``each`` bytes are more than the file can hold."""
        if count * each > self._limit - self.at:
            raise HetcompError(f"{self.path} is truncated or damaged: it cannot hold the {count} {what} that it names")

    def text(self, what: str) -> str:
        at = self.at
        try:
            return self.take(self.number("<Q"), what).decode("utf-8")
        except UnicodeDecodeError:
            raise HetcompError(f"{self.path} is damaged: {what} at byte {at} is not UTF-8") from None

    def name(self, what: str, longest: int) -> str:
        """A text that can be shown."""
        at = self.at
        found = self.text(what)
        if not found.isprintable() or not 1 <= len(found) <= longest:
            raise HetcompError(
                f"{self.path} is damaged: {what} at byte {at} is not 1 to {longest} printable characters"
            )
        return found


def _check_start(cursor: _Cursor) -> None:
    path = cursor.path
    if cursor.take(4, "the magic") != _MAGIC:
        raise HetcompError(f"{path} is no GGUF file: it does not begin with GGUF")
    version = cursor.number("<I")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS and swapped in _VERSIONS:
        raise HetcompError(f"{path} is a big-endian GGUF file; hetcomp reads little-endian ones, convert it again")
    if version not in _VERSIONS:
        raise HetcompError(f"{path} is a GGUF file of version {version}; hetcomp reads versions 2 and 3")


def _fact(cursor: _Cursor, key: str) -> Fact:
    kind = cursor.number("<I")
    if kind == _STRING:
        return cursor.text(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise HetcompError(f"{cursor.path}: {key} has the unknown metadata type {kind}")
    dtype = _SCALARS[kind]
    value = np.frombuffer(cursor.take(dtype.itemsize, key), dtype)[0]
    # The shortest decimal number that is this f32: 1e-06, as the config had it.
    fact: Fact = float(str(value)) if dtype == np.float32 else value.item()
    return fact


def _array(cursor: _Cursor, key: str) -> Array:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind == _STRING:
        cursor.check_count(f"texts of {key}", count, 8)
        return [cursor.text(key) for _ in range(count)]
    if kind not in _SCALARS:
        raise HetcompError(f"{cursor.path}: {key} is an array of the metadata type {kind}, which no model has")
    dtype = _SCALARS[kind]
    cursor.check_count(f"numbers of {key}", count, dtype.itemsize)
    numbers: npt.NDArray[np.generic] = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)
    return numbers


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.name("a tensor's name", _MAX_NAME)
    dims = cursor.number("<I")
    if not 1 <= dims <= _MAX_DIMS:
        raise HetcompError(f"{cursor.path}: tensor {name} has {dims} axes; expected 1 to {_MAX_DIMS}")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, "a shape"))
    return _Entry(name, shape[::-1], cursor.number("<I"), cursor.number("<Q"))


def _placed(entry: _Entry, start: int, alignment: int, path: Path) -> CheckpointTensor:
    where = f"{path}: tensor {entry.name}"
    kind = BLOCK_TYPES.get(entry.kind)
    if kind is None:
        raise HetcompError(f"{where} has the unknown type {entry.kind}")
    if 0 in entry.shape or entry.shape[-1] % kind.size:
        raise HetcompError(
            f"{where} has the shape {list(entry.shape)}; expected rows of whole {kind.name} blocks, which "
            f"hold {kind.size} numbers each"
        )
    if entry.offset % alignment:
        raise HetcompError(f"{where} begins at offset {entry.offset}, which is no multiple of {alignment}")
    return CheckpointTensor(
        path.name, entry.name, kind.name, entry.shape, start + entry.offset, _bytes(entry.shape, kind)
    )


def _bytes(shape: tuple[int, ...], kind: BlockType) -> int:
    return math.prod(shape) // kind.size * kind.bytes


def _check_extent(path: Path, tensors: list[CheckpointTensor], size: int) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end:
            raise HetcompError(f"{path}: tensor {tensor.name} overlaps another one in the file")
        end = tensor.offset + tensor.bytes
        if end > size:
            raise HetcompError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {end}, the file has {size} bytes; download it "
                "again"
            )
