"""GGUF files, written one tensor at a time (version 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetcomp.adapters.tensor_file import NewTensor, new_file

_MAGIC, _VERSION = b"GGUF", 3
_ALIGNMENT = 32  # of tensors, unless general.alignment says another
_FLOAT32, _STRING = 6, 8  # of gguf_metadata_value_type
_F32 = 0  # of ggml_type


def write_gguf(path: Path, facts: Mapping[str, str | float], tensors: Sequence[NewTensor]) -> None:
    """Writes a new file with the key-value pairs ``facts`` and f32 tensors. Raises HetcompError as new_file."""
    assert all(tensor.dtype == "F32" for tensor in tensors)
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(facts)))
    for key, value in facts.items():
        header += _string(key)
        is_text = isinstance(value, str)
        header += struct.pack("<I", _STRING if is_text else _FLOAT32)
        header += _string(str(value)) if is_text else struct.pack("<f", value)
    offset = 0
    for tensor in tensors:
        # ggml counts axes from the innermost.
        shape = tensor.shape[::-1]
        header += _string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _F32, offset)
        offset += _padded(4 * math.prod(shape))
    with new_file(path) as file:
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for tensor in tensors:
            numbers = tensor.make()
            assert numbers.shape == tensor.shape
            data = numbers.astype("<f4").tobytes()
            file.write(data + bytes(_padded(len(data)) - len(data)))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT
