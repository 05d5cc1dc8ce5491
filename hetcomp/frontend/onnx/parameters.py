"""Names of the weights of an ONNX graph: those of the file, or of the modules that use them where they say nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hetcomp.frontend.onnx.evaluate import Weight
from hetcomp.frontend.plan_builder import layer_of

_OPERATOR = re.compile(r"\.(?:MatMul|Gemm|Add)\.(?=weight$|bias$)")


@dataclass(frozen=True)
class Parameter:
    """``tensors`` of the file whose numbers, in the form that ``stored`` names, the parameter ``fqn`` of ``shape``
    has; transposed: after its last two axes are swapped."""

    fqn: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    transposed: bool = False


class Parameters:
    """All parameters by name, collected while a graph is read."""

    def __init__(self) -> None:
        self.all: dict[str, Parameter] = {}
        self._known: dict[tuple[Weight, ...], str] = {}

    def of(self, weight: Weight, shape: tuple[int, ...], scope: str) -> Parameter:
        """The parameter that ``weight`` is. scope: path of the module that uses it."""
        return self.add((weight,), scope, lambda fqn: Parameter(fqn, shape, (weight.name,), weight.transposed))

    def add(self, key: tuple[Weight, ...], scope: str, make: Callable[[str], Parameter]) -> Parameter:
        """The parameter for ``key``, made under a free name when it is first asked for."""
        if key not in self._known:
            fqn = self._free(_name(key[0].name, scope))
            self.all[fqn] = make(fqn)
            self._known[key] = fqn
        return self.all[self._known[key]]

    def _free(self, name: str) -> str:
        number = 2
        free = name
        while free in self.all:
            free = f"{name}.{number}"
            number += 1
        return free


def _name(tensor: str, scope: str) -> str:
    """The tensor's own name; that of the module where the tensor's is a number, or does not say which layer it belongs
    to."""
    tensor = _OPERATOR.sub(".", tensor)
    if not scope or ("." in tensor and layer_of(scope) == layer_of(tensor)):
        return tensor
    return f"{scope}.weight"
