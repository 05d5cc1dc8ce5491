"""A model's GGUF file, or all files that it was split into."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.header import Fact, Header, read_header, shown
from hetcomp.ir.plan import CheckpointTensor

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_Scalar = TypeVar("_Scalar", int, float, str, bool)


@dataclass(frozen=True)
class ModelFiles:
    """``path``: the file that was given. ``facts``: metadata by key, of the first file; ``tensors`` of all of them."""

    path: Path
    facts: Mapping[str, Fact]
    tensors: Mapping[str, CheckpointTensor]

    @property
    def name(self) -> str:
        """The file's, without what says which of several it is."""
        split = _SPLIT.fullmatch(self.path.name)
        return split[1] if split else self.path.stem

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it. Raises HetcompError if the file does not say."""
        return self.need("general.architecture", str)

    def get(self, key: str, kind: type[_Scalar]) -> _Scalar | None:
        """A fact, None if it is not there. Raises HetcompError if it has another type."""
        found = self.facts.get(key)
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found)
        if isinstance(found, float) and not math.isfinite(found):
            raise HetcompError(f"{self.path}: {key} is {found}; expected a finite number")
        if found is not None and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
            raise HetcompError(f"{self.path}: {key} is {shown(found)}; expected {_KINDS[kind]}")
        return found

    def need(self, key: str, kind: type[_Scalar]) -> _Scalar:
        """A fact. Raises HetcompError if it is not there or has another type."""
        found = self.get(key, kind)
        if found is None:
            raise HetcompError(f"{self.path}: the metadata has no {key}, so the model is not known in full")
        return found

    def texts(self, key: str) -> list[str]:
        """An array of texts. Raises HetcompError if it is not there or something else."""
        found = self.facts.get(key)
        if not isinstance(found, list):
            raise HetcompError(f"{self.path}: the metadata has no texts {key}")
        return found

    def numbers(self, key: str) -> list[float] | None:
        """An array of numbers, None if it is not there. Raises HetcompError if it is something else."""
        found = self.facts.get(key)
        if found is None:
            return None
        if not isinstance(found, np.ndarray):
            raise HetcompError(f"{self.path}: {key} is {shown(found)}; expected an array of numbers")
        numbers: list[float] = found.tolist()
        return numbers


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def open_model(path: Path) -> ModelFiles:
    """The headers of all files of the model that ``path`` is one of. Raises HetcompError naming a file that is missing,
    damaged, or does not belong to the others."""
    first = read_header(path)
    split = ModelFiles(path, first.facts, first.tensors)
    count = split.get("split.count", int) or 1
    name = _SPLIT.fullmatch(path.name)
    if count == 1:
        return split
    if name is None or int(name[3]) != count:
        raise HetcompError(
            f"{path} is one of {count} files of a model, so its name must end in -00001-of-{count:05}.gguf for the "
            "others to be found"
        )
    paths = [path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise HetcompError(
            f"{path}: {len(missing)} of the model's {count} files are missing, the first is {missing[0]}"
        )
    return _joined(path, paths, [first if p == path else read_header(p) for p in paths])


def _joined(path: Path, paths: list[Path], headers: list[Header]) -> ModelFiles:
    tensors: dict[str, CheckpointTensor] = {}
    for number, (file, header) in enumerate(zip(paths, headers, strict=True)):
        one = ModelFiles(file, header.facts, header.tensors)
        if one.get("split.count", int) != len(paths) or one.get("split.no", int) != number:
            raise HetcompError(
                f"{file} says that it is file {one.get('split.no', int)} (from 0) of {one.get('split.count', int)}; "
                f"expected {number} of {len(paths)} by its name"
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise HetcompError(f"{file}: the tensor {min(twice)} is in another file of the model as well")
        tensors |= header.tensors
    joined = ModelFiles(path, headers[0].facts, tensors)
    expected = joined.get("split.tensors.count", int)
    if expected is not None and expected != len(tensors):
        raise HetcompError(f"{paths[0]} names {expected} tensors, the model's {len(paths)} files have {len(tensors)}")
    return joined
