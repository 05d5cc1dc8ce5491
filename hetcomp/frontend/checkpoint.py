"""Checkpoints: where a weight comes from, known from headers alone, and its numbers, one tensor at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hetcomp.errors import HetcompError
from hetcomp.frontend.act_order import Groups, settled
from hetcomp.frontend.file_bytes import read_bytes
from hetcomp.frontend.key_mapping import Parts
from hetcomp.frontend.row_places import assembled
from hetcomp.ir.plan import CheckpointTensor, Value, WeightSource
from hetcomp.quantised_numbers import QuantisedNumbers, joined
from hetcomp.row_pieces import Runs, take_rows
from hetcomp.stored_rows import StoredRows

# bf16 comes as its bits in uint16: numpy has no such type.
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16] | QuantisedNumbers
# Numbers while they are cut and joined; numpy's types lose track of a union there.
_Raw = npt.NDArray[Any]

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}
_UNUSED_BY_DESIGN = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")


class BaseCheckpoint(ABC):
    """Recipes and reading, over tensors that a subclass can fetch. Implements ir.target.Checkpoint.

    ``aliases``: other names of tied parameters; used where the checkpoint has only one of them.
    """

    # The types of tensors that are read, for messages.
    readable = "F32, F16 or BF16"

    def __init__(
        self,
        origin: str,
        tensors: Mapping[str, CheckpointTensor],
        parts: Mapping[str, Parts],
        aliases: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._origin = origin
        self._tensors = tensors
        self._parts = parts
        self._aliases = aliases
        self._settled: dict[tuple[str, ...], tuple[CheckpointTensor, ...]] = {}

    @property
    def origin(self) -> str:
        """Folder or description for messages."""
        return self._origin

    @property
    def quantised(self) -> bool:
        """Whether there may be quantised weights."""
        return False

    def source(self, value: Value) -> WeightSource:
        """See ir.target.Checkpoint."""
        parts = self._find(value)
        tensors = self._tensors_of(parts)
        return self._checked(value, replace(self._view(value, tensors), recipe=parts.recipe, tensors=tensors))

    def _tensors_of(self, parts: Parts) -> tuple[CheckpointTensor, ...]:
        if parts.names not in self._settled:
            tensors = tuple(self._tensors[name] for name in parts.names)
            of_matrix = {"stack_pair": 2, "concat": len(tensors)}.get(parts.recipe, 1)
            self._settled[parts.names] = settled(tensors, of_matrix, self._groups)
        return self._settled[parts.names]

    def _groups(self, tensor: CheckpointTensor) -> Groups:
        """Of the columns of a quantised tensor marked ``act_order``; checkpoints that mark none do without."""
        raise NotImplementedError

    def _view(self, value: Value, tensors: tuple[CheckpointTensor, ...]) -> WeightSource:
        """How the weight is cut out of what is stored."""
        view = value.view or WeightSource("plain", ())
        # MXFP4 is stored with the columns of a row side by side, whatever the parameter's own order is.
        if view.transpose and all(t.quantised is not None and t.quantised.scheme == "mxfp4" for t in tensors):
            return replace(view, transpose=False)
        return view

    def _find(self, value: Value) -> Parts:
        name = value.fqn or value.id
        for candidate in (name, *self._aliases.get(name, ())):
            if candidate in self._parts:
                return self._parts[candidate]
        raise HetcompError(
            f"{self._origin}: the checkpoint has no tensor {name} (expected shape "
            f"{[int(d) for d in value.type.shape]}); is a shard missing?"
        )

    def _checked(self, value: Value, source: WeightSource) -> WeightSource:
        """The source. Raises HetcompError if its tensors cannot be read, or their shapes do not fit the value."""
        for tensor in source.tensors:
            if tensor.dtype not in NUMPY and tensor.quantised is None:
                raise HetcompError(
                    f"{self._origin}: tensor {tensor.name} in {tensor.file} has dtype {tensor.dtype}; "
                    f"expected {self.readable}"
                )
        first = source.tensors[0]
        for index, tensor in enumerate(source.tensors):
            twin = source.tensors[index % 2 if source.recipe == "stack_pair" else 0]
            if source.recipe != "concat" and tensor.shape != twin.shape:
                raise HetcompError(
                    f"{self._origin}: tensor {tensor.name} in {tensor.file} has shape {list(tensor.shape)}, "
                    f"expected {list(twin.shape)} as {twin.name} has"
                )
        got = viewed_shape(source)
        expected = tuple(int(d) for d in value.type.shape)
        if got != expected:
            raise HetcompError(
                f"{self._origin}: tensor {first.name} in {first.file} has shape {list(first.shape)}, which "
                f"gives {value.fqn or value.id} the shape {list(got or first.shape)}; expected "
                f"{list(expected)}"
            )
        return source

    def unused(self, weights: Iterable[Value]) -> list[str]:
        """Tensors of the checkpoint that none of ``weights`` comes from, sorted."""
        used: set[str] = set()
        for value in weights:
            parts = self._find(value)
            used.update(parts.names)
            # The other names of a tied parameter hold the same numbers.
            for name in self._aliases.get(value.fqn or value.id, ()):
                used.update(self._parts[name].names if name in self._parts else ())
        return sorted(n for n in self._tensors if n not in used and not n.endswith(_UNUSED_BY_DESIGN))

    # ------------------------------------------------ numbers

    def read(self, value: Value) -> Numbers:
        """The whole weight in the value's shape, in the checkpoint's f32, f16, or bf16 bits; in any strides. What is
        quantised comes as its codes, or in f32 where no weight format has such codes."""
        source = self.source(value)
        if source.recipe == "plain":
            return _viewed(self._numbers(source.tensors[0]), source)
        if source.recipe in ("stack", "stack_pair"):
            count = len(source.tensors) // (2 if source.recipe == "stack_pair" else 1)
            return _joined([self._expert(source, e)[None] for e in range(count)])
        return _viewed(self._together(source.tensors), source)

    def read_expert(self, value: Value, expert: int) -> Numbers:
        """Matrix ``expert`` of a weight whose first axis counts experts; reads that matrix only."""
        return self._expert(self.source(value), expert)

    def read_pieces(self, value: Value, pieces: Sequence[Runs], expert: int | None = None) -> Generator[Numbers]:
        """These rows of a matrix, or of one expert's, a piece at a time: no more than these are read where the
        tensors have them apart, else the matrix is read, once."""
        source = self.source(value)
        tensors = source.tensors
        if expert is not None and source.recipe in ("stack", "stack_pair"):
            count = 2 if source.recipe == "stack_pair" else 1
            tensors = tensors[count * expert : count * (expert + 1)]
        if has_rows(source, tensors):
            yield from self._tensors_in_pieces(tensors, pieces)
            return
        numbers = self.read(value) if expert is None else self.read_expert(value, expert)
        yield from (take_rows(numbers, runs) for runs in pieces)

    def _tensors_in_pieces(self, tensors: Sequence[CheckpointTensor], pieces: Sequence[Runs]) -> Generator[Numbers]:
        """Rows of the tensors, counted through all of them."""
        firsts = [sum(t.shape[0] for t in tensors[:i]) for i in range(len(tensors))]
        wanted = [
            [
                (i, max(start, first) - first, min(stop, first + tensor.shape[0]) - first)
                for start, stop in runs
                for i, (first, tensor) in enumerate(zip(firsts, tensors, strict=True))
                if start < first + tensor.shape[0] and stop > first
            ]
            for runs in pieces
        ]
        readers = [
            self._rows(tensor, [(start, stop) for piece in wanted for j, start, stop in piece if j == i])
            for i, tensor in enumerate(tensors)
        ]
        for piece in wanted:
            yield _joined([next(readers[i]) for i, _, _ in piece])

    def _rows(self, tensor: CheckpointTensor, runs: Sequence[tuple[int, int]]) -> Generator[_Raw | QuantisedNumbers]:
        """The numbers of these rows, a run at a time, of a tensor whose rows a subclass cannot read one by one."""
        numbers = self._numbers(tensor)
        yield from (take_rows(numbers, (run,)) for run in runs)

    def stored_rows(self, value: Value, by_number: bool) -> StoredRows | str:
        """Where the rows of a weight lie, or (``by_number``) each of its numbers, in its shape; or why nobody can use
        them where they are. Reads nothing."""
        return assembled(self.source(value), lambda tensor: self._tensor_rows(tensor, by_number), viewed, by_number)

    def _tensor_rows(self, tensor: CheckpointTensor, by_number: bool) -> StoredRows | str:
        return f"{self._origin} is no file that numbers can be taken from where they lie"

    def _expert(self, source: WeightSource, expert: int) -> _Raw | QuantisedNumbers:
        if source.recipe == "plain":
            part = self._numbers(source.tensors[0], expert)
        elif source.recipe == "stack":
            part = self._numbers(source.tensors[expert])
        elif source.recipe == "stack_pair":
            part = self._together(source.tensors[2 * expert : 2 * expert + 2])
        else:
            raise HetcompError(f"{source.tensors[0].name} is no weight of experts")
        return _viewed(part, source)

    def _together(self, tensors: Sequence[CheckpointTensor]) -> _Raw | QuantisedNumbers:
        """The tensors' numbers, one after the other along the first axis."""
        return _joined([self._numbers(t) for t in tensors])

    def _numbers(self, tensor: CheckpointTensor, row: int | None = None) -> _Raw | QuantisedNumbers:
        raw = self._raw(tensor, row)
        return raw.astype(np.float32) if raw.dtype == np.float64 else raw

    @abstractmethod
    def _raw(self, tensor: CheckpointTensor, row: int | None) -> _Raw:
        """The tensor, or its part ``row`` along the first axis, in the checkpoint's own type."""


def viewed_shape(source: WeightSource) -> tuple[int, ...] | None:
    """Shape of the weight that ``source`` describes; None if its view does not fit its tensors."""
    first = source.tensors[0].shape
    shape: tuple[int, ...] = first
    if source.recipe == "stack":
        shape = (len(source.tensors), *first)
    elif source.recipe == "stack_pair":
        rows = first[0] + source.tensors[1].shape[0]
        shape = (len(source.tensors) // 2, rows, *first[1:])
    elif source.recipe == "concat":
        shape = (sum(t.shape[0] for t in source.tensors), *first[1:])
    if source.transpose and len(shape) >= 2:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if source.head_split is not None:
        heads, start, stop = source.head_split
        if len(shape) != 2 or shape[0] % heads or shape[0] // heads < stop:
            return None
        inner = (stop - start, shape[1])
        shape = (heads, *(inner[::-1] if source.head_transpose else inner))
    if source.row_runs:
        if max(stop for _, stop in source.row_runs) > shape[0]:
            return None
        shape = (sum(stop - start for start, stop in source.row_runs), *shape[1:])
    return shape


def has_rows(source: WeightSource, tensors: Sequence[CheckpointTensor]) -> bool:
    """Whether the rows of the weight, or of the expert that is in ``tensors``, are those of ``tensors``, one after the
    other, and quantised alike."""
    turned = source.transpose or source.deinterleave or source.head_split is not None or bool(source.row_runs)
    kinds = {None if (q := t.quantised) is None else (q.format, q.inexact, q.act_order) for t in tensors}
    return not turned and len(kinds) == 1 and all(len(t.shape) == 2 for t in tensors)


def _joined(parts: Sequence[_Raw | QuantisedNumbers]) -> _Raw | QuantisedNumbers:
    if len(parts) == 1:
        return parts[0]
    coded = [p for p in parts if isinstance(p, QuantisedNumbers)]
    if len(coded) == len(parts):
        return joined(coded)
    plain = [p.to_f32() if isinstance(p, QuantisedNumbers) else p for p in parts]
    if len({p.dtype for p in plain}) > 1:
        return np.concatenate([_to_f32(p) for p in plain])
    return np.concatenate(plain)


def _to_f32(numbers: _Raw) -> _Raw:
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)


def viewed(numbers: _Raw, source: WeightSource) -> _Raw:
    """Applies the view to a whole weight or to one expert's part of it (then without the first axis). Nothing is moved
    that strides can say."""
    if source.transpose:
        numbers = np.swapaxes(numbers, -1, -2)
    if source.deinterleave:
        # Rows of a matrix; of a bias the last axis is the rows.
        axis = -2 if _is_matrix(source) else -1
        order = np.arange(numbers.shape[axis])
        numbers = np.take(numbers, np.concatenate([order[::2], order[1::2]]), axis=axis)
    if source.head_split is not None:
        heads, start, stop = source.head_split
        numbers = numbers.reshape(heads, -1, numbers.shape[-1])[:, start:stop]
        if source.head_transpose:
            numbers = np.swapaxes(numbers, -1, -2)
    if source.row_runs:
        numbers = np.concatenate([numbers[start:stop] for start, stop in source.row_runs])
    return numbers


def _viewed(numbers: _Raw | QuantisedNumbers, source: WeightSource) -> _Raw | QuantisedNumbers:
    if not isinstance(numbers, QuantisedNumbers):
        return viewed(numbers, source)
    if source.transpose:
        turned = numbers.transposed()
        if not isinstance(turned, QuantisedNumbers):
            return viewed(turned, replace(source, transpose=False))
        numbers = turned
    if source.deinterleave:
        order = np.arange(numbers.shape[-2])
        numbers = numbers.rows(np.concatenate([order[::2], order[1::2]]))
    if source.head_split is not None:
        numbers = numbers.heads(*source.head_split)
        if source.head_transpose:
            return numbers.transposed()
    return numbers.cut(0, source.row_runs) if source.row_runs else numbers


def _is_matrix(source: WeightSource) -> bool:
    shape = viewed_shape(source)
    return shape is not None and len(shape) >= 3


def read_tensor(path: Path, name: str, offset: int, dtype: np.dtype[Any], count: int) -> _Raw:
    """``count`` numbers of the tensor ``name`` from byte ``offset`` of its file on. Raises HetcompError if they cannot
    be read or are not there."""
    try:
        data = read_bytes(path, offset, count * dtype.itemsize)
    except OSError as error:
        raise HetcompError(f"cannot read {path}: {error.strerror or error}") from error
    if data.size != count * dtype.itemsize:
        raise HetcompError(f"{path} was truncated while it was read: tensor {name} is incomplete")
    if data.ctypes.data % dtype.itemsize:  # a header of another length than safetensors writes
        data = data.copy()
    return data.view(dtype)


class ModuleCheckpoint(BaseCheckpoint):
    """The parameters of a transformers module in memory."""

    def __init__(self, module: torch.nn.Module, aliases: Mapping[str, tuple[str, ...]] | None = None) -> None:
        everything = [*module.named_parameters(), *module.named_buffers()]
        self._data = {name: tensor.detach() for name, tensor in everything}
        for name, tensor in self._data.items():
            if tensor.device.type == "meta":
                raise HetcompError(f"{type(module).__name__}: parameter {name} is on the meta device, it has no data")
        tensors = {
            name: CheckpointTensor("memory", name, _dtype_name(t.dtype), tuple(t.shape), 0, t.nbytes)
            for name, t in self._data.items()
        }
        parts = {name: Parts("plain", (name,)) for name in tensors}
        super().__init__(f"{type(module).__name__} in memory", tensors, parts, aliases or {})

    def _raw(self, tensor: CheckpointTensor, row: int | None) -> _Raw:
        data = self._data[tensor.name] if row is None else self._data[tensor.name][row]
        data = data.cpu().contiguous()
        if data.dtype == torch.bfloat16:
            return data.view(torch.uint16).numpy()
        return data.numpy()


def _dtype_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
