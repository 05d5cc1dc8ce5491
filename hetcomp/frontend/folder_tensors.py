"""Which tensors a folder of safetensors files has."""

from __future__ import annotations

import json
from pathlib import Path

from hetcomp.errors import HetcompError
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.ir.plan import CheckpointTensor

_INDEX = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """True if the folder holds safetensors files (or an index of them). Raises HetcompError if it has weights
    in another format only."""
    if (folder / _INDEX).is_file() or any(folder.glob("*.safetensors")):
        return True
    other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
    if other:
        advice = "save the model again with save_pretrained"
        if other[0].endswith(".gguf"):
            advice = "give that file instead of the folder"
        raise HetcompError(f"{folder} has weights as {other[0]} only; hetcomp reads safetensors ({advice})")
    return False


def folder_tensors(folder: Path) -> dict[str, CheckpointTensor]:
    """The tensors of a folder's safetensors files, from their headers. Raises HetcompError naming what is missing."""
    index = folder / _INDEX
    if index.is_file():
        return _indexed_tensors(folder, index)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise HetcompError(
            f"{folder} has {len(files)} safetensors files and neither model.safetensors nor {_INDEX}, so it "
            "is unclear which belong to the model"
        )
    return read_header(files[0])


def _indexed_tensors(folder: Path, index: Path) -> dict[str, CheckpointTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HetcompError(f"{index} is no valid index of safetensors files: {error}") from error
    headers: dict[str, dict[str, CheckpointTensor]] = {}
    for file in sorted(set(items.values())):
        path = folder / file
        if path.name != file:
            raise HetcompError(f"{index} names {file}, which is not a plain file name")
        if not path.is_file():
            missing = sum(f == file for f in items.values())
            raise HetcompError(
                f"{folder}: the shard {file} is missing; {_INDEX} says that it holds {missing} tensors. "
                "Download it again"
            )
        headers[file] = read_header(path)
    out = {}
    for name, file in items.items():
        if name not in headers[file]:
            raise HetcompError(f"{index} says that {file} holds the tensor {name}, but it does not")
        out[name] = headers[file][name]
    return out
