"""Which weight format holds a quantised weight of the checkpoint as it is, and where none does, which comes nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from hetcomp.ir.layouts import has_act_order, has_gate_up
from hetcomp.ir.plan import CheckpointTensor, Value, WeightSource

_PANEL, _BLOCK = 16, 128  # rows and columns of a packed panel in fp8 that share a scale


@dataclass(frozen=True, slots=True)
class Native:
    """How a quantised weight is taken over: in ``format``, bit for bit unless ``inexact`` says why not. ``label`` and
    ``bits`` (of a weight, with scales) are those of the checkpoint. ``act_order``: that takes a layout whose columns
    have an order of their own."""

    format: str
    inexact: str
    label: str
    bits: float
    act_order: bool = False


def native_format(value: Value, layout: str) -> Native | None:
    """That of a bound weight in a packed layout; None if the checkpoint has it unquantised."""
    source = value.source
    first = source.tensors[0].quantised if source is not None else None
    if source is None or not any(t.quantised for t in source.tensors):
        return None
    stored = [t.quantised for t in source.tensors if t.quantised is not None]
    label = " and ".join(dict.fromkeys(q.label for q in stored))
    bits = sum(q.bits for q in stored) / len(stored)
    if first is None or len(stored) < len(source.tensors):
        return Native("bf16", "some of its tensors are not quantised", label, bits)
    if len({(q.format, q.inexact, q.act_order) for q in stored}) > 1:
        return Native("q8", "its tensors are quantised in several ways", label, bits)
    if first.act_order:
        if not has_act_order(layout) or source.transpose or source.head_split is not None:
            return Native("q8", "its columns are in the order of activations", label, bits)
        return Native(first.format, first.inexact, label, bits, act_order=True)
    if first.inexact:
        return Native(first.format, first.inexact, label, bits)
    if first.format == "fp8":
        key = tuple((t.shape[-2:], t.quantised.block) for t in _distinct(source) if t.quantised is not None)
        if not _fits_fp8(key, replace(source, tensors=()), layout):
            return Native("q8", "16 rows by 128 columns of it do not share a scale", label, bits)
    elif source.transpose or source.head_transpose:
        return Native("q8", "its transpose is stored, whose groups of columns share no scale", label, bits)
    return Native(first.format, "", label, bits)


def _distinct(source: WeightSource) -> Sequence[CheckpointTensor]:
    """The tensors of one matrix: experts are alike."""
    if source.recipe == "concat":
        return source.tensors
    return source.tensors[: 2 if source.recipe == "stack_pair" else 1]


@lru_cache(maxsize=256)
def _fits_fp8(
    tensors: tuple[tuple[tuple[int, ...], tuple[int, int]], ...],
    view: WeightSource,
    layout: str,
) -> bool:
    """Whether the blocks of ``tensors`` (shape, block) still cover whole panels and 128 columns once they are joined
    and viewed; see WeightSource."""
    rows = [(i, r // block[0]) for i, (shape, block) in enumerate(tensors) for r in range(shape[0])]
    columns = [(0, c // tensors[0][1][1]) for c in range(tensors[0][0][1])]
    if view.transpose:
        rows, columns = columns, rows
    if view.deinterleave:
        rows = rows[::2] + rows[1::2]
    if view.row_runs:
        rows = [row for start, stop in view.row_runs for row in rows[start:stop]]
    if view.head_split is None:
        half = len(rows) // 2
        parts = (rows[:half], rows[half:]) if has_gate_up(layout) else (rows,)
        return all(_alike(part, _PANEL) for part in parts) and _alike(columns, _BLOCK)
    heads, start, stop = view.head_split
    each = len(rows) // heads
    split = [rows[h * each + start : h * each + stop] for h in range(heads)]
    if view.head_transpose:
        return _alike(columns, _PANEL) and all(_alike(part, _BLOCK) for part in split)
    return _alike(columns, _BLOCK) and all(_alike(part, _PANEL) for part in split)


def _alike(blocks: Sequence[tuple[int, int]], count: int) -> bool:
    """Whether every ``count`` of them in turn are one block."""
    return all(len(set(blocks[i : i + count])) == 1 for i in range(0, len(blocks), count))
