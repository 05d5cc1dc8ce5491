"""Some rows of a tensor at a time, also of those whose codes and scales are tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetcomp.frontend.quantisation_config import Stored
from hetcomp.frontend.quantised_codes import Raw, Read
from hetcomp.ir.plan import CheckpointTensor

_OF_COLUMNS = ("groups", "shape")  # parts that are the same for all rows
_ROWS_LAST = ("gptq", "awq")  # rows are the last axis of what these store, which is no run of a file's bytes


def rows_of(tensor: CheckpointTensor, start: int, stop: int) -> CheckpointTensor:
    """The rows from ``start`` to ``stop`` as a tensor of their own."""
    each = tensor.bytes // tensor.shape[0]
    shape = (stop - start, *tensor.shape[1:])
    return replace(tensor, shape=shape, offset=tensor.offset + start * each, bytes=(stop - start) * each)


@dataclass(frozen=True)
class RowsOfParts:
    """Rows of a quantised matrix [N, K], from parts that lie in a file by rows, and such as were read whole, once.
    ``counts``: by the name of a part's tensor how many rows an index of its rows stands for; none for those that all
    rows share. ``whole``: what was read."""

    tensor: CheckpointTensor
    counts: Mapping[str, int]
    whole: Mapping[str, Raw]
    read: Read

    @classmethod
    def of(cls, tensor: CheckpointTensor, stored: Stored, starts: Sequence[int], read: Read) -> RowsOfParts | None:
        """None if one of ``starts`` is within what some rows share. read: a part or rows of it. Raises what it
        raises."""
        assert tensor.quantised is not None
        axis = 1 if stored.kind in _ROWS_LAST else 0
        counts = {}
        for name, part in tensor.quantised.parts:
            length = part.shape[axis] if len(part.shape) > axis else 1
            if name in _OF_COLUMNS or length == 1:
                continue
            of_index = (1, 32 // stored.bits, tensor.quantised.block[0])
            count = next((n for n in of_index if n > 0 and -(-tensor.shape[0] // n) == length), 0)
            if not count or any(start % count for start in starts):
                return None
            counts[part.name] = count
        parts = [part for _, part in tensor.quantised.parts if axis or part.name not in counts]
        return cls(tensor, counts, {part.name: read(part) for part in parts}, read)

    def matrix(self, start: int, stop: int) -> CheckpointTensor:
        """The rows as a matrix of its own; only its shape is that of the rows."""
        return replace(self.tensor, shape=(stop - start, *self.tensor.shape[1:]))

    def reading(self, start: int, stop: int) -> Read:
        """A part's numbers for these rows."""

        def read(part: CheckpointTensor) -> Raw:
            count = self.counts.get(part.name, 0)
            if not count:
                return self.whole[part.name]
            first, last = start // count, -(-stop // count)
            known = self.whole.get(part.name)
            return self.read(rows_of(part, first, last)) if known is None else known[:, first:last]

        return read
