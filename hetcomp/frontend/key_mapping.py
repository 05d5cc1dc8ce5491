"""Names of checkpoint tensors -> parameters of the model, by transformers' own conversion mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Parts:
    """The checkpoint tensors of one parameter: how they are joined, and their names in that order."""

    recipe: str  # plain | stack | stack_pair | concat; see ir.plan.WeightSource
    names: tuple[str, ...]


@dataclass(frozen=True)
class TensorPlace:
    """Where a checkpoint tensor belongs: all or a part of ``parameter``. ``expert``: which matrix along its first axis
    (-1: no such axis); ``part`` of ``parts`` tensors that are joined along the rows."""

    parameter: str
    expert: int = -1
    part: int = 0
    parts: int = 1
    transform: WeightTransform | None = None


class KeyMapping:
    """Parameters by the names of checkpoint tensors, in every version of the names that transformers reads."""

    def __init__(self, parameters: Iterable[str], model_type: str) -> None:
        # Here: ONNX files are read without transformers.
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        except ModuleNotFoundError:
            raise HetcompError(
                f"The names of a {model_type} model's tensors are mapped by transformers, which is not installed."
            ) from None

        self._known = set(parameters)
        self._transforms = get_checkpoint_conversion_mapping(model_type) or []

    def place(self, name: str) -> TensorPlace:
        """The place of the tensor ``name``; a tensor that no rule concerns is the parameter of its name. A name that
        lacks the base model's prefix (``model.``), or has it or ``language_model.`` too much, is found as well."""
        target, transform, pattern, matched = name, None, None, name
        for candidate in self._transforms:
            converts = bool(getattr(candidate, "operations", None))
            if converts and transform is not None:
                continue
            renamed, source = candidate.rename_source_key(target)
            if source is not None and converts:
                transform, pattern, matched = candidate, source, target
            target = renamed
        target = _prefixed(target, self._known)
        if transform is None:
            return TensorPlace(target)
        patterns = list(transform.source_patterns)
        expert = _expert(matched, str(pattern))
        return TensorPlace(target, expert, patterns.index(pattern), len(patterns), transform)

    def joined_names(self, parameter: str) -> tuple[str, ...]:
        """Last parts of the module names whose weights are joined to ``parameter``, in order: gate_proj, up_proj for a
        gate_up_proj of experts; empty if it is stored as it is."""
        for transform in self._transforms:
            if getattr(transform, "operations", None) and parameter.endswith(str(transform.target_patterns[0])):
                return tuple(str(p).removesuffix(".weight").rpartition(".")[2] for p in transform.source_patterns)
        return ()

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """Names under which checkpoints of transformers 4 had the parameter, * for the number of an expert: two for
        gate and up in one; its own name where they had it as it is."""
        names = [parameter]
        for transform in self._transforms:
            target = str(transform.target_patterns[0])
            if getattr(transform, "operations", None) and parameter.endswith(target):
                prefix = parameter.removesuffix(target)
                names = [f"{prefix}{pattern}" for pattern in transform.source_patterns]
        for transform in reversed(self._transforms):
            if not getattr(transform, "operations", None):
                back = transform.reverse_transform()
                names = [back.rename_source_key(name)[0] for name in names]
        return tuple(names)


def map_checkpoint(names: Iterable[str], parameters: Iterable[str], model_type: str) -> dict[str, Parts]:
    """Parts by parameter name. Tensors that no rule concerns keep their names.

    Raises HetcompError if experts are numbered with holes.
    """
    mapping = KeyMapping(parameters, model_type)
    single: dict[str, str] = {}
    joined: dict[str, tuple[WeightTransform, dict[tuple[int, int], str]]] = {}
    for name in names:
        place = mapping.place(name)
        if place.transform is None:
            single[place.parameter] = name
        else:
            joined.setdefault(place.parameter, (place.transform, {}))[1][place.expert, place.part] = name
    out = {target: Parts("plain", (name,)) for target, name in single.items()}
    for target, (transform, found) in joined.items():
        out[target] = _joined(target, transform, found)
    return out


def _prefixed(name: str, known: set[str]) -> str:
    if name in known:
        return name
    for other in (f"model.{name}", name.removeprefix("model."), name.replace("language_model.", "", 1)):
        if other in known:
            return other
    return name


def _expert(name: str, pattern: str) -> int:
    """The number that stands where the pattern has its star; -1 without a star."""
    before, star, _ = pattern.partition("*")
    if not star:
        return -1
    at = name.rfind(before.lstrip("^")) if before.lstrip("^") in name else 0
    match = _NUMBER.search(name, max(0, at + len(before) - 1))
    return int(match.group(1)) if match else -1


def _joined(target: str, transform: WeightTransform, found: dict[tuple[int, int], str]) -> Parts:
    operations = [type(o).__name__ for o in transform.operations]
    sources = len(transform.source_patterns)
    experts = sorted({expert for expert, _ in found})
    if operations == ["Concatenate"] and experts == [-1] and len(found) == sources:
        return Parts("concat", tuple(found[-1, i] for i in range(sources)))
    recipes = {("MergeModulelist",): (1, "stack"), ("MergeModulelist", "Concatenate"): (2, "stack_pair")}
    if recipes.get(tuple(operations), (0, ""))[0] != sources:
        raise HetcompError(
            f"the checkpoint stores {target} in a form that hetcomp cannot read: {', '.join(operations)} of "
            f"{sources} tensors"
        )
    if experts != list(range(len(experts))) or len(found) != len(experts) * sources:
        have = [f"{e}.{transform.source_patterns[i]}" for e, i in sorted(found)][:4]
        raise HetcompError(
            f"the checkpoint has not all experts of {target}: {len(found)} tensors, numbers {experts[0]} to "
            f"{experts[-1]}, first {have}"
        )
    names = tuple(found[e, i] for e in experts for i in range(sources))
    return Parts(recipes[tuple(operations)][1], names)
