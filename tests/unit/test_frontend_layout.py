"""Layouts against torch's own strides: what a layout says lies where, torch must find there."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetcomp.frontend import layout as lay

ROWS = 3


def tensor_of(layout: lay.Layout, memory: torch.Tensor) -> torch.Tensor:
    """The torch tensor that the layout describes over memory [ROWS, width]."""
    width = memory.shape[1]
    sizes = [ROWS if a.kind == "rows" else a.size for a in layout]
    strides = [width if a.kind == "rows" else a.stride for a in layout]
    return memory.as_strided(sizes, strides)


def shapes(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes whose product is ``total``, ones sprinkled in."""
    sizes: list[int] = []
    while total > 1:
        divisor = draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        sizes.append(divisor)
        total //= divisor
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return sizes


@st.composite
def operations(draw):
    """A start shape with rows at the front and a list of permutations and target shapes."""
    width = draw(st.sampled_from([4, 6, 12, 24]))
    return width, draw(st.data())


@settings(max_examples=150, deadline=None)
@given(operations())
def test_views_and_permutations_agree_with_torch(case):
    width, data = case
    memory = torch.arange(ROWS * width).reshape(ROWS, width)
    layout = lay.natural(("T", width))
    want = memory
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(layout))))
            layout, want = lay.permute(layout, order), want.permute(order)
        else:
            sizes = data.draw(st.composite(shapes)(total=width))
            shape = list(sizes)
            shape.insert(data.draw(st.integers(0, len(shape))), "T")
            made = lay.view(layout, tuple(shape))
            if made is None:
                continue
            layout, want = made, want.reshape([ROWS if d == "T" else d for d in shape])
        assert torch.equal(tensor_of(layout, memory), want)
        assert lay.width(layout) == width
        if lay.is_row_major(layout):
            assert torch.equal(want.reshape(ROWS, width), memory)


def test_what_torch_can_view_the_layout_can_too():
    heads = lay.view(lay.natural((1, "T", 24)), (1, "T", 4, 6))
    assert lay.heads_and_dim(heads) == (4, 6)
    moved = lay.permute(heads, [0, 2, 1, 3])
    assert lay.shape_of(moved) == (1, 4, "T", 6)
    assert lay.heads_and_dim(moved) == (4, 6) and lay.is_natural(moved) and not lay.is_row_major(moved)
    assert lay.view(lay.permute(moved, [0, 2, 1, 3]), ("T", 24)) == lay.natural(("T", 24))
    assert lay.view(moved, (1, "T", 24)) is None, "heads would have to cross the rows"
    assert lay.view(lay.permute(heads, [0, 1, 3, 2]), (1, "T", 24)) is None, "needs a copy"
    assert lay.natural((4, 6)) is None and lay.natural(("T", "T")) is None
    assert math.prod(a.size for a in lay.features(heads)) == lay.width(heads)
