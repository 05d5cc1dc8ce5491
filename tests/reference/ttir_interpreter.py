"""Runs GPU kernels on host memory, all programs of a launch side by side.

Kernels come as what Triton's frontend makes of them for a real GPU, before it knows of threads: operations on tensors.
An operation is done once for many programs, so that whole models run; where programs part ways (a loop of other length,
a branch), it is done for those that take it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend

from hetcomp.backends.gpu.kernels import GpuKernel
from tests.reference.ttir_frame import Frame, Launch, Step, lanes_where, merged, of_lanes
from tests.reference.ttir_memory import hand_over, load, store
from tests.reference.ttir_operations import MAKERS, Array, constant, full, overflows
from tests.reference.ttir_text import Block, Function, Operation, read_function

# Whose frontend makes no tensor copies of descriptors.
_CC = 80
_STAGES = 1  # of kernels that have the constant: pipelining means nothing here
_NUMBERS_AT_ONCE = 1 << 17  # of a kernel's largest tensor, in all programs that run side by side: about a cache
_TRANSLATION = threading.Lock()  # Triton's frontend is not for several threads
_AXES = "xyz"
_ENDS = ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return")


class _Program:
    """A kernel as steps, one an operation."""

    def __init__(self, function: Function) -> None:
        self.arguments = list(function.arguments)
        self.largest = 1
        self._blocks = {label: self._steps(block) for label, block in function.blocks.items()}
        self._given = {label: block.arguments for label, block in function.blocks.items()}

    def run(self, frame: Frame, launch: Launch, label: str = "") -> None:
        """From the beginning of a block to the kernel's end."""
        steps, last = self._blocks[label]
        for step in steps:
            step(frame, launch)
        if last.name == "tt.return":
            return
        if last.name == "cf.br":
            self._enter(frame, launch, last.attributes)
            return
        if last.name != "cf.cond_br":
            raise ValueError(f"an operation that the interpreter does not know: {last.name}")
        condition, yes, no = (part.strip() for part in last.attributes.split(", ^"))
        for taken, target in ((True, yes), (False, no)):
            lanes = lanes_where(frame[condition], taken, frame.programs)
            if len(lanes):
                self._enter(frame if len(lanes) == frame.programs else frame.of(lanes), launch, f"^{target}")

    def _enter(self, frame: Frame, launch: Launch, target: str) -> None:
        label, _, given = target.strip().partition("(")
        values = [name.strip() for name in given.partition(":")[0].rstrip(")").split(",") if name.strip()]
        for name, value in zip(self._given[label], [frame[v] for v in values], strict=True):
            frame[name] = value
        self.run(frame, launch, label)

    def _steps(self, block: Block) -> tuple[list[Step], Operation]:
        *operations, last = block.operations
        for operation in operations:
            for type_ in operation.types:
                self.largest = max(self.largest, int(np.prod(type_.shape)))
        return [self._step(operation) for operation in operations], last

    def _step(self, operation: Operation) -> Step:
        own: dict[str, Callable[[Operation], Step]] = {
            "arith.constant": _constant,
            "scf.for": self._for,
            "scf.if": self._if,
            "scf.while": self._while,
            "tt.reduce": self._reduce,
            "tt.scan": self._scan,
            "tt.load": load,
            "tt.store": store,
            "tt.elementwise_inline_asm": hand_over,
            "tt.get_program_id": _program_id,
            "tt.get_num_programs": _program_count,
        }
        if operation.name in own:
            return own[operation.name](operation)
        if operation.name == "ttg.barrier":  # programs run in step
            return lambda frame, launch: None
        if operation.name not in MAKERS:
            raise ValueError(f"an operation that the interpreter does not know: {operation.name}")
        return _computed(operation)

    def _part(self, operation: Operation, region: int) -> Callable[[Frame, Launch, Sequence[Array]], list[Array]]:
        """A region as a function of its arguments, which gives what its last operation names."""
        (block,) = operation.regions[region].values()
        if not block.operations or block.operations[-1].name not in _ENDS:  # an end that gives nothing is not printed
            block.operations.append(Operation("scf.yield", [], [], "", []))
        steps, last = self._steps(block)
        names, results = block.arguments, last.operands

        def run(frame: Frame, launch: Launch, given: Sequence[Array]) -> list[Array]:
            for name, value in zip(names, given, strict=True):
                frame[name] = value
            for step in steps:
                step(frame, launch)
            return [frame[name] for name in results]

        return run

    def _for(self, operation: Operation) -> Step:
        index, start, stop, step, *rest = operation.operands
        names, initial = rest[0::2], rest[1::2]
        (block,) = operation.regions[0].values()
        block.arguments = [index, *names]
        body = self._part(operation, 0)

        def run(frame: Frame, launch: Launch) -> None:
            at, end, stride = frame[start].astype(np.int64), frame[stop], frame[step]  # so that the last step fits
            dtype = end.dtype
            carried = [frame[name] for name in initial]
            inner, active = frame, np.arange(frame.programs)
            while True:
                lanes = lanes_where(at < end, True, frame.programs)
                if not len(lanes):
                    break
                if len(lanes) == frame.programs:
                    carried = body(frame, launch, [at.astype(dtype), *carried])
                else:
                    if len(lanes) != len(active):  # which only become fewer
                        inner, active = frame.of(lanes), lanes
                    new = body(inner, launch, [of_lanes(v, lanes) for v in (at.astype(dtype), *carried)])
                    carried = merged(carried, lanes, new, frame.programs)
                at = at + stride
            for name, value in zip(operation.results, carried, strict=True):
                frame[name] = value

        return run

    def _if(self, operation: Operation) -> Step:
        (condition,) = operation.operands
        sides = [self._part(operation, i) for i in range(len(operation.regions))]

        def run(frame: Frame, launch: Launch) -> None:
            results: list[Array] = []
            for taken, side in zip((True, False), sides, strict=False):
                lanes = lanes_where(frame[condition], taken, frame.programs)
                if not len(lanes):
                    continue
                inner = frame if len(lanes) == frame.programs else frame.of(lanes)
                results = merged(results, lanes, side(inner, launch, []), frame.programs)
            for name, value in zip(operation.results, results, strict=True):
                frame[name] = value

        return run

    def _while(self, operation: Operation) -> Step:
        names, initial = operation.operands[0::2], operation.operands[1::2]
        (before,) = operation.regions[0].values()
        before.arguments = names
        test, body = self._part(operation, 0), self._part(operation, 1)

        def run(frame: Frame, launch: Launch) -> None:
            lanes = np.arange(frame.programs)
            given = [frame[name] for name in initial]
            results: list[Array] = []
            while len(lanes):
                inner = frame.of(lanes)
                condition, *values = test(inner, launch, given)
                results = merged(results, lanes, values, frame.programs)
                going = lanes_where(condition, True, inner.programs)
                lanes, inner = lanes[going], inner.of(going)
                if len(lanes):
                    given = body(inner, launch, [of_lanes(v, going) for v in values])
            for name, value in zip(operation.results, results, strict=True):
                frame[name] = value

        return run

    def _reduce(self, operation: Operation) -> Step:
        """By halves, as a tree: in an order that no layout in memory changes."""
        axis, combine = operation.number("axis") + 1, self._part(operation, 0)
        shapes = [t.shape for t in operation.types[: len(operation.operands)]]

        def run(frame: Frame, launch: Launch) -> None:
            values = [full(frame[name], shape) for name, shape in zip(operation.operands, shapes, strict=True)]
            while (n := values[0].shape[axis]) > 1:
                low, high = ([_along(v, axis, cut) for v in values] for cut in (slice(n // 2), slice(n // 2, n)))
                values = combine(frame, launch, [*low, *high])
            for name, value in zip(operation.results, values, strict=True):
                frame[name] = value.squeeze(axis)

        return run

    def _scan(self, operation: Operation) -> Step:
        """Hillis and Steele's."""
        axis, combine = operation.number("axis") + 1, self._part(operation, 0)
        shapes = [t.shape for t in operation.types[: len(operation.operands)]]
        backwards = "reverse = true" in operation.attributes

        def run(frame: Frame, launch: Launch) -> None:
            values = [full(frame[name], shape) for name, shape in zip(operation.operands, shapes, strict=True)]
            values = [np.flip(v, axis) if backwards else v for v in values]
            distance, n = 1, values[0].shape[axis]
            while distance < n:
                early, late = (
                    [_along(v, axis, cut) for v in values] for cut in (slice(n - distance), slice(distance, n))
                )
                new = combine(frame, launch, [*early, *late])
                heads = [_along(v, axis, slice(distance)) for v in values]
                values = [np.concatenate(pair, axis) for pair in zip(heads, new, strict=True)]
                distance *= 2
            for name, value in zip(operation.results, values, strict=True):
                frame[name] = np.flip(value, axis) if backwards else value

        return run


def _along(value: Array, axis: int, cut: slice) -> Array:
    return value[(slice(None),) * axis + (cut,)]


def _constant(operation: Operation) -> Step:
    value, (name,) = constant(operation), operation.results

    def run(frame: Frame, launch: Launch) -> None:
        frame[name] = value

    return run


def _computed(operation: Operation) -> Step:
    compute, names, results = MAKERS[operation.name](operation), operation.operands, operation.results

    def run(frame: Frame, launch: Launch) -> None:
        given = [frame[name] for name in names]
        found = compute(*given)
        if len(results) > 1:
            for name, value in zip(results, found, strict=True):
                frame[name] = value
            return
        if overflows(operation, given, found):
            raise OverflowError(f"{operation.name} of {' and '.join(names)} does not fit in 32 bits")
        frame[results[0]] = found

    return run


def _program_id(operation: Operation) -> Step:
    (name,) = operation.results
    axis = _axis(operation)

    def run(frame: Frame, launch: Launch) -> None:
        frame[name] = frame[f"program {axis}"]

    return run


def _program_count(operation: Operation) -> Step:
    (name,) = operation.results
    axis = _AXES.index(_axis(operation))

    def run(frame: Frame, launch: Launch) -> None:
        frame[name] = np.array([launch.grid[axis]], np.int32)

    return run


def _axis(operation: Operation) -> str:
    return operation.attributes.strip()[0]


@functools.cache
def _program(kernel: GpuKernel) -> _Program:
    module = import_module(f"hetcomp.codegen_templates.gpu.{kernel.module}")
    constants = dict(kernel.constants) | ({"STAGES": _STAGES} if "STAGES" in dict(kernel.constants) else {})
    return _translated(getattr(module, kernel.function), dict(kernel.arguments), constants)


def _translated(function: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> _Program:
    """What Triton's frontend makes of a function; ``types``: of its arguments that are not constants."""
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    with _TRANSLATION:
        source = ASTSource(fn=function, signature=signature, constexprs=dict(constants))
        target = GPUTarget("cuda", _CC, 32)
        backend = make_backend(target)
        options = backend.parse_options({"enable_fp_fusion": True})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(target, options, codegen, modules, context)
        text = backend.make_ttir(module, {}, options, _CC).str_nodebug()
    return _Program(read_function(text))


def run_kernel(
    kernel: GpuKernel, grid: tuple[int, int, int], values: Mapping[str, int | float], memory: Sequence[range]
) -> None:
    """Runs all programs of ``grid``. ``values``: the kernel's arguments by name, addresses for pointers. Raises
    IndexError when it leaves the addresses of ``memory``, and OverflowError where sums and products of 32 bits do not
    fit."""
    _run(_program(kernel), grid, [_argument(kind, values[name]) for name, kind in kernel.arguments], memory)


def run_function(
    function: Any,
    grid: tuple[int, int, int],
    arguments: Mapping[str, tuple[str, int | float]],
    constants: Mapping[str, Any],
    memory: Sequence[range],
) -> None:
    """As :func:`run_kernel`, any function of Triton; ``arguments``: type and value by name, in order."""
    program = _translated(function, {name: kind for name, (kind, _) in arguments.items()}, constants)
    _run(program, grid, [_argument(kind, value) for kind, value in arguments.values()], memory)


def _argument(kind: str, value: int | float) -> Array:
    return np.array([value], {"i32": np.int32, "fp32": np.float32}.get(kind, np.int64))


def _run(program: _Program, grid: tuple[int, int, int], arguments: Sequence[Array], memory: Sequence[range]) -> None:
    launch = Launch(memory, grid)
    programs = int(np.prod(grid))
    at_once = max(_NUMBERS_AT_ONCE // program.largest, 1)
    with np.errstate(all="ignore"):
        for first in range(0, programs, at_once):
            numbers = np.arange(first, min(first + at_once, programs))
            frame = Frame(len(numbers))
            for axis, place in zip(_AXES, np.unravel_index(numbers, grid), strict=True):
                frame[f"program {axis}"] = place.astype(np.int32)
            for name, value in zip(program.arguments, arguments, strict=True):
                frame[name] = value
            program.run(frame, launch)
