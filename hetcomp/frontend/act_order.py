"""Which quantised weights have their columns in the order of activations (GPTQ's ``desc_act``, compressed-tensors'
``actorder``): a config says that it may be so, the groups of the columns (g_idx) whether it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hetcomp.frontend.quantisation_config import Stored
from hetcomp.frontend.quantised_codes import Read, groups_of_columns
from hetcomp.ir.plan import CheckpointTensor

_Groups = npt.NDArray[np.int64] | None  # of the columns; None: they are runs


def settled(
    tensors: tuple[CheckpointTensor, ...],
    of_matrix: int,
    stored: Callable[[CheckpointTensor], Stored],
    read: Read,
) -> tuple[CheckpointTensor, ...]:
    """The tensors of one weight, with ``act_order`` as their groups are, which are read where the config leaves that
    open.

    of_matrix: tensors in turn whose rows are those of one matrix, so that their columns must be in one order. stored:
    how the config says that a tensor is stored. Raises HetcompError if a tensor has groups that it cannot have."""
    if not any(t.quantised is not None and t.quantised.act_order for t in tensors):
        return tensors
    scattered, why = False, ""
    for first in range(0, len(tensors), of_matrix):
        matrix = tensors[first : first + of_matrix]
        groups = [_groups(tensor, stored, read) for tensor in matrix]
        scattered = scattered or any(g is not None for g in groups)
        why = why or _obstacle(groups, matrix[0])
    return tuple(_marked(tensor, scattered, why) for tensor in tensors)


def _groups(tensor: CheckpointTensor, stored: Callable[[CheckpointTensor], Stored], read: Read) -> _Groups:
    if tensor.quantised is None or not tensor.quantised.act_order:
        return None
    return groups_of_columns(read(tensor.quantised.part("groups")), stored(tensor), tensor)


def _obstacle(groups: Sequence[_Groups], tensor: CheckpointTensor) -> str:
    """Why the columns of a matrix cannot be brought into runs; empty if they can."""
    first = groups[0]
    if not all(g is first or (g is not None and first is not None and np.array_equal(g, first)) for g in groups[1:]):
        return "its tensors have their columns in several orders"
    assert tensor.quantised is not None
    if first is not None and (np.bincount(first) != tensor.quantised.block[1]).any():
        return "its groups have different numbers of columns"
    return ""


def _marked(tensor: CheckpointTensor, scattered: bool, why: str) -> CheckpointTensor:
    quantised = tensor.quantised
    if quantised is None or not quantised.act_order:
        return tensor
    if scattered:
        quantised = replace(quantised, label=f"{quantised.label}, columns in the order of activations")
    if why:
        quantised = replace(quantised, format="q8", inexact=why)
    return replace(tensor, quantised=replace(quantised, act_order=scattered and not why))
