"""A PEFT adapter folder: its config and its tensors in pairs, checked as far as that goes without a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hetcomp.adapters.config import CONFIG, AdapterConfig, read_config
from hetcomp.adapters.low_rank import Stored
from hetcomp.errors import HetcompError
from hetcomp.frontend.safetensors_header import read_header
from hetcomp.ir.plan import CheckpointTensor

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# Names become parts of paths and of messages: letters, digits, _ and - between dots.
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PAIRED = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The tensors of one target. ``path``: the module's name in the model that the adapter was made for, with
    ``.base_layer`` behind it for every wrapper that it is inside of. a: [rows, in]; b: [out, columns]; both mapped."""

    path: str
    a: Stored
    b: Stored
    dtype: str


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """What an adapter folder holds. ``sha256``: of both files' contents, the config's first."""

    folder: Path
    name: str
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    sha256: str


def read_folder(folder: str | Path) -> PeftFolder:
    """Reads an adapter folder; its tensors stay mapped.

    Raises HetcompError naming what is missing, damaged, not finite, of an unusable type or without its other half, or
    what the config asks for besides plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HetcompError(f"{folder} is no folder; give the folder that holds {CONFIG} and {WEIGHTS}.")
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = next((p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)), None)
        instead = f"; {pickled} may hold code, which is not run: save the adapter as safetensors" if pickled else ""
        raise HetcompError(f"{folder} has no {WEIGHTS}{instead}.")
    modules = _modules(path, read_header(path))
    return PeftFolder(folder, folder.resolve().name, config, modules, _sha256(folder / CONFIG, path))


def _modules(path: Path, tensors: Mapping[str, CheckpointTensor]) -> dict[str, LoraModule]:
    if not tensors:
        raise HetcompError(f"{path} holds no tensors.")
    data = np.memmap(path, np.uint8, mode="r")
    found: dict[str, dict[str, CheckpointTensor]] = {}
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name):
            raise HetcompError(f"{path}: {name!r} is no name of a module's tensor; the file is damaged or malicious.")
        matched = _PAIRED.fullmatch(name)
        if matched is None:
            raise HetcompError(
                f"{path}: tensor {name} is neither a lora_A nor a lora_B weight of a linear module or of experts; "
                "hetcomp applies nothing else, so it does not apply this adapter."
            )
        found.setdefault(matched["module"], {})[matched["side"]] = tensor
    modules = (_module(path, data, name, sides) for name, sides in found.items())
    return {module.path: module for module in modules}


def _module(path: Path, data: Stored, name: str, sides: Mapping[str, CheckpointTensor]) -> LoraModule:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise HetcompError(f"{path}: {name} has lora_{other} but no lora_{side}.")
    a, b = (_stored(path, data, sides[side]) for side in "AB")
    if 0 in a.shape or 0 in b.shape:
        raise HetcompError(
            f"{path}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; an adapter's rank is at least 1."
        )
    if a.shape[0] != b.shape[1]:
        raise HetcompError(
            f"{path}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected [r, in] and [out, r]."
        )
    dtypes = sorted({tensor.dtype for tensor in sides.values()})
    return LoraModule(name.removeprefix(PREFIX), a, b, "/".join(dtypes).lower())


def _stored(path: Path, data: Stored, tensor: CheckpointTensor) -> Stored:
    dtype = NUMPY.get(tensor.dtype)
    if dtype is None:
        raise HetcompError(f"{path}: tensor {tensor.name} has dtype {tensor.dtype}; expected F32, F16 or BF16.")
    if len(tensor.shape) != 2:
        raise HetcompError(f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}; expected a matrix.")
    # A view even where the offset is not a multiple of the number's size: numpy reads unaligned memory.
    raw = data[tensor.offset : tensor.offset + tensor.bytes]
    stored: Stored = np.ndarray(tensor.shape, dtype, raw)
    flat = stored.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        if not _finite(flat[start : start + _CHUNK]):
            raise HetcompError(f"{path}: tensor {tensor.name} holds NaN or infinite numbers.")
    return stored


def _finite(numbers: Stored) -> bool:
    if numbers.dtype == np.uint16:  # bf16: all bits of the exponent
        return not bool(((numbers & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
    return bool(np.isfinite(numbers).all())


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()
