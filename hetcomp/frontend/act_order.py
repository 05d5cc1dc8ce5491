"""Which quantised weights have their columns in the order of activations (GPTQ's ``desc_act``, compressed-tensors'
``actorder``): a config says that it may be so, the groups of the columns (g_idx) whether it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hetcomp.errors import HetcompError
from hetcomp.ir.plan import CheckpointTensor

Groups = npt.NDArray[np.int64] | None  # of the columns; None: they are runs


def scattered_groups(
    raw: npt.NDArray[np.generic], columns: int, width: int, count: int, tensor: CheckpointTensor
) -> Groups:
    """Each column's group of ``count``, of ``width`` columns if they are runs. Raises HetcompError if there are none
    such."""
    found = raw.reshape(-1)[:columns].astype(np.int64)
    if np.array_equal(found, np.arange(columns) // width):
        return None
    if found.min() < 0 or found.max() >= count:
        raise HetcompError(f"{tensor.name} in {tensor.file} has columns of groups that it does not have")
    return found


def settled(
    tensors: tuple[CheckpointTensor, ...], of_matrix: int, groups_of: Callable[[CheckpointTensor], Groups]
) -> tuple[CheckpointTensor, ...]:
    """The tensors of one weight, with ``act_order`` as their groups are, which are read where the config leaves that
    open.

    of_matrix: tensors in turn whose rows are those of one matrix, so that their columns must be in one order.
    groups_of: reads those of a tensor; raises HetcompError if it has groups that it cannot have."""
    if not any(t.quantised is not None and t.quantised.act_order for t in tensors):
        return tensors
    scattered, why = False, ""
    for first in range(0, len(tensors), of_matrix):
        matrix = tensors[first : first + of_matrix]
        groups = [groups_of(t) if t.quantised is not None and t.quantised.act_order else None for t in matrix]
        scattered = scattered or any(g is not None for g in groups)
        why = why or _obstacle(groups, matrix[0])
    return tuple(_marked(tensor, scattered, why) for tensor in tensors)


def _obstacle(groups: Sequence[Groups], tensor: CheckpointTensor) -> str:
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
