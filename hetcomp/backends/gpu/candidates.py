"""Launches that find the most likely token of every row of logits, and the most likely ones for sampling."""

from __future__ import annotations

from hetcomp.backends.gpu.kernels import ONE, ROWS, Constant, GpuCode, GridAxis, Operand, launch
from hetcomp.backends.gpu.tiles import aligned, power_of_two

# The row of the buffer that the runtime reads (runtime_lib/src/gpu/candidate_rows.h).
_SEGMENTS, _PLACES, _HEADER = 32, 64, 4
CANDIDATE_WORDS = _HEADER + _SEGMENTS + 2 * _SEGMENTS * _PLACES
# The least vocabulary that has candidates: the logits of a smaller one are fetched as fast.
CANDIDATES_FROM = 2048
_COLUMNS = 1024
_WANTED = 256  # tokens, at least
_KEY_BITS = 18  # of a logit that the bound is found in, one after the other: rounded down it lets in some 2 % more
_SEGMENT = 16  # groups that a program reads again
_MOST = _SEGMENTS * _SEGMENT
_LARGEST_GROUP_COUNT = 2048  # that one program looks through for the bound


def candidates(vocab: int, rows: int) -> GpuCode:
    """Input 0: logits f32[rows, vocab]; output 0: the most likely tokens i32[rows], -1 where a row is not finite;
    output 1: i32[rows, CANDIDATE_WORDS]. ``rows``: exactly."""
    group = max(8, power_of_two(-(-vocab // _LARGEST_GROUP_COUNT)))
    blocks = -(-vocab // _COLUMNS)
    groups = blocks * _COLUMNS // group
    # Groups of the padding reach no bound.
    wanted = min(_WANTED, vocab // group // 4)
    sizes = (4 * rows * blocks,) * 3 + (4 * rows * groups, 4 * rows * _MOST)
    offsets = [sum(aligned(size) for size in sizes[:i]) for i in range(len(sizes) + 1)]
    kinds = ("*fp32", "*i32", "*fp32", "*fp32", "*i32")
    largest, first, sums, maxima, chosen = (
        (kind, Operand("workspace", offset=at)) for kind, at in zip(kinds, offsets, strict=False)
    )
    logits = ("*fp32", Operand("input", 0))
    temperatures = ("*fp32", Operand("step", name="inverse_temperatures"))
    best, found = ("*i32", Operand("output", 0)), ("*i32", Operand("output", 1))
    of_row: dict[str, Constant] = {"MOST": _MOST, "SEGMENT": _SEGMENT, "WORDS": CANDIDATE_WORDS}
    of_blocks = launch(
        "candidates",
        "candidate_blocks",
        f"candidate_blocks_{vocab}",
        (ROWS, GridAxis(blocks), ONE),
        {
            "logits": logits,
            "inverse_temperatures": temperatures,
            "largest": largest,
            "first": first,
            "sums": sums,
            "maxima": maxima,
        },
        {"WIDTH": vocab, "BLOCKS": blocks, "COLUMNS": _COLUMNS, "GROUP": group},
    )
    bound = launch(
        "candidates",
        "candidate_bound",
        f"candidate_bound_{blocks}",
        (ROWS, ONE, ONE),
        {
            "largest": largest,
            "first": first,
            "sums": sums,
            "maxima": maxima,
            "inverse_temperatures": temperatures,
            "best": best,
            "chosen": chosen,
            "candidates": found,
        },
        {
            **of_row,
            "BLOCKS": blocks,
            "PADDED": power_of_two(blocks),
            "GROUPS": groups,
            "GROUPS_PADDED": power_of_two(groups),
            "WANTED": wanted,
            "KEY_BITS": _KEY_BITS,
        },
    )
    gather = launch(
        "candidates",
        "gather_candidates",
        f"gather_candidates_{vocab}",
        (ROWS, GridAxis(_SEGMENTS), ONE),
        {"logits": logits, "chosen": chosen, "candidates": found},
        {**of_row, "WIDTH": vocab, "GROUP": group, "SEGMENTS": _SEGMENTS, "PLACES": _PLACES, "HEADER": _HEADER},
    )
    return GpuCode((of_blocks, bound, gather), offsets[-1])
