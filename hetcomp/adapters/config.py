"""adapter_config.json of a PEFT LoRA adapter: what is understood, and everything else refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetcomp.errors import HetcompError

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"

# Fields of peft 0.21 that say nothing about the delta: where the adapter came from, how it was trained or begun.
_NEUTRAL = frozenset(
    {
        "alora_invocation_string",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
# Initialisations that change the base's weights too: the delta is to a base that the checkpoint does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_Number = TypeVar("_Number", int, float)
_OFF: tuple[object, ...] = (None, False, "none", {}, [])


class AdapterConfig(BaseModel):
    """The fields that decide what is applied where. ``target_modules``: names that modules end in, or a regular
    expression; ``target_parameters``: names that parameters end in. Patterns of rank and alpha are regular expressions
    that the end of a name matches (peft.utils.other.get_pattern_key)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=0)
    lora_alpha: float
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    peft_version: str | None = None

    def rank(self, name: str) -> int:
        """Rank of the module or parameter ``name``."""
        return self._by_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """Alpha of the module or parameter ``name``."""
        return self._by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """What B A is multiplied by: alpha / r, of rank-stabilised LoRA alpha / sqrt(r) (arXiv:2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _by_pattern(patterns: dict[str, _Number], name: str, default: _Number) -> _Number:
        return next((value for key, value in patterns.items() if _ending(key).match(name)), default)

    def targets_module(self, name: str) -> bool:
        """Whether the module ``name`` is a target, as peft decides it (check_target_module_exists). Not to be asked
        where the targets are all linear modules."""
        if self._excludes(name) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        if name in self.target_modules:
            return True
        return _ends_in(name, self.target_modules) and self._in_layers(name)

    def targets_parameter(self, name: str) -> bool:
        """Whether the parameter ``name`` is a target."""
        return self.target_parameters is not None and _ends_in(name, self.target_parameters)

    def _excludes(self, name: str) -> bool:
        if not self.exclude_modules:
            return False
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, name) is not None
        return _ends_in(name, self.exclude_modules)

    def _in_layers(self, name: str) -> bool:
        layers = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not layers:
            return True
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        # The first number counts layers; a later one may count experts.
        forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for form in forms if (m := re.match(form, name))), None)
        return found is not None and int(found.group(1)) in layers


@cache
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _ends_in(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def read_config(folder: Path) -> AdapterConfig:
    """Reads ``adapter_config.json``. Raises HetcompError if it is missing or damaged, or asks for anything besides
    plain LoRA, naming the field."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HetcompError(f"{folder} has no {CONFIG}, so it is not a PEFT adapter folder.") from None
    except (OSError, ValueError) as error:
        raise HetcompError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise HetcompError(f"{path} holds no JSON object.")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise HetcompError(f"{path}: peft_type is {kind!r}; hetcomp applies adapters of type LORA only.")
    _refuse_unsupported(path, raw)
    try:
        config = AdapterConfig.model_validate({k: v for k, v in raw.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HetcompError(f"{path}: {where} is not valid: {first['msg']}.") from None
    _check_numbers(path, config)
    _check_patterns(path, config)
    return config


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    for name, value in raw.items():
        if name in AdapterConfig.model_fields or name in _NEUTRAL or any(value is off or value == off for off in _OFF):
            continue
        raise HetcompError(
            f"{path}: {name} = {json.dumps(value)[:80]} is not supported; hetcomp applies plain LoRA (no DoRA, biases, "
            "saved modules or tokens, replicated layers)."
        )
    begun = raw.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise HetcompError(
            f"{path}: init_lora_weights = {begun!r} changes the base's weights too, so the adapter does not fit the "
            "checkpoint; convert it with peft (path_initial_model_for_weight_conversion of save_pretrained)."
        )


def _check_numbers(path: Path, config: AdapterConfig) -> None:
    ranks = {"r": config.r, **{f"rank_pattern.{k}": v for k, v in config.rank_pattern.items()}}
    for name, rank in ranks.items():
        if rank < 1:
            raise HetcompError(f"{path}: {name} is {rank}; the rank of an adapter is at least 1.")
    alphas = {"lora_alpha": config.lora_alpha, **{f"alpha_pattern.{k}": v for k, v in config.alpha_pattern.items()}}
    for name, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise HetcompError(f"{path}: {name} is {alpha}; expected a finite number.")


def _check_patterns(path: Path, config: AdapterConfig) -> None:
    patterns = [*config.rank_pattern, *config.alpha_pattern]
    patterns += [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str) and p != ALL_LINEAR]
    patterns += [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise HetcompError(f"{path}: {pattern!r} is no valid regular expression: {error}.") from None
