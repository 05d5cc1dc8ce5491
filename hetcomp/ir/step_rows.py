"""For which numbers of rows a step on a GPU is compiled."""

from __future__ import annotations

from hetcomp.ir.plan import Plan

# Rows of decode graphs, and the bounds of those for prompts below the largest.
_DECODE_ROWS = (1, 2, 4, 8, 16)
_PROMPT_ROWS = (64, 512)


def decode_rows(plan: Plan) -> list[int]:
    """Of graphs for exactly so many rows, logits of each."""
    slots = plan.dim("slots").max
    most = min(plan.dim("T").max, plan.dim("R").max)
    return [n for i, n in enumerate(_DECODE_ROWS) if n <= most and (i == 0 or _DECODE_ROWS[i - 1] < slots)]


def prompt_rows(plan: Plan) -> list[int]:
    """Bounds of the graphs for prompts, ascending; the last is the largest step."""
    tokens = plan.dim("T").max
    return sorted({*(n for n in _PROMPT_ROWS if n < tokens), tokens} - set(decode_rows(plan)))
