"""Finds where an .onnx file holds the numbers of its tensors, so that they are read when they are needed.

onnx.load would have all of them in memory, up to protobuf's limit of 2 GB. The file is walked once by its wire format
(protobuf.dev/programming-guides/encoding), and what remains without the large numbers is loaded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Numbers of fields in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.name and .raw_data.
_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KEPT = 4096  # bytes of a tensor that stay where they are


@dataclass(frozen=True)
class Place:
    """Bytes ``offset`` to ``offset + size`` of the file."""

    offset: int
    size: int


def without_data(path: Path) -> tuple[bytes, dict[str, Place]]:
    """The model without the numbers of its larger tensors, and where these are by the tensor's name. Raises OSError,
    and ValueError for what is no protobuf message."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            places: dict[str, Place] = {}
            return _model(data, places), places


@dataclass(frozen=True)
class _Field:
    """``start`` .. ``stop``: with its tag; ``content`` .. ``stop``: what is behind tag and length."""

    number: int
    wire: int
    start: int
    content: int
    stop: int


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        wire, content = tag & 7, at
        if wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire == _BYTES:
            size, content = _varint(data, at, end)
            at = content + size
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"byte {start} begins no field")
        if at > end:
            raise ValueError(f"the field at byte {start} ends behind the message that it is in")
        yield _Field(tag >> 3, wire, start, content, at)


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"the number before byte {at} does not end")


def _model(data: mmap.mmap, places: dict[str, Place]) -> bytes:
    out = bytearray()
    for field in _fields(data, 0, len(data)):
        if (field.number, field.wire) == (_GRAPH, _BYTES):
            out += _message(_GRAPH, _graph(data, field, places))
        else:
            out += data[field.start : field.stop]
    return bytes(out)


def _graph(data: mmap.mmap, graph: _Field, places: dict[str, Place]) -> bytes:
    out = bytearray()
    for field in _fields(data, graph.content, graph.stop):
        if (field.number, field.wire) == (_INITIALIZER, _BYTES) and field.stop - field.content > _KEPT:
            out += _message(_INITIALIZER, _tensor(data, field, places))
        else:
            out += data[field.start : field.stop]
    return bytes(out)


def _tensor(data: mmap.mmap, tensor: _Field, places: dict[str, Place]) -> bytes:
    fields = list(_fields(data, tensor.content, tensor.stop))
    large = [f for f in fields if (f.number, f.wire) == (_RAW_DATA, _BYTES) and f.stop - f.content > _KEPT]
    name = next((bytes(data[f.content : f.stop]) for f in fields[::-1] if (f.number, f.wire) == (_NAME, _BYTES)), b"")
    if large:
        last = large[-1]
        places[name.decode("utf-8", errors="replace")] = Place(last.content, last.stop - last.content)
    return b"".join(data[f.start : f.stop] for f in fields if f not in large)


def _message(number: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | _BYTES]) + bytes(length) + content
