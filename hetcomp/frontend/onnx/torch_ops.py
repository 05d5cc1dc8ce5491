"""What ONNX's ops compute, in torch: for shapes (tensors on the meta device) and for trials on random numbers.

All floats are float32, whatever the file says: so are the Plan's activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hetcomp.frontend.onnx.attention_op import attention
from hetcomp.frontend.onnx.graph import Node
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.rotary_ops import microsoft_rotary, rotary

Maybe = Tensor | None
# More numbers no table of positions has: 131,072 positions with 1,024 numbers each.
_LARGE = 1 << 27
_FLOATS = frozenset({1, 10, 11, 16})
_INTEGERS = {2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool}


def compute(node: Node, inputs: list[Maybe]) -> tuple[Tensor, ...]:
    """The outputs of ``node``. Raises NotComputable."""
    function = OPS.get(node.op)
    if function is None:
        raise NotComputable("is of a kind that hetcomp does not know")
    present = [t for t in inputs if t is not None]
    if any(t.is_meta for t in present):
        # What decides about shapes is needed as numbers.
        real = _REAL_OPERANDS.get(node.op, frozenset())
        inputs = [t if t is None or i in real else t.to("meta") for i, t in enumerate(inputs)]
    try:
        _check_size(node, inputs)
        made = function(node, *inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        text = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise NotComputable(f"cannot be computed from its operands: {text}") from error
    return made if isinstance(made, tuple) else (made,)


def _check_size(node: Node, inputs: list[Maybe]) -> None:
    """Raises NotComputable if the result would take more memory than any mask or table of positions does."""
    present = [t for t in inputs if t is not None]
    if any(t.is_meta for t in present) or node.op in _VIEWS:
        return
    if node.op in _MADE_OF_NUMBERS:
        size = _MADE_OF_NUMBERS[node.op](*present)
    else:
        # As if all operands were broadcast, which is what masks of queries and keys are made with.
        rank = max((t.ndim for t in present), default=0)
        shapes = [(1,) * (rank - t.ndim) + tuple(t.shape) for t in present]
        size = math.prod(max(sizes) for sizes in zip(*shapes, strict=True)) if node.op in _BROADCAST else 0
        size = max([size, *(t.numel() for t in present)])
    if size > _LARGE:
        raise NotComputable(f"makes {size:,} numbers of sizes and positions alone, more than hetcomp computes")


def dtype_of(number: int) -> torch.dtype:
    """torch's type for ONNX's number of one. Raises NotComputable."""
    if number in _FLOATS:
        return torch.float32
    if number not in _INTEGERS:
        raise NotComputable(f"has the element type {number}, which hetcomp does not know")
    return _INTEGERS[number]


def from_numpy(array: np.ndarray[Any, Any], bits: bool = False) -> Tensor:
    """A tensor with floats as float32. bits: the numbers are the bits of bf16."""
    if bits:
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype.kind not in "fiub":
        raise NotComputable(f"holds {array.dtype}, which hetcomp does not know")
    made = torch.from_numpy(np.array(array))
    return made.float() if made.is_floating_point() else made


def integers(tensor: Tensor) -> list[int]:
    """The numbers of a vector or scalar. Raises NotComputable if they are not known."""
    if tensor.is_meta:
        raise NotComputable("has a shape or an index that depends on the model's numbers")
    return [int(v) for v in tensor.reshape(-1).tolist()]


def axes_of(node: Node, operand: Maybe, default: list[int]) -> list[int]:
    """Axes from an operand (newer opsets) or the attribute (older ones)."""
    if operand is not None:
        return integers(operand)
    return [int(a) for a in node.get("axes", default)]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, a, b: function(a, b)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(x)


def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    whole = not a.is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = integers(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    return x.reshape(wanted)


def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute([int(p) for p in node.get("perm", range(x.ndim)[::-1])])


def _unsqueeze(node: Node, x: Tensor, axes: Maybe = None) -> Tensor:
    wanted = axes_of(node, axes, [])
    rank = x.ndim + len(wanted)
    for axis in sorted(a % rank for a in wanted):
        x = x.unsqueeze(axis)
    return x


def _squeeze(node: Node, x: Tensor, axes: Maybe = None) -> Tensor:
    wanted = axes_of(node, axes, [i for i, d in enumerate(x.shape) if d == 1])
    for axis in sorted((a % x.ndim for a in wanted), reverse=True):
        x = x.squeeze(axis)
    return x


def _expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = integers(shape)
    rank = max(len(wanted), x.ndim)
    sizes = zip([1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(wanted)) + wanted, strict=True)
    return x.expand([have if want == 1 else want for have, want in sizes])


def _slice(node: Node, x: Tensor, *operands: Maybe) -> Tensor:
    for axis, start, stop, step in slices(node, x, operands):
        if step < 0:
            x = x.index_select(axis, torch.arange(x.shape[axis])[start:stop:step].to(x.device))
        else:
            x = x[(slice(None),) * axis + (slice(start, stop, step),)]
    return x


def slices(node: Node, x: Tensor, operands: tuple[Maybe, ...]) -> list[tuple[int, int, int, int]]:
    """(axis, start, stop, step) of each axis that a Slice cuts, bounds within the tensor's."""
    if operands:
        starts, stops = (integers(o) for o in operands[:2] if o is not None)
        axes = integers(operands[2]) if len(operands) > 2 and operands[2] is not None else list(range(len(starts)))
        steps = integers(operands[3]) if len(operands) > 3 and operands[3] is not None else [1] * len(starts)
    else:
        starts, stops = node.get("starts", []), node.get("ends", [])
        axes, steps = node.get("axes", list(range(len(starts)))), [1] * len(starts)
    out = []
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            out.append((axis % x.ndim, start, stop if stop >= -size else -size - 1, step))
        else:
            out.append((axis % x.ndim, *slice(start, stop, step).indices(size)))
    return out


def _gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = int(node.get("axis", 0)) % x.ndim
    index = index.long()
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1)
    made = x.index_select(axis, flat)
    return made.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def sizes_of_split(node: Node, x: Tensor, split: Maybe) -> tuple[int, list[int]]:
    """(axis, sizes) of a Split."""
    axis = int(node.get("axis", 0)) % x.ndim
    if split is not None:
        return axis, integers(split)
    if "split" in node.attributes:
        return axis, [int(s) for s in node.attributes["split"]]
    count = int(node.get("num_outputs", len(node.outputs)))
    each = -(-x.shape[axis] // count)
    return axis, [min(each, x.shape[axis] - i) for i in range(0, x.shape[axis], each)]


def _split(node: Node, x: Tensor, split: Maybe = None) -> tuple[Tensor, ...]:
    axis, sizes = sizes_of_split(node, x, split)
    return torch.split_with_sizes(x, sizes, axis)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(node: Node, x: Tensor, axes: Maybe = None) -> Tensor:
        wanted = axes_of(node, axes, [] if node.get("noop_with_empty_axes", 0) else list(range(x.ndim)))
        for axis in sorted({a % x.ndim for a in wanted}, reverse=True):
            x = function(x, axis, bool(node.get("keepdims", 1)))
        return x

    return run


def _range(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant(node: Node) -> Tensor:
    for key in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        if key in node.attributes:
            return from_numpy(np.asarray(node.attributes[key]))
    raise NotComputable("holds a constant of a kind that hetcomp does not know")


def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value = from_numpy(np.asarray(node.get("value", np.zeros(1, np.float32))))
    return value.reshape(()).expand(integers(shape)).clone()


def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[int(node.get("start", 0)) : node.get("end", None)], dtype=torch.int64)


def _cumsum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise NotComputable("sums in a way that hetcomp does not know")
    return x.cumsum(integers(axis)[0])


def _trilu(node: Node, x: Tensor, k: Maybe = None) -> Tensor:
    diagonal = 0 if k is None else integers(k)[0]
    if x.dtype == torch.bool:
        made = (x.to(torch.uint8).triu(diagonal) if node.get("upper", 1) else x.to(torch.uint8).tril(diagonal)).bool()
        return made
    return x.triu(diagonal) if node.get("upper", 1) else x.tril(diagonal)


def _gather_nd(node: Node, x: Tensor, index: Tensor) -> Tensor:
    if node.get("batch_dims", 0):
        raise NotComputable("gathers by batch, which hetcomp does not know")
    return x[tuple(index.long().unbind(-1))]


def _scatter_nd(node: Node, x: Tensor, index: Tensor, update: Tensor) -> Tensor:
    made = x.clone()
    made[tuple(index.long().unbind(-1))] = update
    return made


def _clip(node: Node, x: Tensor, low: Maybe = None, high: Maybe = None) -> Tensor:
    low = low if low is not None or "min" not in node.attributes else torch.tensor(node.attributes["min"])
    high = high if high is not None or "max" not in node.attributes else torch.tensor(node.attributes["max"])
    x = x if low is None else torch.maximum(x, low.to(x.device))
    return x if high is None else torch.minimum(x, high.to(x.device))


def _gemm(node: Node, a: Tensor, b: Tensor, c: Maybe = None) -> Tensor:
    a = a.mT if node.get("transA", 0) else a
    made = a @ (b.mT if node.get("transB", 0) else b) * float(node.get("alpha", 1.0))
    return made if c is None else made + c * float(node.get("beta", 1.0))


def _rms(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    if int(node.get("axis", -1)) not in (-1, x.ndim - 1):
        raise NotComputable("norms several axes, which hetcomp does not know")
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(node.get("epsilon", 1e-5))) * weight


def _layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    if int(node.get("axis", -1)) not in (-1, x.ndim - 1):
        raise NotComputable("norms several axes, which hetcomp does not know")
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, float(node.get("epsilon", 1e-5)))


def _lp_normalised(node: Node, x: Tensor) -> Tensor:
    order, axis = int(node.get("p", 2)), int(node.get("axis", -1))
    length = x.norm(order, axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


def _logical(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, a, b: function(a.bool(), b.bool())


def _minimum(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(node: Node, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return run


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _logical(torch.logical_and),
    "Cast": lambda node, x: x.to(dtype_of(int(node.attributes["to"]))),
    "Attention": attention,
    "CastLike": lambda node, x, like: x.to(like.dtype),
    "Clip": _clip,
    "Concat": lambda node, *parts: torch.cat(parts, int(node.attributes["axis"])),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _unary(torch.cos),
    "CumSum": _cumsum,
    "Div": _div,
    "Dropout": lambda node, x, *rest: x,
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": lambda node, x: x.reshape(int(np.prod(x.shape[: node.get("axis", 1)])), -1),
    "Gather": _gather,
    "GatherElements": lambda node, x, index: x.gather(int(node.get("axis", 0)), index.long()),
    "GatherND": _gather_nd,
    "Gelu": lambda node, x: nn.functional.gelu(x, approximate=node.get("approximate", "none")),
    "Gemm": _gemm,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "Identity": _unary(lambda x: x),
    "IsNaN": _unary(torch.isnan),
    "LayerNormalization": _layer_norm,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LpNormalization": _lp_normalised,
    "MatMul": _binary(torch.matmul),
    "Max": _minimum(torch.maximum),
    "Min": _minimum(torch.minimum),
    "Mod": lambda node, a, b: torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _logical(torch.logical_or),
    "Pow": _binary(torch.pow),
    "RMSNormalization": _rms,
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL2": _reduced(lambda x, axis, kept: x.norm(2, axis, keepdim=kept)),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(torch.prod),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "RotaryEmbedding": rotary,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Size": lambda node, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Softmax": lambda node, x: x.softmax(int(node.get("axis", -1))),
    "Softplus": _unary(nn.functional.softplus),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Swish": lambda node, x: x * torch.sigmoid(float(node.get("alpha", 1.0)) * x),
    "Tanh": _unary(torch.tanh),
    "Tile": lambda node, x, repeats: x.repeat(integers(repeats)),
    "TopK": lambda node, x, k: tuple(x.topk(integers(k)[0], int(node.get("axis", -1)), bool(node.get("largest", 1)))),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, c, a, b: torch.where(c.bool(), a, b),
    "com.microsoft.RotaryEmbedding": microsoft_rotary,
    "com.microsoft.SimplifiedLayerNormalization": _rms,
}
# Ops whose sizes are in the numbers of their operands.
_MADE_OF_NUMBERS: dict[str, Callable[..., int]] = {
    "ConstantOfShape": lambda shape: math.prod(integers(shape)),
    "Range": lambda start, limit, delta: int(abs((limit - start) / delta).item()) + 1,
    "Tile": lambda x, repeats: x.numel() * math.prod(integers(repeats)),
}
_VIEWS = frozenset({"Expand", "Identity", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_BROADCAST = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "Sub"}
) | {"Where"}
# Operands that are needed as numbers where others are on the meta device.
_REAL_OPERANDS = {
    "Reshape": frozenset({1}),
    "Unsqueeze": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Expand": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "CumSum": frozenset({1}),
    "ReduceL2": frozenset({1}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceMin": frozenset({1}),
    "ReduceProd": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "Trilu": frozenset({1}),
}
