"""How a torch tensor lies in token-major memory: transposes and views are bookkeeping, not work.

A Plan value with T rows is memory [T, width]. A torch tensor over it has axes in some order: the rows, axes
of size one, and feature axes with a stride within a row. ``[1, heads, T, head_dim]`` over
``[T, heads * head_dim]`` is (one, feature(heads, head_dim), rows, feature(head_dim, 1)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROWS = "T"
TorchShape = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the torch tensor. ``stride`` is in elements within a row; both are 0 for the rows axis."""

    kind: str  # one | rows | feature
    size: int = 1
    stride: int = 0


ONE = Axis("one")
ROWS_AXIS = Axis("rows", 0, 0)
Layout = tuple[Axis, ...]


def natural(shape: TorchShape) -> Layout | None:
    """Layout with the features in a row in the order of the axes; None if T is not there just once."""
    if sum(d == ROWS for d in shape) != 1:
        return None
    axes: list[Axis] = []
    stride = 1
    for d in reversed(shape):
        if isinstance(d, str):
            axes.append(ROWS_AXIS)
        elif d == 1:
            axes.append(ONE)
        else:
            axes.append(Axis("feature", d, stride))
            stride *= d
    return tuple(reversed(axes))


def shape_of(layout: Layout) -> TorchShape:
    """The torch shape that the layout stands for."""
    return tuple(ROWS if a.kind == "rows" else a.size for a in layout)


def features(layout: Layout) -> list[Axis]:
    """Feature axes in the order of the torch tensor."""
    return [a for a in layout if a.kind == "feature"]


def width(layout: Layout) -> int:
    """Elements of a row."""
    return math.prod(a.size for a in features(layout))


def is_natural(layout: Layout) -> bool:
    """True if the features lie in a row in the order of the axes."""
    return layout == natural(shape_of(layout))


def is_row_major(layout: Layout) -> bool:
    """True if the torch tensor, read contiguously, is the memory: natural, rows before all features."""
    kinds = [a.kind for a in layout if a.kind != "one"]
    return is_natural(layout) and kinds[:1] == ["rows"]


def heads_and_dim(layout: Layout) -> tuple[int, int] | None:
    """(heads, head_dim) if the last axis is innermost in a row of [heads, head_dim]; else None."""
    found = features(layout)
    if not found or layout[-1].kind != "feature" or layout[-1].stride != 1:
        return None
    dim = layout[-1].size
    if len(found) == 1:
        return 1, dim
    if len(found) == 2 and found[0].stride == dim:
        return found[0].size, dim
    return None


def permute(layout: Layout, order: Sequence[int]) -> Layout:
    """Axes in another order."""
    return tuple(layout[i] for i in order)


def view(layout: Layout, shape: TorchShape) -> Layout | None:
    """The same memory under another shape; None if that would need a copy."""
    parts = _split_at_rows([a for a in layout if a.kind != "one"])
    wanted = _split_at_rows([ROWS_AXIS if d == ROWS else Axis("feature", int(d)) for d in shape if d != 1])
    if parts is None or wanted is None:
        return None
    new: list[Axis] = []
    for have, want in zip(parts, wanted, strict=True):
        group = _regroup(have, [a.size for a in want])
        if group is None:
            return None
        new.extend([*group, ROWS_AXIS])
    new.pop()
    out: list[Axis] = []
    axes = iter(new)
    for d in shape:
        out.append(ONE if d == 1 else next(axes))
    return tuple(out)


def _split_at_rows(axes: list[Axis]) -> tuple[list[Axis], list[Axis]] | None:
    at = [i for i, a in enumerate(axes) if a.kind == "rows"]
    return (axes[: at[0]], axes[at[0] + 1 :]) if len(at) == 1 else None


def _regroup(axes: list[Axis], sizes: list[int]) -> list[Axis] | None:
    """Splits and merges neighbouring feature axes into the given sizes."""
    if math.prod(a.size for a in axes) != math.prod(sizes):
        return None
    todo = list(reversed(axes))
    out: list[Axis] = []
    for size in reversed(sizes):
        # Built from the innermost axis outwards; ``todo[0]`` is the innermost one left.
        current = todo.pop(0)
        while current.size < size:
            outer = todo.pop(0)
            if outer.stride != current.stride * current.size:
                return None
            current = Axis("feature", current.size * outer.size, current.stride)
        if current.size % size:
            return None
        out.append(Axis("feature", size, current.stride))
        if current.size > size:
            todo.insert(0, Axis("feature", current.size // size, current.stride * size))
    return list(reversed(out))
