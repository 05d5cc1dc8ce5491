"""Names of checkpoint tensors -> parameters of the model, by transformers' own conversion mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightTransform

from hetcomp.errors import HetcompError

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Parts:
    """The checkpoint tensors of one parameter: how they are joined, and their names in that order."""

    recipe: str  # plain | stack | stack_pair | concat; see ir.plan.WeightSource
    names: tuple[str, ...]


def map_checkpoint(names: Iterable[str], parameters: Iterable[str], model_type: str) -> dict[str, Parts]:
    """Parts by parameter name. Tensors that no rule concerns keep their names.

    A name that lacks the base model's prefix (``model.``), or has it too much, is matched as well.
    Raises HetcompError if experts are numbered with holes.
    """
    known = set(parameters)
    transforms = get_checkpoint_conversion_mapping(model_type) or []
    single: dict[str, str] = {}
    joined: dict[str, tuple[WeightTransform, dict[tuple[int, int], str]]] = {}
    for name in names:
        target, transform, pattern, matched = name, None, None, name
        for candidate in transforms:
            converts = bool(getattr(candidate, "operations", None))
            if converts and transform is not None:
                continue
            renamed, source = candidate.rename_source_key(target)
            if source is not None and converts:
                transform, pattern, matched = candidate, source, target
            target = renamed
        target = _prefixed(target, known)
        if transform is None:
            single[target] = name
            continue
        expert = _expert(matched, str(pattern))
        index = list(transform.source_patterns).index(pattern)
        joined.setdefault(target, (transform, {}))[1][expert, index] = name
    out = {target: Parts("plain", (name,)) for target, name in single.items()}
    for target, (transform, found) in joined.items():
        out[target] = _joined(target, transform, found)
    return out


def _prefixed(name: str, known: set[str]) -> str:
    if name in known:
        return name
    for other in (f"model.{name}", name.removeprefix("model.")):
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
