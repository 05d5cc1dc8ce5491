"""Headers of safetensors files, read with every bound checked: files come from anywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypeGuard

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import CheckpointTensor

# Bits of an element; the format's own list (safetensors 0.6).
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "C64": 64,
}
_MAX_HEADER = 100_000_000  # safetensors' own limit


def read_header(path: Path) -> dict[str, CheckpointTensor]:
    """Tensors of a safetensors file by name. Raises HetcompError naming the file and what is wrong."""
    header, data_start, size = _json_header(path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in header.items()}
    _check_extent(path, list(tensors.values()), size)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself besides its tensors. Raises HetcompError as :func:`read_header` does."""
    found = _json_header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise HetcompError(f"{path}: the metadata of the safetensors header is not text by name")
    return found


def _json_header(path: Path) -> tuple[dict[str, object], int, int]:
    """The header, where the data begins, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise HetcompError(f"{path} is truncated or no safetensors file: it has {size} bytes")
            if length > _MAX_HEADER:
                raise HetcompError(f"{path}: a header of {length} bytes is longer than the format allows")
            text = file.read(length)
    except OSError as error:
        raise HetcompError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HetcompError(f"{path}: the safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise HetcompError(f"{path}: the safetensors header is not a JSON object")
    return header, 8 + length, size


def _tensor(path: Path, name: str, entry: object, data_start: int) -> CheckpointTensor:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise HetcompError(f"{where} has no valid header entry")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _BITS:
        raise HetcompError(f"{where} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HetcompError(f"{where} has a damaged shape or damaged offsets in the header")
    expected = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise HetcompError(
            f"{where} of shape {list(shape)} and dtype {dtype} needs {expected} bytes, its header gives it "
            f"{offsets[1] - offsets[0]}"
        )
    return CheckpointTensor(path.name, name, dtype, tuple(shape), data_start + offsets[0], expected)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_extent(path: Path, tensors: list[CheckpointTensor], size: int) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.bytes)):
        if tensor.offset < end:
            raise HetcompError(f"{path}: tensor {tensor.name} overlaps another one in the file")
        end = max(end, tensor.offset + tensor.bytes)
    if end > size:
        raise HetcompError(
            f"{path} is truncated: its header names data up to byte {end}, the file has {size} bytes; download it again"
        )
