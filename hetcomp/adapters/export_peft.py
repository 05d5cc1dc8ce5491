"""Adapters written as PEFT folders: experts in stacked pairs, as peft reads and writes them, or in a pair each."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hetcomp.adapters.base_model import ROUTER, BaseModel
from hetcomp.adapters.config import CONFIG
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter, Floats
from hetcomp.adapters.pair_stack import PairStack, gate_and_up, stack_of
from hetcomp.adapters.peft_folder import PREFIX, WEIGHTS
from hetcomp.adapters.tensor_file import NewTensor, refuse_existing, write_safetensors
from hetcomp.artifact.staging import staged_folder
from hetcomp.errors import HetcompError

# The version of peft since which stacked pairs lie as they are written here (bind_adapter._is_reversed).
_WRITTEN_AS = "0.19.1"


@dataclass(frozen=True, eq=False)
class _Target:
    """A pair of tensors. ``key``: of the tensors; ``name``: of the module or parameter in peft's config, ``parameter``:
    which of the two it is; ``patterns``: regular expressions of names that its rank and alpha are looked up by, and how
    many times these they have. a: [rows, in]; b: [out, columns]."""

    key: str
    name: str
    parameter: bool
    patterns: tuple[tuple[str, int], ...]
    rank: int
    scale: float
    dtype: str
    a: Floats
    b: Floats


def export_stacked(adapter: Adapter, base: BaseModel, out: Path) -> None:
    """Writes what peft 0.19.1 and newer read: one pair for all experts of a parameter. Raises HetcompError if ``out``
    exists or cannot be written."""
    targets = list(_stacked(adapter, base))
    modules = sorted({t.name for t in targets if not t.parameter})
    parameters = sorted({t.name for t in targets if t.parameter})
    _write(adapter, targets, {"target_modules": modules, "target_parameters": parameters or None}, out)


def export_per_expert(adapter: Adapter, base: BaseModel, out: Path) -> None:
    """Writes a pair for every module of every expert, under the names that checkpoints of transformers 4 have. Raises
    HetcompError if the model's experts were never stored one by one, or ``out`` exists or cannot be written."""
    targets = list(_per_expert(adapter, base))
    # The last parts of names, which is what a config of transformers 4 has for all experts at once.
    names = sorted({t.name if t.parameter else t.name.rpartition(".")[2] for t in targets})
    if _names_more(names, targets, base):
        names = sorted({t.name for t in targets})
    _write(adapter, targets, {"target_modules": names, "target_parameters": None}, out)


def _stacked(adapter: Adapter, base: BaseModel) -> Iterator[_Target]:
    rewritten = {name for parameter in base.parameters for name in base.mapping.joined_names(parameter)}
    for fqn, weight in adapter.weights.items():
        stack = stack_of(weight)
        if weight.experts is None:
            module = fqn.removesuffix(".weight")
            # peft takes some names of target_modules for those of experts in transformers 4.
            parameter = ROUTER in weight.role or module.rpartition(".")[2] in rewritten
            name = fqn if parameter else module
            yield _target(adapter, PREFIX + module, name, parameter, _itself(name), stack, 0)
            continue
        container = fqn.rpartition(".")[0]
        inside = [p for p in base.by_module[container] if p in adapter.weights]
        depth = len(inside) - 1 - inside.index(fqn)
        a = stack.a.reshape(-1, stack.a.shape[2])
        b = stack.b.transpose(1, 2, 0).reshape(stack.b.shape[1], -1)
        key = PREFIX + container + depth * ".base_layer"
        yield _Target(key, fqn, True, _itself(fqn), stack.rank, stack.scale, _dtype(adapter, stack), a, b)


def _per_expert(adapter: Adapter, base: BaseModel) -> Iterator[_Target]:
    for fqn, weight in adapter.weights.items():
        names = [name.removesuffix(".weight") for name in base.mapping.stored_names(fqn)]
        stacks = _stacks(weight)
        if weight.experts is not None and ("*" not in names[0] or len(names) != len(stacks)):
            raise HetcompError(
                f"{fqn} of {base.name} is stored for all experts at once by every version of transformers; there is no "
                "form with a pair for each expert. Export --to peft-stacked."
            )
        for name, stack in zip(names, stacks, strict=True):
            patterns = _itself(name)
            if weight.experts is not None:
                # peft makes one parameter of these modules, of the ranks of all that are joined in it.
                patterns = ((re.escape(name).replace(r"\*", r"\d+"), 1), (re.escape(fqn), len(stacks)))
            for expert in range(len(stack.a)):
                module = name.replace("*", str(expert))
                yield _target(adapter, PREFIX + module, module, False, patterns, stack, expert)


def _stacks(weight: AdaptedWeight) -> Sequence[PairStack]:
    stack = stack_of(weight)
    if not weight.fqn.endswith("gate_up_proj"):
        return (stack,)
    halves = gate_and_up(weight, stack)
    return [half.filled_up(max(h.rank for h in halves)) for half in halves]


def _itself(name: str) -> tuple[tuple[str, int], ...]:
    return ((re.escape(name), 1),)


def _target(
    adapter: Adapter,
    key: str,
    name: str,
    parameter: bool,
    patterns: tuple[tuple[str, int], ...],
    stack: PairStack,
    expert: int,
) -> _Target:
    a, b = stack.a[expert], stack.b[expert]
    return _Target(key, name, parameter, patterns, stack.rank, stack.scale, _dtype(adapter, stack), a, b)


def _dtype(adapter: Adapter, stack: PairStack) -> str:
    """The adapter's own where that holds the numbers, else F32."""
    return adapter.dtypes[0].upper() if stack.exact and adapter.dtypes in (("f16",), ("bf16",)) else "F32"


def _names_more(names: Sequence[str], targets: Sequence[_Target], base: BaseModel) -> bool:
    """Whether a module that is no target ends in one of the names."""
    meant = {t.name for t in targets}
    stored = {
        name.removesuffix(".weight").replace("*", "0")
        for fqn in base.weights
        for name in base.mapping.stored_names(fqn)
    }
    return any(name.rpartition(".")[2] in names and name not in meant for name in stored)


def _write(adapter: Adapter, targets: Sequence[_Target], fields: dict[str, object], out: Path) -> None:
    # Most are gate and up of experts, if there are any: those that peft takes the config's r and alpha for.
    rank, scale = Counter((t.rank, t.scale) for t in targets).most_common(1)[0][0]
    other = [t for t in targets if (t.rank, t.scale) != (rank, scale)]
    config = {
        "peft_type": "LORA",
        "peft_version": _WRITTEN_AS,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(rank, scale),
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": {name: times * t.rank for t in other for name, times in t.patterns},
        "alpha_pattern": {name: times * _alpha(t.rank, t.scale) for t in other for name, times in t.patterns},
        **fields,
    }
    tensors = [
        NewTensor(f"{t.key}.lora_{side}.weight", t.dtype, numbers.shape, partial(np.asarray, numbers))
        for t in targets
        for side, numbers in (("A", t.a), ("B", t.b))
    ]
    refuse_existing(out)
    with staged_folder(out) as staging:
        write_safetensors(staging / WEIGHTS, tensors)
        (staging / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _alpha(rank: int, scale: float) -> float:
    """The alpha of plain LoRA that gives the scale: whole where it was."""
    alpha = scale * rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha
