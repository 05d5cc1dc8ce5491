"""Writes sharded safetensors folders one tensor at a time: the shapes give the headers beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# safetensors' names of the element types written here.
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Shard:
    """One file and the names of its tensors in the order in which they are stored."""

    file: str
    tensors: tuple[str, ...]


def plan_shards(bytes_of: Mapping[str, int], max_shard_bytes: int) -> list[Shard]:
    """Fills shards in the given order; a shard is closed before it would exceed ``max_shard_bytes``."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in bytes_of.items():
        if groups[-1] and size + n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    count = len(groups)
    if count == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]


def write_shard(
    folder: Path,
    shard: Shard,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str], torch.Tensor],
) -> Iterator[int]:
    """Writes one shard; ``make(name)`` gives each tensor when its turn has come. Yields the bytes of each."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shard.tensors:
        n_bytes = torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with (folder / shard.file).open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in shard.tensors:
            tensor = make(name)
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: made {tensor.dtype}{list(tensor.shape)}, declared {dtype}{list(shapes[name])}"
                )
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            data.tofile(out)
            yield data.nbytes
        out.flush()
        os.fsync(out.fileno())


def write_index(folder: Path, shards: list[Shard], total_bytes: int) -> None:
    """Writes model.safetensors.index.json where there is more than one shard."""
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
