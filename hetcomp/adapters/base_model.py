"""What an adapter may be applied to: the matrices of a traced model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hetcomp import frontend
from hetcomp.errors import HetcompError
from hetcomp.frontend.key_mapping import KeyMapping
from hetcomp.ir.plan import Plan, ValueKind, WeightSource

# The operands of ops that are matrices which activations are multiplied with.
_MATRICES = {"linear": (1,), "head_linear": (1,), "moe_experts": (3, 4), "embed": (1,)}
EMBEDDING, ROUTER = "embed", "moe.router"
# What an artifact keeps of its base, so that adapters can be packed for it without the base's files.
ARTIFACT_FILE = "base_model.json"


@dataclass(frozen=True)
class BaseWeight:
    """A parameter that the plan multiplies with. ``shape``: the parameter's own; ``transposed``: it is [.., in, out];
    ``interleaved``: its gate and up rows come in turn. ``roles``: of all ops that use it. ``names``: all that it has,
    tied parameters more than one."""

    fqn: str
    shape: tuple[int, ...]
    transposed: bool
    interleaved: bool
    roles: frozenset[str]
    names: tuple[str, ...]


@dataclass(frozen=True)
class BaseModel:
    """``weights`` by each of their names, ``parameters``: names of all parameters, in the order of the module's own.
    ``config``: the model's, as written."""

    name: str
    model_type: str
    layers: int
    config: Mapping[str, Any]
    weights: Mapping[str, BaseWeight]
    parameters: tuple[str, ...]

    @staticmethod
    def of(imported: frontend.Imported) -> BaseModel:
        """The matrices of an imported model."""
        plan, shapes = imported.plan, imported.parameter_shapes
        roles = _roles(plan)
        weights: dict[str, BaseWeight] = {}
        for value in plan.values:
            if value.kind is not ValueKind.WEIGHT or value.fqn is None or value.id not in roles:
                continue
            known = weights.get(value.fqn)
            names = (value.fqn, *imported.aliases.get(value.fqn, ()))
            view = value.view or WeightSource("plain", ())
            together = roles[value.id] | (known.roles if known else frozenset())
            weight = BaseWeight(value.fqn, shapes[value.fqn], view.transpose, view.deinterleave, together, names)
            weights |= dict.fromkeys(names, weight)
        names = tuple(shapes)
        info = plan.model
        return BaseModel(info.name, info.model_type, info.layers, imported.config, weights, names)

    @cached_property
    def mapping(self) -> KeyMapping:
        """Of the names that adapters may have. Raises HetcompError without transformers, which knows them."""
        return KeyMapping(self.parameters, self.model_type)

    def to_json(self) -> str:
        """All of it."""
        distinct = {weight.fqn: weight for weight in self.weights.values()}
        document = {
            "name": self.name,
            "model_type": self.model_type,
            "layers": self.layers,
            "config": self.config,
            "parameters": self.parameters,
            "weights": [
                {
                    "fqn": weight.fqn,
                    "shape": weight.shape,
                    "transposed": weight.transposed,
                    "interleaved": weight.interleaved,
                    "roles": sorted(weight.roles),
                    "names": weight.names,
                }
                for weight in distinct.values()
            ],
        }
        return json.dumps(document, indent=1)

    @staticmethod
    def from_json(text: str) -> BaseModel:
        """Reads what :meth:`to_json` wrote. Raises HetcompError if it is damaged."""
        try:
            document = json.loads(text)
            weights: dict[str, BaseWeight] = {}
            for entry in document["weights"]:
                weight = BaseWeight(
                    entry["fqn"],
                    tuple(int(d) for d in entry["shape"]),
                    bool(entry["transposed"]),
                    bool(entry["interleaved"]),
                    frozenset(entry["roles"]),
                    tuple(entry["names"]),
                )
                weights |= dict.fromkeys(weight.names, weight)
            parameters = tuple(document["parameters"])
            model_type = str(document["model_type"])
            name, layers, config = str(document["name"]), int(document["layers"]), dict(document["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise HetcompError(f"{ARTIFACT_FILE} of the model is damaged ({error}); compile it again.") from None
        return BaseModel(name, model_type, layers, config, weights, parameters)

    @cached_property
    def by_module(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the parameters that are each module's own, in its order."""
        found: dict[str, list[str]] = {}
        for parameter in self.parameters:
            found.setdefault(parameter.rpartition(".")[0], []).append(parameter)
        return {module: tuple(own) for module, own in found.items()}

    def has_experts(self, module: str) -> bool:
        """Whether stacked matrices of experts are parameters of ``module`` itself."""
        own = (self.weights.get(parameter) for parameter in self.by_module.get(module, ()))
        return any(weight is not None and len(weight.shape) == 3 for weight in own)


def _roles(plan: Plan) -> dict[str, frozenset[str]]:
    """Roles of the ops that multiply with each weight, by the weight's id."""
    roles: dict[str, frozenset[str]] = {}
    for call in plan.calls:
        template = plan.template(call.template)
        actual = dict(zip(template.params, call.args, strict=True))
        for op in template.ops:
            for operand in _MATRICES.get(op.kind, ()):
                name = actual.get(op.inputs[operand])
                if name is not None:
                    roles[name] = roles.get(name, frozenset()) | {EMBEDDING if op.kind == EMBEDDING else op.role}
    return roles


def import_base(model: str | Path) -> frontend.Imported:
    """A model as far as an adapter needs it: no weight is read. Raises HetcompError as frontend.load."""
    return frontend.load(model, context_length=None, max_batch=1, max_tokens=1, max_logit_rows=1)
