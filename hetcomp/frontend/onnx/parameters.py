"""Names of the weights of an ONNX graph: those of the file, or of the modules that use them where they say nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hetcomp.frontend.onnx.dequantised_weights import Dequantised
from hetcomp.frontend.onnx.evaluate import Weight
from hetcomp.frontend.onnx.packed_weights import Packed
from hetcomp.frontend.plan_builder import layer_of

# What onnxruntime-genai puts into a weight's name behind the module's.
_OPERATOR = re.compile(r"\.(?:MatMul|Gemm|Add)(?:NBits)?\.(?=weight|bias)")
_CODES = re.compile(r"\.q?weight(?:_(?:DQ_)?(?:Q|quant)\w*)?$")


@dataclass(frozen=True)
class Parameter:
    """The parameter ``fqn`` of ``shape``: the tensor of the file, transposed: with its last two axes swapped.
    ``packed``: how it is quantised; then the tensor is the one that holds its codes. ``halves``: instead of a tensor,
    what it consists of: of each expert the rows of the first, then those of the second. ``log_of``: not 0 where the
    parameter is the logarithm of the tensor times this."""

    fqn: str
    shape: tuple[int, ...]
    tensor: str
    transposed: bool = False
    packed: Packed | Dequantised | None = None
    halves: tuple[Parameter, Parameter] | None = None
    log_of: int = 0


class Parameters:
    """All parameters by name, collected while a graph is read."""

    def __init__(self) -> None:
        self.all: dict[str, Parameter] = {}
        self._known: dict[tuple[str, bool, int], Parameter] = {}
        self._pairs: dict[tuple[str, str], Parameter] = {}

    def of(
        self,
        weight: Weight,
        shape: tuple[int, ...],
        scope: str,
        packed: Packed | Dequantised | None = None,
        log_of: int = 0,
    ) -> Parameter:
        """The parameter that ``weight`` is. scope: path of the module that uses it."""
        key = (weight.name, weight.transposed, log_of)
        if key not in self._known:
            fqn = self._free(_name(weight.name, scope))
            # What is dequantised comes in the order that is wanted.
            turned = weight.transposed and not isinstance(packed, Dequantised)
            made = Parameter(fqn, shape, weight.name, turned, packed, log_of=log_of)
            self.all[fqn] = self._known[key] = made
        return self._known[key]

    def pair(self, first: Parameter, second: Parameter) -> Parameter:
        """Gate and up projections of experts [E, I, ..], or their biases, as one parameter [E, 2 I, ..]."""
        key = (first.fqn, second.fqn)
        if key not in self._pairs:
            for half in (first, second):
                self.all.pop(half.fqn, None)
            shape = (first.shape[0], 2 * first.shape[1], *first.shape[2:])
            fqn = self._free(f"{first.fqn.removesuffix('.weight')}.pair")
            self.all[fqn] = self._pairs[key] = Parameter(fqn, shape, "", halves=(first, second))
        return self._pairs[key]

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
    tensor = _CODES.sub(".weight", _OPERATOR.sub(".", tensor))
    if not scope or ("." in tensor and layer_of(scope) == layer_of(tensor)):
        return tensor
    return f"{scope}.{'bias' if tensor.endswith('.bias') else 'weight'}"
