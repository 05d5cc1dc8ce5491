"""An aten region as a torch.export program: the way into TVM's importer. The only file here that needs
torch."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

from hetcomp.errors import HetcompError
from hetcomp.ir.ops import Aten, AtenArg, AtenNode, AtenRef


def export_region(attrs: Aten, output_dtypes: tuple[str, ...], dims: Mapping[str, int], origin: str) -> Any:  # noqa: ANN401
    """The region as a torch ExportedProgram with its symbolic dimension kept symbolic.

    Results are converted to ``output_dtypes`` (torch's names), the types they have in the plan's memory; an
    input whose plan type differs from the region's is expected to have the plan's type in
    ``attrs.input_dtypes``. Raises HetcompError naming the aten targets and ``origin`` if torch does not take
    the region.
    """
    import torch

    symbols = sorted({d for shape in attrs.input_shapes for d in shape if isinstance(d, str)})
    module = _interpreter(attrs, output_dtypes, symbols)
    names = {symbol: torch.export.Dim(symbol, min=1, max=max(2, dims[symbol])) for symbol in symbols}
    # Any size but 0 and 1, which torch.export would take as constants; bounded by the plan's maximum.
    sizes = {symbol: min(7, max(2, dims[symbol])) for symbol in symbols}
    examples, dynamic = [], []
    for shape, dtype in zip(attrs.input_shapes, attrs.input_dtypes, strict=True):
        size = [sizes[d] if isinstance(d, str) else d for d in shape]
        examples.append(torch.empty(size, dtype=getattr(torch, dtype)))
        dynamic.append({i: names[d] for i, d in enumerate(shape) if isinstance(d, str)})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns about its own pytree code
            return torch.export.export(module, tuple(examples), dynamic_shapes=(tuple(dynamic),), strict=False)
    except Exception as error:  # torch raises whatever the op's meta function raises
        raise HetcompError(refusal(attrs, origin, error)) from error


def refusal(attrs: Aten, origin: str, error: object) -> str:
    """The sentence that names what cannot be compiled: the region's ops, where they are, and why."""
    targets = ", ".join(dict.fromkeys(n.target for n in attrs.nodes if n.target != "getitem"))
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return f"TVM cannot compile {targets} at {origin}: {reason[0]}"


def _interpreter(attrs: Aten, output_dtypes: tuple[str, ...], symbols: list[str]) -> Any:  # noqa: ANN401
    """A torch module whose forward runs the region's nodes on its inputs."""
    import torch

    where = {s: _find_symbol(attrs, s) for s in symbols}

    class Region(torch.nn.Module):
        def forward(self, *inputs: Any) -> tuple[Any, ...]:  # noqa: ANN401
            sizes = {s: inputs[i].shape[axis] for s, (i, axis) in where.items()}
            done: list[Any] = []
            for node in attrs.nodes:
                args = [_argument(a, inputs, done, sizes) for a in node.args]
                kwargs = {k: _argument(v, inputs, done, sizes) for k, v in node.kwargs}
                done.append(_overload(node)(*args, **kwargs))
            results = []
            for index, dtype in zip(attrs.results, output_dtypes, strict=True):
                wanted = getattr(torch, dtype)
                result = done[index]
                results.append(result if result.dtype == wanted else result.to(wanted))
            return tuple(results)

    return Region()


def _find_symbol(attrs: Aten, symbol: str) -> tuple[int, int]:
    for i, shape in enumerate(attrs.input_shapes):
        if symbol in shape:
            return i, shape.index(symbol)
    raise KeyError(symbol)


def _overload(node: AtenNode) -> Any:  # noqa: ANN401
    import torch

    if node.target == "getitem":
        return operator.getitem
    found: Any = torch.ops
    for part in node.target.split("."):
        found = getattr(found, part)
    return found


def _argument(arg: AtenArg, inputs: tuple[Any, ...], done: list[Any], sizes: Mapping[str, Any]) -> Any:  # noqa: ANN401
    import torch

    if isinstance(arg, AtenRef):
        return inputs[arg.index] if arg.source == "input" else done[arg.index]
    if isinstance(arg, tuple):
        return [_argument(a, inputs, done, sizes) for a in arg]
    if isinstance(arg, str) and arg in sizes:
        return sizes[arg]
    if isinstance(arg, str) and arg.startswith("torch."):
        return getattr(torch, arg.removeprefix("torch."))
    return arg
