"""A linear layer whose result is only cut apart becomes one of each part's rows: what some models project in one, head
by head, is then computed in the order in which it is read, without copies.

Queries and their gates (Qwen3-Next's attention), or queries, keys, values and z of each head (its delta net).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hetcomp.ir import ops
from hetcomp.ir.plan import Op, Value, ValueKind, WeightSource

# Only where a part goes here. Elsewhere nothing is won that is not lost in patterns of kernels (MLA's on GPUs).
_READERS = frozenset({"activation", "glu", "causal_conv", "gated_delta"})

_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Part:
    """A value that is rows of a linear layer's result, in this order."""

    linear: Op
    rows: _Rows


def cut_linears(lowered: list[Op], values: dict[str, Value]) -> list[Op]:
    """The ops with such linear layers taken apart; adds the parts of their weights to ``values``."""
    parts = _parts(lowered, values)
    readers: dict[str, list[Op]] = {}
    for op in lowered:
        for value in op.inputs:
            readers.setdefault(value, []).append(op)
    made: dict[str, list[Op]] = {}
    for linear in [op for op in lowered if op.kind == "linear"]:
        of_it = {v: part for v, part in parts.items() if part.linear is linear}
        # What is read by something else than another cut.
        ends = [
            (v, part)
            for v, part in of_it.items()
            if any(not r.outputs or r.outputs[0] not in of_it for r in readers.get(v, []))
        ]
        if _worthwhile(linear, ends, readers):
            in_order = sorted(ends, key=lambda end: int(end[1].rows[0]))
            made[linear.id] = [_part_linear(linear, v, part, i, values) for i, (v, part) in enumerate(in_order)]
    dropped = {v for v, part in parts.items() if part.linear.id in made}
    out: list[Op] = []
    for op in lowered:
        if op.id in made:
            out.extend(made[op.id])
        elif not (op.outputs and op.outputs[0] in dropped):
            out.append(op)
    return out


def _worthwhile(linear: Op, ends: list[tuple[str, _Part]], readers: Mapping[str, list[Op]]) -> bool:
    if not ends:
        return False
    rows = np.concatenate([part.rows for _, part in ends])
    kinds = {r.kind for v, _ in ends for r in readers.get(v, [])}
    whole = any(v == linear.outputs[0] for v, _ in ends)
    return not whole and bool(kinds & _READERS) and len(np.unique(rows)) == len(rows)


def _parts(lowered: list[Op], values: Mapping[str, Value]) -> dict[str, _Part]:
    """The results of linear layers, and what cuts and joins make of them."""
    parts: dict[str, _Part] = {}
    for op in lowered:
        if isinstance(op.attrs, ops.Linear):
            parts[op.outputs[0]] = _Part(op, np.arange(op.attrs.out_features))
        elif isinstance(op.attrs, ops.Slice) and op.inputs[0] in parts:
            part, last = parts[op.inputs[0]], int(values[op.inputs[0]].type.shape[-1])
            kept = part.rows.reshape(-1, last)[:, op.attrs.start : op.attrs.stop]
            parts[op.outputs[0]] = replace(part, rows=kept.ravel())
        elif op.kind == "concat" and all(v in parts and len(values[v].type.shape) == 2 for v in op.inputs):
            joined = [parts[v] for v in op.inputs]
            if len({part.linear.id for part in joined}) == 1:
                parts[op.outputs[0]] = replace(joined[0], rows=np.concatenate([part.rows for part in joined]))
    return parts


def _part_linear(linear: Op, value: str, part: _Part, number: int, values: dict[str, Value]) -> Op:
    attrs = linear.attrs
    assert isinstance(attrs, ops.Linear)
    weights = []
    for whole in (values[v] for v in linear.inputs[1:]):
        view = WeightSource("plain", (), row_runs=_runs(part.rows))
        shape = (len(part.rows), *whole.type.shape[1:])
        cut = replace(whole, id=f"{whole.id}:{number}", type=replace(whole.type, shape=shape), view=view)
        assert whole.kind is ValueKind.WEIGHT and whole.view is None
        values[cut.id] = cut
        weights.append(cut.id)
    return replace(
        linear,
        id=f"{linear.id}:{number}",
        attrs=replace(attrs, out_features=len(part.rows)),
        inputs=(linear.inputs[0], *weights),
        outputs=(value,),
    )


def _runs(rows: _Rows) -> tuple[tuple[int, int], ...]:
    pieces = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)
