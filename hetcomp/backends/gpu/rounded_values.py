"""Values that are written as bf16, beside or instead of f32, because readers multiply with bf16 anyway."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hetcomp.backends.gpu.attention import DECODE_ROWS
from hetcomp.ir.ops import Attention, Glu, HeadLinear, Linear, MoeExperts, RmsNorm, Rope
from hetcomp.ir.plan import Value
from hetcomp.ir.types import DType

if TYPE_CHECKING:
    from hetcomp.backends.gpu.patterns import Run


@dataclass(frozen=True)
class Rounded:
    """A value's bf16 ``copy``, with an id of its own; ``alone``: nobody reads the f32."""

    copy: Value
    alone: bool


def find_rounded(run: Run) -> dict[str, Rounded]:
    """By the value's id. Norms of whole rows can write both; other ops one of them."""
    found: dict[str, Rounded] = {}
    if run.decode:
        return found
    for i, op in enumerate(run.ops):
        if not _writes_bf16(run, i):
            continue
        (value,) = op.outputs
        readers = run.readers.get(value, [])
        rounding = [j for j in readers if reads_bf16(run, j, value)]
        alone = value not in run.wanted and len(rounding) == len(readers)
        if rounding and (alone or isinstance(op.attrs, RmsNorm)):
            its = run.values[value]
            copy = replace(its, id=f"{value} bf16", type=replace(its.type, dtype=DType.BF16))
            found[value] = Rounded(copy, alone)
    return found


def reads_bf16(run: Run, i: int, value: str) -> bool:
    """Whether op ``i`` gives the same result if ``value`` is rounded."""
    op = run.ops[i]
    if value not in op.inputs[:1] or value in op.inputs[1:]:
        return False
    if isinstance(op.attrs, (Linear, HeadLinear)):
        return run.values[op.inputs[1]].format != "f32"
    if isinstance(op.attrs, MoeExperts):
        return run.values[op.inputs[3]].format != "f32"
    return isinstance(op.attrs, Attention) and _many(run) and run.values[op.inputs[1]].type.dtype is not DType.F32


def _writes_bf16(run: Run, i: int) -> bool:
    attrs = run.ops[i].attrs
    if isinstance(attrs, RmsNorm):
        return attrs.groups == 1 and i not in run.heads
    return isinstance(attrs, (Glu, Rope)) or (isinstance(attrs, Attention) and _many(run))


def _many(run: Run) -> bool:
    """Whether attention is that of prefill."""
    return run.rows is None or run.rows > DECODE_ROWS
