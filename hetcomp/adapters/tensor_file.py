"""safetensors files written one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hetcomp.adapters.low_rank import Floats, Stored
from hetcomp.backends.packing import to_bf16_bits
from hetcomp.errors import HetcompError

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: ``make`` gives its numbers in f32, of ``shape``, when they are due."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Floats]


def write_safetensors(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Writes the file; numbers are rounded to their tensor's dtype."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * _BYTES[tensor.dtype]
        offsets = [position, position + size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            numbers = tensor.make()
            assert numbers.shape == tensor.shape
            file.write(rounded(numbers, tensor.dtype).tobytes())


def rounded(numbers: Floats, dtype: str) -> Stored:
    """The numbers in a dtype of safetensors, bf16 as bits."""
    if dtype == "BF16":
        return to_bf16_bits(numbers)
    return numbers.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])


def refuse_existing(path: Path) -> None:
    """Raises HetcompError if something has the name already."""
    if path.exists():
        raise HetcompError(f"{path} exists and is left alone; choose another name with --out.")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name ``path`` when the block ends without an exception, and is on the disk then. Raises
    HetcompError if something has the name already, or if it cannot be written."""
    refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise HetcompError(f"Cannot write {path}: {error.strerror or error}; nothing was left behind.") from error
