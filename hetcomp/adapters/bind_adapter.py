"""An adapter folder bound to a model: every tensor finds its weight and every target its tensors, or it is refused.

The stacked form of peft has all experts of a parameter in one pair: A is [E * r, in] with the expert as the
slowest index of its rows, B [out, r * E] with the expert as the fastest of its columns (ParamWrapper.get_delta_weight
of peft 0.21). Several targeted parameters of one module are wrapped in the order in which the module has them, so that
the first one lies innermost, under the most ``base_layer`` names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hetcomp.adapters.base_model import EMBEDDING, ROUTER, BaseModel, BaseWeight
from hetcomp.adapters.config import ALL_LINEAR
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter, Factor
from hetcomp.adapters.peft_folder import WEIGHTS, LoraModule, PeftFolder, read_folder
from hetcomp.errors import HetcompError

_WRAPPED = ".base_layer"


def read_adapter(
    folder: str | Path, base: BaseModel, *, name: str | None = None, allow_router: bool = False
) -> Adapter:
    """Reads a PEFT adapter folder for ``base``; its tensors stay mapped. ``name``: the folder's by default.

    allow_router: adapters may change routers. Raises HetcompError naming the tensor, module or field if the folder is
    damaged, was made for another base, or cannot be applied in whole.
    """
    return bind_adapter(read_folder(folder), base, name=name, allow_router=allow_router)


def bind_adapter(
    folder: PeftFolder, base: BaseModel, *, name: str | None = None, allow_router: bool = False
) -> Adapter:
    """As :func:`read_adapter`, of a folder that has been read."""
    binding = _Binding(folder, base, allow_router)
    for module in folder.modules.values():
        binding.add(module)
    weights = {fqn: binding.weight(fqn) for fqn in base.weights if fqn in binding.factors}
    binding.refuse_missing(weights)
    config = folder.config
    adapter = Adapter(
        name or folder.name,
        folder.sha256,
        config.base_model_name_or_path or "",
        config.r,
        config.lora_alpha,
        tuple(sorted({module.dtype for module in folder.modules.values()})),
        weights,
    )
    _refuse_huge(adapter)
    return adapter


@dataclass
class _Binding:
    folder: PeftFolder
    base: BaseModel
    allow_router: bool
    # By fqn of the weight: the pairs of each expert (0 for a matrix), by the part of the rows that they are for.
    factors: dict[str, dict[int, dict[int, Factor]]] = field(default_factory=dict)
    # Last names of v4 modules whose targets transformers 5 rewrites to parameters of experts.
    rewritten: set[str] = field(default_factory=set)

    def add(self, module: LoraModule) -> None:
        """Finds the weight of one module's tensors."""
        path = module.path
        while path.endswith(_WRAPPED):
            path = path.removesuffix(_WRAPPED)
        renamed = self.base.mapping.place(f"{path}.weight").parameter.removesuffix(".weight")
        names = (path, f"model.{path}", path.removeprefix("model."), renamed)
        container = next((name for name in names if self.base.has_experts(name)), None)
        if container is not None:
            self._add_stacked(module, container, depth=(len(module.path) - len(path)) // len(_WRAPPED))
        elif path == module.path:
            self._add_matrix(module)
        else:
            raise self._unknown(module)

    # ------------------------------------------------ all experts in one pair

    def _add_stacked(self, module: LoraModule, container: str, depth: int) -> None:
        levels = self._levels(container)
        if depth >= len(levels):
            raise HetcompError(
                f"{self._where(module)} belongs to parameter {depth + 1} of {container} from the outside, but the "
                f"config's target_parameters name {len(levels)} of it."
            )
        fqn = levels[-1 - depth]
        weight = self.base.weights.get(fqn)
        if weight is None or len(weight.shape) != 3:
            raise HetcompError(f"{self._where(module)} is for {fqn}, which is no matrix of experts.")
        count = weight.shape[0]
        rank, alpha = self._stacked_rank(fqn)
        reverse = self._is_reversed(module, weight)
        if module.a.shape[0] != count * rank:
            raise HetcompError(
                f"{self._where(module)}: lora_A has {module.a.shape[0]} rows; {count} experts of rank {rank} need "
                f"{count * rank}. {self._made_for()}"
            )
        a = module.a.reshape(count, rank, -1)
        b = module.b.reshape(-1, rank, count)
        scale = self.folder.config.scale(alpha, rank)
        for expert in range(count):
            along, across = a[expert], b[:, :, expert]
            factor = Factor(across.T, along.T, scale) if reverse else Factor(along, across, scale)
            self._put(module, weight, expert, 0, factor)

    def _levels(self, container: str) -> list[str]:
        """The parameters of the module that the config targets, in the module's order."""
        own = self.base.by_module[container]
        config = self.folder.config
        if config.target_parameters:
            return [p for p in own if config.targets_parameter(p)]
        found = []
        for parameter in own:
            names = self.base.mapping.joined_names(parameter)
            if names and all(config.targets_module(f"{container}.0.{name}") for name in names):
                self.rewritten |= set(names)
                found.append(parameter)
        return found

    def _stacked_rank(self, fqn: str) -> tuple[int, float]:
        """Rank and alpha. A config of transformers 4 names modules that are rows of one parameter now: their pairs lie
        there as one of so many times the rank (peft.utils.transformers_weight_conversion)."""
        config = self.folder.config
        if config.target_parameters:
            return config.rank(fqn), config.alpha(fqn)
        joined = len(self.base.mapping.joined_names(fqn))
        return (config.rank(fqn), config.alpha(fqn)) if joined == 1 else (joined * config.r, joined * config.lora_alpha)

    def _is_reversed(self, module: LoraModule, weight: BaseWeight) -> bool:
        """Whether A is along the rows of the matrices and B along their columns. Shapes tell, and if the matrices are
        square, the version of peft: up to 0.18 A lay along the parameter's second axis, in 0.19.0 the other way
        round, since 0.19.1 along the axis that is multiplied with (lora.ParamWrapper of these versions)."""
        out, columns = _sizes(weight)
        got = module.b.shape[0], module.a.shape[1]
        if got not in ((out, columns), (columns, out)):
            raise self._misshaped(module, weight.fqn, (out, columns))
        if out != columns:
            return got == (columns, out)
        version = tuple(int(n) for n in re.findall(r"\d+", self.folder.config.peft_version or "")[:3])
        if not version and not weight.transposed:
            raise HetcompError(
                f"{self._where(module)} is for square matrices and the config does not say which peft_version "
                "wrote it, so their rows and columns cannot be told apart; save the adapter with peft 0.19.1 or newer."
            )
        return version == (0, 19, 0) or (bool(version) and version < (0, 19, 0) and not weight.transposed)

    # ------------------------------------------------ one matrix in a pair

    def _add_matrix(self, module: LoraModule) -> None:
        place = self.base.mapping.place(f"{module.path}.weight")
        weight = self.base.weights.get(place.parameter)
        if weight is None:
            raise self._unknown(module)
        self._refuse_role(module, weight)
        of_experts = len(weight.shape) == 3
        if of_experts and place.expert >= weight.shape[0]:
            raise self._unknown(module)
        if of_experts != (place.expert >= 0) or (place.parts > 1 and not of_experts):
            raise HetcompError(
                f"{self._where(module)} is for a part of {weight.fqn} that hetcomp cannot tell; only modules of single "
                "experts are taken apart."
            )
        out, columns = _sizes(weight)
        rows = out // place.parts
        if (module.b.shape[0], module.a.shape[1]) != (rows, columns):
            raise self._misshaped(module, weight.fqn, (rows, columns))
        config = self.folder.config
        name = f"{module.path}.weight" if config.targets_parameter(f"{module.path}.weight") else module.path
        if name == module.path and config.target_modules != ALL_LINEAR and not config.targets_module(name):
            raise HetcompError(f"{self._where(module)} has tensors, but the config does not target it.")
        rank = config.rank(name)
        if module.a.shape[0] != rank:
            raise HetcompError(f"{self._where(module)} has rank {module.a.shape[0]}; the config says {rank}.")
        part = (place.part * rows, (place.part + 1) * rows) if place.parts > 1 else None
        factor = Factor(module.a, module.b, config.scale(config.alpha(name), rank), part)
        self._put(module, weight, max(place.expert, 0), place.part, factor)

    def _refuse_role(self, module: LoraModule, weight: BaseWeight) -> None:
        if EMBEDDING in weight.roles:
            raise HetcompError(
                f"{self._where(module)} is for the embedding, alone or tied to the head; hetcomp does not adapt it."
            )
        if ROUTER in weight.roles and not self.allow_router:
            raise HetcompError(
                f"{self._where(module)} changes a router, mostly not meant (target_modules 'all-linear' includes it); "
                "allow it with --allow-router."
            )

    def _put(self, module: LoraModule, weight: BaseWeight, expert: int, part: int, factor: Factor) -> None:
        parts = self.factors.setdefault(weight.fqn, {}).setdefault(expert, {})
        if part in parts:
            raise HetcompError(f"{self._where(module)} is for a part of {weight.fqn} that other tensors are for too.")
        parts[part] = factor

    # ------------------------------------------------ the whole

    def weight(self, fqn: str) -> AdaptedWeight:
        """All pairs of a weight. Raises HetcompError if an expert has none."""
        weight, found = self.base.weights[fqn], self.factors[fqn]
        count = weight.shape[0] if len(weight.shape) == 3 else 1
        first = found[min(found)]
        for expert in range(count):
            if found.get(expert, {}).keys() != first.keys():
                raise HetcompError(
                    f"{self._file()}: expert {expert} of {fqn} lacks tensors that expert {min(found)} has. "
                    f"{self._made_for()}"
                )
        factors = tuple(tuple(found[e][part] for part in sorted(found[e])) for e in range(count))
        return AdaptedWeight(
            fqn, weight.shape, weight.transposed, weight.interleaved, " ".join(sorted(weight.roles)), factors
        )

    def refuse_missing(self, adapted: Mapping[str, AdaptedWeight]) -> None:
        """Raises HetcompError if the config targets a weight of the base that the adapter has no tensors for."""
        config = self.folder.config
        stacked = {fqn.rpartition(".")[2] for fqn, w in adapted.items() if w.experts is not None}
        for name, weight in self.base.weights.items():
            module, _, last = name.rpartition(".")
            targeted = config.targets_parameter(name)
            if config.target_modules != ALL_LINEAR and not targeted:
                if len(weight.shape) == 2:
                    targeted = module.rpartition(".")[2] not in self.rewritten and config.targets_module(module)
                elif last in stacked:
                    names = self.base.mapping.joined_names(name)
                    targeted = any(config.targets_module(f"{module}.0.{joined}") for joined in names)
            if targeted and weight.fqn not in adapted:
                raise HetcompError(
                    f"{self._file()}: the config targets {name}, but there are no tensors for it. {self._made_for()}"
                )

    # ------------------------------------------------ messages

    def _file(self) -> str:
        return str(self.folder.folder / WEIGHTS)

    def _where(self, module: LoraModule) -> str:
        return f"{self._file()}: {module.path}"

    def _made_for(self) -> str:
        named = self.folder.config.base_model_name_or_path
        made = f"it was made for {named}" if named else "its config does not say what it was made for"
        return f"Is {self.base.name} ({self.base.layers} layers) the adapter's base? {made[0].upper()}{made[1:]}."

    def _unknown(self, module: LoraModule) -> HetcompError:
        return HetcompError(f"{self._where(module)} is no matrix of {self.base.name}. {self._made_for()}")

    def _misshaped(self, module: LoraModule, fqn: str, wanted: tuple[int, int]) -> HetcompError:
        got = module.b.shape[0], module.a.shape[1]
        return HetcompError(
            f"{self._where(module)} changes a matrix of {list(got)}; that of {fqn} is {list(wanted)}. "
            f"{self._made_for()}"
        )


def _sizes(weight: BaseWeight) -> tuple[int, int]:
    """Rows and columns of the matrix as it is multiplied with."""
    rows, columns = weight.shape[-2:]
    return (columns, rows) if weight.transposed else (rows, columns)


def _refuse_huge(adapter: Adapter) -> None:
    whole = sum(w.out_features * w.in_features * len(w.factors) for w in adapter.weights.values())
    if adapter.parameters > whole:
        raise HetcompError(
            f"Adapter {adapter.name} of rank {max(w.rank for w in adapter.weights.values())} has "
            f"{adapter.parameters:,} numbers, the matrices that it changes have {whole:,}: its rank is too large to be "
            "of use. hetcomp adapter inspect shows the memory at each rank."
        )
