"""Kernels of aten regions: TVM compiles each step, the C++ calls them in order with memory from the
workspace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hetcomp.backends.protocol import Isa, Kernel, KernelRequest
from hetcomp.backends.templates import render
from hetcomp.backends.tvm_toolchain import compile_object
from hetcomp.errors import HetcompError
from hetcomp.ir.ops import Aten
from hetcomp.ir.plan import Value
from hetcomp.ir.types import DType

if TYPE_CHECKING:
    from hetcomp.backends.tvm_region_lower import Buffer, Call, LoweredRegion

_ALIGN = 64
# Constants that a region carries (masks, zero biases) become arrays in the C++; larger ones belong to the
# weights.
_MAX_CONSTANT_BYTES = 1 << 20

_TORCH_NAMES = {
    DType.F32: "float32",
    DType.I32: "int32",
    DType.I64: "int64",
    DType.BOOL: "bool",
}
_TYPES = {
    "float32": ("tvm::kFloat", 32),
    "float64": ("tvm::kFloat", 64),
    "int32": ("tvm::kInt", 32),
    "int64": ("tvm::kInt", 64),
    "int8": ("tvm::kInt", 8),
    "uint8": ("tvm::kUInt", 8),
    "bool": ("tvm::kBool", 8),
}


@dataclass(frozen=True)
class Region:
    """A lowered region with the memory of its temporaries fixed at the largest number of rows."""

    lowered: LoweredRegion
    offsets: tuple[int, ...]
    workspace_bytes: int


def plan_region(request: KernelRequest) -> Region:
    """Lowers the region of ``request`` and places its temporaries.

    Raises HetcompError naming the aten targets and the op's origin if torch or TVM does not take it.
    """
    from hetcomp.backends.tvm_region_export import export_region, refusal

    attrs = request.op.attrs
    assert isinstance(attrs, Aten)
    origin = request.op.origin or request.op.id
    attrs = _with_memory_types(attrs, request.inputs, origin)
    outputs = tuple(_torch_name(v, origin) for v in request.outputs)
    exported = export_region(attrs, outputs, request.dims, origin)
    from hetcomp.backends.tvm_region_lower import lower_region

    try:
        lowered = lower_region(exported)
        offsets, total = _place(lowered, _rows_bound(attrs, request.dims))
    except Exception as error:  # TVM raises AssertionError, ValueError, its own InternalError, ...
        raise HetcompError(refusal(attrs, origin, error)) from error
    return Region(lowered, offsets, total)


def emit_region(name: str, isa: Isa, region: Region, attrs: Aten, origin: str) -> Kernel:
    """Compiles the steps of the region and renders the C++ that calls them."""
    from hetcomp.backends.tvm_region_export import refusal

    lowered = region.lowered
    symbols = [f"{name}_{i}" for i in range(len(lowered.calls))]
    functions = {symbol: call.function for symbol, call in zip(symbols, lowered.calls, strict=True)}
    try:
        objects = ((f"{name}.o", compile_object(functions, isa)),) if functions else ()
    except Exception as error:
        raise HetcompError(refusal(attrs, origin, error)) from error
    total = sum(c.nbytes for c in lowered.constants)
    if total > _MAX_CONSTANT_BYTES:
        raise HetcompError(refusal(attrs, origin, f"it contains {total} bytes of constants"))
    calls = [_call_values(name, symbol, call, region) for symbol, call in zip(symbols, lowered.calls, strict=True)]
    copies = [
        {
            "target": _address(name, target, region),
            "source": _address(name, source, region),
            "bytes": _cpp_bytes(source),
        }
        for source, target in lowered.copies
    ]
    source_text = render(
        "tvm/region.cpp.j2",
        kernel=name,
        isa=isa.value,
        title="aten region " + ", ".join(dict.fromkeys(n.target for n in attrs.nodes if n.target != "getitem")),
        symbols=symbols,
        constants=[_constant(c) for c in lowered.constants],
        calls=calls,
        copies=copies,
    )
    return Kernel(name=name, source=source_text, workspace_bytes=region.workspace_bytes, objects=objects)


def _with_memory_types(attrs: Aten, inputs: tuple[Value, ...], origin: str) -> Aten:
    """The region reading its inputs in the types that the plan's memory has, converted by its first nodes."""
    from hetcomp.ir.ops import AtenNode, AtenRef

    memory = tuple(_torch_name(v, origin) for v in inputs)
    casts: dict[int, int] = {}
    nodes: list[AtenNode] = []
    for i, (have, want) in enumerate(zip(memory, attrs.input_dtypes, strict=True)):
        if have != want:
            casts[i] = len(nodes)
            nodes.append(
                AtenNode(
                    "aten._to_copy.default",
                    (AtenRef("input", i),),
                    (("dtype", f"torch.{want}"),),
                    want,
                    attrs.input_shapes[i],
                )
            )
    shift = len(nodes)

    def moved(arg: Any) -> Any:  # noqa: ANN401
        if isinstance(arg, tuple):
            return tuple(moved(a) for a in arg)
        if not isinstance(arg, AtenRef):
            return arg
        if arg.source == "node":
            return AtenRef("node", arg.index + shift)
        return AtenRef("node", casts[arg.index]) if arg.index in casts else arg

    for node in attrs.nodes:
        kwargs = tuple((k, moved(v)) for k, v in node.kwargs)
        nodes.append(replace(node, args=tuple(moved(a) for a in node.args), kwargs=kwargs))
    return replace(attrs, nodes=tuple(nodes), input_dtypes=memory, results=tuple(r + shift for r in attrs.results))


def _torch_name(value: Value, origin: str) -> str:
    if value.type.dtype not in _TORCH_NAMES or value.type.layout != "row_major":
        raise HetcompError(
            f"The aten region at {origin} has an operand {value.id} of type {value.type}; it takes "
            f"row-major f32, "
            "i32, i64 and bool."
        )
    if value.format not in (None, "f32"):
        raise HetcompError(
            f"The aten region at {origin} reads the weight {value.id} in format {value.format}, not f32."
        )
    return _TORCH_NAMES[value.type.dtype]


def _rows_bound(attrs: Aten, dims: Mapping[str, int]) -> int:
    symbols = {d for shape in attrs.input_shapes for d in shape if isinstance(d, str)}
    return max((dims[s] for s in symbols), default=1)


def _bytes(buffer: Buffer, rows: int) -> int:
    return math.prod(s.at(rows) for s in buffer.shape) * _item_bytes(buffer)


def _item_bytes(buffer: Buffer) -> int:
    if buffer.dtype not in _TYPES:
        raise HetcompError(f"it has an intermediate of type {buffer.dtype}")
    return _TYPES[buffer.dtype][1] // 8


def _place(lowered: LoweredRegion, rows: int) -> tuple[tuple[int, ...], int]:
    """Offsets of the temporaries: each takes the lowest free place for the calls between its first and
    last use."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, call in enumerate(lowered.calls):
        for buffer in _tensors(call):
            if buffer.home == "temp":
                first.setdefault(buffer.index, step)
                last[buffer.index] = step
    for source, _ in lowered.copies:
        if source.home == "temp":
            last[source.index] = len(lowered.calls)
    offsets = [0] * len(lowered.temps)
    placed: list[tuple[int, int, int]] = []  # index, offset, end
    total = 0
    for index in sorted(first, key=lambda i: first[i]):
        need = -(-_bytes(lowered.temps[index], rows) // _ALIGN) * _ALIGN
        busy = sorted((o, e) for i, o, e in placed if last[i] >= first[index] and first[i] <= last[index])
        at = 0
        for offset, end in busy:
            if offset - at >= need:
                break
            at = max(at, end)
        offsets[index] = at
        placed.append((index, at, at + need))
        total = max(total, at + need)
    return tuple(offsets), total


def _tensors(call: Call) -> list[Buffer]:
    from hetcomp.backends.tvm_region_lower import Buffer

    return [a for a in call.arguments if isinstance(a, Buffer)]


def _address(name: str, buffer: Buffer, region: Region) -> str:
    return {
        "in": f"args.in[{buffer.index}]",
        "out": f"args.out[{buffer.index}]",
        "const": f"{name}_const_{buffer.index}",
        "temp": f"w + {region.offsets[buffer.index] if buffer.home == 'temp' else 0}",
    }[buffer.home]


def _cpp_bytes(buffer: Buffer) -> str:
    return " * ".join([str(_item_bytes(buffer)), *(s.cpp for s in buffer.shape)])


def _call_values(name: str, symbol: str, call: Call, region: Region) -> dict[str, Any]:
    from hetcomp.backends.tvm_region_lower import Buffer

    tensors = [
        {
            "address": _address(name, b, region),
            "code": _TYPES[b.dtype][0],
            "bits": _TYPES[b.dtype][1],
            "shape": [s.cpp for s in b.shape],
        }
        for b in _tensors(call)
    ]
    arguments = []
    position = 0
    for argument in call.arguments:
        if isinstance(argument, Buffer):
            arguments.append(f"tvm::argument(tensors[{position}])")
            position += 1
        else:
            arguments.append(f"tvm::argument(std::int64_t{{{argument.cpp}}})")
    label = str(call.function.attrs["global_symbol"]) if "global_symbol" in call.function.attrs else symbol
    return {"symbol": symbol, "label": label, "tensors": tensors, "arguments": arguments}


def _constant(array: Any) -> dict[str, Any]:  # noqa: ANN401
    data = array.tobytes()
    return {"size": max(1, len(data)), "bytes": ", ".join(map(str, data)) if any(data) else ""}
