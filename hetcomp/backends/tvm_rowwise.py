"""Row-wise kernels: a TVM function over a block of rows, and the C++ that hands the blocks to the lanes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hetcomp.backends.protocol import Isa, Kernel
from hetcomp.backends.templates import render
from hetcomp.backends.tvm_toolchain import TVM_VERSION, compile_object

# Elements below which splitting a row block further costs more in task draws than it gains in parallelism:
# a draw is one contended atomic (~100 ns), a memory-bound kernel streams about 4 K elements in twice that.
COPY_GRAIN = 4096
# Likewise where an element costs about 20 instructions (exp).
MATH_GRAIN = 1024

ALL = "n_all"  # first dimension of an operand that every task sees whole: all rows
BLOCK = "n"  # first dimension of an operand that is cut into the task's units

Dimension = int | str


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor argument. ``base`` is the C++ expression of its address (``args.in[0]``).

    ``shape`` starts with BLOCK for a tensor of which a task sees its units, with ALL for one with a row for
    each token that it sees whole. ``dtype`` is ``f32`` or ``i32``.
    """

    base: str
    shape: tuple[Dimension, ...]
    dtype: str = "f32"

    def template_values(self) -> dict[str, Any]:
        """What the C++ template needs: element type, DLPack type, shape, strides, elements a unit."""
        strides: list[int] = [1]
        for dim in reversed(self.shape[1:]):
            assert isinstance(dim, int)
            strides.insert(0, strides[0] * dim)
        names = {ALL: "args.rows", BLOCK: "n"}
        return {
            "base": self.base,
            "ctype": "float" if self.dtype == "f32" else "std::int32_t",
            "code": "tvm::kFloat" if self.dtype == "f32" else "tvm::kInt",
            "bits": 32,
            "shape": [names[d] if isinstance(d, str) else d for d in self.shape],
            "strides": strides,
            "step": strides[0] if self.shape[0] == BLOCK else 0,
        }


@dataclass(frozen=True, slots=True)
class Stage:
    """One call of a TVM function: ``build`` makes the PrimFunc whose parameters are the operands in order."""

    build: Callable[[], Any]
    operands: tuple[Operand, ...]
    pass_begin: bool = False  # one more int64 parameter: index of the block's first unit


@dataclass(frozen=True, slots=True)
class RowKernel:
    """Stages run one after the other on each block of units. ``units`` is the C++ expression of the number of
    units (rows, elements, ...), ``unit`` says what one is, ``grain`` how many a task has at least.
    ``scratch`` are f32 arrays (name, elements) on the task's stack, which operands name as their base."""

    title: str
    unit: str
    units: str
    grain: int
    stages: tuple[Stage, ...]
    scratch: tuple[tuple[str, int], ...] = ()


def kernel_name(kind: str, isa: Isa, facts: Any) -> str:  # noqa: ANN401 - anything that JSON can spell
    """Name of a kernel: readable, and unique for what the code depends on."""
    text = json.dumps([kind, isa.value, TVM_VERSION, facts], sort_keys=True, default=str)
    return f"tvm_{kind}_{isa.value}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def emit_rowwise(name: str, isa: Isa, kernel: RowKernel) -> Kernel:
    """Compiles the stages to one object and renders the wrapper that calls them."""
    symbols = [name if len(kernel.stages) == 1 else f"{name}_{i}" for i in range(len(kernel.stages))]
    built = {symbol: stage.build() for symbol, stage in zip(symbols, kernel.stages, strict=True)}
    stages = [
        {
            "symbol": symbol,
            "operands": [o.template_values() for o in stage.operands],
            "pass_begin": stage.pass_begin,
        }
        for symbol, stage in zip(symbols, kernel.stages, strict=True)
    ]
    source = render(
        "tvm/rowwise.cpp.j2",
        kernel=name,
        isa=isa.value,
        title=kernel.title,
        unit=kernel.unit,
        units=kernel.units,
        grain=kernel.grain,
        stages=stages,
        scratch=kernel.scratch,
    )
    return Kernel(name=name, source=source, objects=((f"{name}.o", compile_object(built, isa)),))
