"""A checkpoint with an adapter merged in: the base's files, with the adapted tensors written anew in place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from hetcomp.adapters.base_model import BaseModel
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter, Floats, Stored, to_f32
from hetcomp.adapters.tensor_file import refuse_existing, rounded
from hetcomp.artifact.staging import staged_folder
from hetcomp.errors import HetcompError
from hetcomp.frontend import Imported
from hetcomp.frontend.key_mapping import TensorPlace
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.ir.plan import CheckpointTensor

# What a model folder has besides weights and code.
_DOCUMENTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*")
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def export_merged(adapter: Adapter, base: BaseModel, imported: Imported, out: Path) -> None:
    """Writes the base's folder again, in the same files and dtypes, with the deltas added in f32 and rounded once. One
    tensor and its delta are in memory at a time.

    Raises HetcompError if the base has no safetensors files, if they do not hold all that the adapter changes, or if
    ``out`` exists or cannot be written.
    """
    folder = imported.folder
    if folder is None or imported.checkpoint is None or imported.onnx is not None:
        raise HetcompError(f"{base.name} has no weights to merge into; give a folder with safetensors files.")
    refuse_existing(out)
    with staged_folder(out) as staging:
        merged: set[tuple[str, int, int]] = set()
        for path in sorted(folder.glob("*.safetensors")):
            shutil.copyfile(path, staging / path.name)
            with (staging / path.name).open("r+b") as file:
                for name, tensor in read_header(path).items():
                    place = base.mapping.place(name)
                    weight = base.weights.get(place.parameter)
                    adapted = adapter.weights.get(weight.fqn) if weight is not None else None
                    if adapted is None:
                        continue
                    file.seek(tensor.offset)
                    numbers = np.frombuffer(file.read(tensor.bytes), _NUMPY[tensor.dtype]).reshape(tensor.shape)
                    file.seek(tensor.offset)
                    file.write(_added(adapted, place, tensor, numbers).tobytes())
                    merged.add((adapted.fqn, place.expert, place.part))
        _refuse_missing(adapter, merged, str(folder))
        for pattern in _DOCUMENTS:
            for path in folder.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, staging / path.name)


def _added(weight: AdaptedWeight, place: TensorPlace, tensor: CheckpointTensor, numbers: Stored) -> Stored:
    """The tensor with its part of the delta, in its own dtype."""
    changed: Floats = to_f32(numbers) if numbers.dtype == np.uint16 else numbers.astype(np.float32)
    if place.expert >= 0:
        delta = weight.delta(place.expert)
        rows = len(delta) // place.parts
        changed += delta[place.part * rows : (place.part + 1) * rows]
    elif weight.experts is not None:
        for expert in range(weight.experts):
            changed[expert] += weight.delta(expert)
    else:
        changed += weight.delta()
    return rounded(changed, tensor.dtype)


def _refuse_missing(adapter: Adapter, merged: set[tuple[str, int, int]], where: str) -> None:
    """Every weight is there whole, or in parts of every expert."""
    for weight in adapter.weights.values():
        found = {(expert, part) for fqn, expert, part in merged if fqn == weight.fqn}
        experts = {expert for expert, _ in found if expert >= 0}
        if not found or (experts and len(experts) != weight.experts):
            raise HetcompError(f"{where} does not hold all of {weight.fqn}, which adapter {adapter.name} changes.")
