"""Runs a graph for one size of a step: weights and what depends on them have shapes only, the rest has numbers.

What has numbers are constants, masks, positions and tables of sines; they are what the recognisers try.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetcomp.errors import HetcompError
from hetcomp.frontend.onnx.contrib_shapes import SHAPES
from hetcomp.frontend.onnx.dequantised_weights import BITS, Dequantised, whole_numbers
from hetcomp.frontend.onnx.graph import Graph, Input, Node
from hetcomp.frontend.onnx.linear_attention_op import is_state
from hetcomp.frontend.onnx.model_file import OnnxFile
from hetcomp.frontend.onnx.not_computable import NotComputable
from hetcomp.frontend.onnx.torch_ops import compute, from_numpy

# Tensors up to this size are read where they are; larger ones only where nothing else than them decides about a
# result, as the tables of a rotary embedding, which have a row a position.
_SMALL = 1 << 14
_LARGE = 1 << 28
# Ops through which a weight stays one: transposed, or in another type.
_PASSES = frozenset({"Cast", "CastLike", "Identity", "Transpose"})
# Operands that are tables of cosines and sines, a row a position.
TABLES = {
    "RotaryEmbedding": (1, 2),
    "com.microsoft.RotaryEmbedding": (2, 3),
    "com.microsoft.GroupQueryAttention": (7, 8),
}
_OF_QUANTISED_ACTIVATIONS = frozenset(
    {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QuantizeLinear"}
)
# Ops of linear attention and state-space models.
_RECURRENT = re.compile(r"ConvWithState|ConvState|GatedDeltaNet|LinearAttention|Mamba")
_PAST = re.compile(r"past|cache", re.IGNORECASE)


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, or its transpose (of the last two axes)."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Run:
    """``values`` of all nodes for a step of ``tokens`` behind ``past`` positions. ``weights``: values that are tensors
    of the file. ``dequantised``: what weights are that DequantizeLinear makes, by their names."""

    tokens: int
    past: int
    values: Mapping[str, Tensor]
    weights: Mapping[str, Weight]
    dequantised: Mapping[str, Dequantised] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Positions that the last token attends to."""
        return self.past + self.tokens

    def is_activation(self, value: str) -> bool:
        """Whether it depends on the tokens."""
        return value in self.values and self.values[value].is_meta and value not in self.weights

    def shape(self, value: str) -> tuple[int, ...]:
        """Of a value, at this size of a step."""
        return tuple(self.values[value].shape)

    def number(self, value: str) -> float | None:
        """The value if it is a single known number."""
        found = self.values.get(value)
        return None if found is None or found.is_meta or found.numel() != 1 else float(found.reshape(()).item())

    def trial(self, nodes: Iterable[Node], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``nodes`` make of numbers that are given for some values, and of this run's numbers for all others.
        Raises NotComputable."""
        known = dict(given)
        for node in nodes:
            operands = [known.get(v, self.values.get(v)) if v else None for v in node.inputs]
            if any(t is not None and t.is_meta for t in operands):
                raise NotComputable("depends on more than its operands")
            for value, made in zip(node.outputs, compute(node, operands), strict=False):
                if value and value not in given:
                    known[value] = made
        return known


class Evaluator:
    """Runs the graph of a file; constants are read once."""

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self._read: dict[str, Tensor] = {}

    def run(self, graph: Graph, tokens: int, past: int) -> Run:
        """Raises HetcompError naming a node or an input that hetcomp does not know."""
        values = {name: self._input(given, tokens, past) for name, given in graph.inputs.items()}
        weights: dict[str, Weight] = {}
        dequantised: dict[str, Dequantised] = {}
        for name, tensor in graph.initialisers.items():
            if tensor.bytes <= _SMALL and tensor.dtype not in ("I4", "U4"):
                values[name] = self._constant(graph, name)
            else:
                values[name] = torch.empty(tensor.shape, device="meta")
            weights[name] = Weight(name)
        for node in graph.nodes:
            if node.op == "DequantizeLinear" and node.inputs[0] in graph.initialisers:
                found = self._dequantised(graph, node)
                dequantised[node.outputs[0]] = found
                weights[node.outputs[0]] = Weight(node.outputs[0])
                values[node.outputs[0]] = torch.empty(found.stored, device="meta")
            else:
                self._node(graph, node, values, weights)
        return Run(tokens, past, values, weights, dequantised)

    def _input(self, given: Input, tokens: int, past: int) -> Tensor:
        kind = kind_of(given, self._file)
        if kind == "ids":
            return torch.empty((1, tokens), dtype=torch.int64, device="meta")
        if kind == "positions":
            positions = torch.arange(past, past + tokens)[None]
            # A third axis: the places of pictures in three dimensions, which for text are the same.
            return positions if len(given.shape) == 2 else positions.expand(3, 1, tokens)
        if kind == "mask":
            return torch.ones((1, past + tokens), dtype=torch.int64)
        if kind == "last":
            return torch.full((1,), past + tokens - 1, dtype=torch.int32)
        if kind == "cached":
            return torch.tensor([True])
        if kind == "total":
            return torch.tensor(past + tokens, dtype=torch.int32).reshape((1,) * len(given.shape))
        if kind == "state":
            return torch.empty([d if isinstance(d, int) else 1 for d in given.shape], device="meta")
        heads, width = (d if isinstance(d, int) else 1 for d in (given.shape[1], given.shape[3]))
        return torch.empty((1, heads, past, width), device="meta")

    def _constant(self, graph: Graph, name: str) -> Tensor:
        if name not in self._read:
            tensor = graph.initialisers[name]
            self._read[name] = from_numpy(self._file.numbers(tensor), bits=tensor.dtype == "BF16")
        return self._read[name]

    def _dequantised(self, graph: Graph, node: Node) -> Dequantised:
        codes, scales = (graph.initialisers.get(v) for v in node.inputs[:2])
        zeros = graph.initialisers.get(node.input(2))
        assert codes is not None
        if scales is None or len(codes.shape) != 2 or codes.dtype not in BITS or (zeros is None and node.input(2)):
            raise HetcompError(
                f"{self._file.path}: {node} makes {node.outputs[0]} of {codes.dtype}{list(codes.shape)}; hetcomp takes "
                "matrices of 4 or 8 bits whose scales and zero points are in the file"
            )
        axis = int(node.get("axis", 1)) % 2 if scales.shape and scales.shape != (1,) else -1
        zero: int | None = 0
        if zeros is not None:
            zero = None
            if zeros.bytes <= _SMALL or zeros.dtype in ("I8", "U8"):
                stored = whole_numbers(self._file.numbers(zeros), zeros.dtype, zeros.shape)
                zero = int(stored.flat[0]) if stored.size and (stored == stored.flat[0]).all() else None
        names = node.inputs[0], node.inputs[1], node.input(2)
        return Dequantised(codes.shape, *names, axis, int(node.get("block_size", 0)) if axis >= 0 else 0, zero)

    def _node(self, graph: Graph, node: Node, values: dict[str, Tensor], weights: dict[str, Weight]) -> None:
        try:
            missing = next((v for v in node.inputs if v and v not in values), None)
            if missing is not None:
                raise NotComputable(f"reads {missing}, which nothing makes")
            if node.op in _OF_QUANTISED_ACTIVATIONS:
                raise NotComputable(
                    "computes with quantised activations, which hetcomp does not; quantise weights alone"
                )
            operands = [v for v in node.inputs if v]
            for index in TABLES.get(node.op, ()):
                if node.input(index) in weights:
                    self._read_large(graph, [node.inputs[index]], values)
                    del weights[node.inputs[index]]
            if node.inputs and node.inputs[0] in weights and _may_pass(node, graph, weights[node.inputs[0]]):
                passed = _passed(node, weights[node.inputs[0]], values[node.inputs[0]].ndim)
                if passed is not None:
                    weights[node.outputs[0]] = passed
            elif not any(values[v].is_meta and v not in weights for v in operands):
                self._read_large(graph, operands, values)
            given = [values[v] if v else None for v in node.inputs]
            made = SHAPES[node.op](node, *given) if node.op in SHAPES else compute(node, given)
        except NotComputable as error:
            raise HetcompError(f"{self._file.path}: {node} {error}") from error
        for value, tensor in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            if value and tensor is not None:
                values[value] = tensor

    def _read_large(self, graph: Graph, operands: list[str], values: dict[str, Tensor]) -> None:
        """Reads the tensors among operands that nothing but constants, positions and masks stand beside."""
        for value in operands:
            tensor = graph.initialisers.get(value)
            if tensor is None or not values[value].is_meta:
                continue
            if tensor.bytes > _LARGE:
                raise NotComputable(f"computes with tensor {value} of {tensor.bytes:,} bytes, which is no weight there")
            values[value] = self._constant(graph, value)


def _may_pass(node: Node, graph: Graph, weight: Weight) -> bool:
    """Whether a weight may stay one through ``node``; codes also in another shape, which their op says itself."""
    stored = graph.initialisers.get(weight.name)
    return node.op in _PASSES or (node.op == "Reshape" and stored is not None and stored.dtype == "U8")


def _passed(node: Node, weight: Weight, rank: int) -> Weight | None:
    """The weight behind a node of _PASSES; None if its axes are moved in another way."""
    if node.op != "Transpose":
        return weight
    order = list(node.get("perm", range(rank)[::-1]))
    if order == list(range(rank)):
        return weight
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return Weight(weight.name, not weight.transposed) if rank >= 2 and order == swapped else None


def kind_of(given: Input, file: OnnxFile) -> str:
    """What an input of the graph is for: ids, positions, mask, past (a cache), state (of a convolution or recurrence),
    last (the position of the last token), total (of positions) or cached (whether there are caches). Raises
    HetcompError for others."""
    if is_state(file.graph, given.name):
        return "state"
    recurrent = next((n for n in file.graph.nodes if given.name in n.inputs and _RECURRENT.search(n.op)), None)
    if recurrent is not None:
        raise HetcompError(
            f"{file.path}: {recurrent} keeps the state of a convolution or recurrence, {given.name}, in a way that "
            "hetcomp does not know"
        )
    rank, integral = len(given.shape), given.dtype in ("I64", "I32")
    pictures = rank == 3 and integral and "position" in given.name.lower() and given.shape[0] == 3
    along = given.shape[-1 if integral else 2] if rank in (2, 4) or pictures else "?"
    if isinstance(along, int):
        raise HetcompError(
            f"{file.path}: input {given.name} has the shape {list(given.shape)}, for {along} positions and no other "
            "number of them; export the model with a dynamic sequence"
        )
    name = given.name.lower()
    if integral and rank == 2 and name in ("input_ids", "ids", "tokens"):
        return "ids"
    if integral and (rank == 2 or pictures) and "position" in name:
        return "positions"
    if integral and rank == 2 and "mask" in name:
        return "mask"
    if integral and rank <= 1 and name in ("past_seq_len", "seqlens_k"):
        return "last"
    if integral and rank <= 1 and name in ("total_seq_len", "total_sequence_length"):
        return "total"
    if given.dtype == "BOOL" and name == "use_cache_branch":
        return "cached"
    if not integral and rank == 4 and _PAST.search(name):
        sized = isinstance(given.shape[1], int) and isinstance(given.shape[3], int)
        if not sized and not _only_attended_to(given, file.graph):
            raise HetcompError(
                f"{file.path}: the cache {given.name} has the shape {list(given.shape)}; expected "
                "[batch, heads, past, head_dim] with heads and head_dim as numbers"
            )
        return "past"
    raise HetcompError(
        f"{file.path}: input {given.name} of type {given.dtype} and shape {list(given.shape)} is none of a "
        "decoder that hetcomp knows; expected input_ids, position_ids, attention_mask and past_key_values.*"
    )


def _only_attended_to(cache: Input, graph: Graph) -> bool:
    """Whether nothing but ops whose attributes say its sizes read the cache: onnxruntime-genai names its width only."""
    readers = [node for node in graph.nodes if cache.name in node.inputs]
    return all(node.op == "com.microsoft.GroupQueryAttention" for node in readers)


def table_rows(graph: Graph, run: Run) -> list[int]:
    """Rows of the tables of cosines and sines that positions choose from: more positions the model cannot take."""
    rows = []
    for node in graph.nodes:
        tables = [node.inputs[i] for i in TABLES.get(node.op, ()) if node.input(i)]
        if node.op == "Gather" and int(node.get("axis", 0)) == 0 and run.tokens in run.shape(node.inputs[1]):
            tables = [] if run.values[node.outputs[0]].is_meta else [node.inputs[0]]
        # Other tensors than the file's may be made for the positions of the run.
        rows += [run.shape(t)[0] for t in tables if t in graph.initialisers and len(run.shape(t)) >= 2]
    return rows


def step_sizes(graph: Graph) -> tuple[int, int]:
    """Numbers of tokens and of positions before them that no dimension of the model equals, nor their sum: primes
    above usual numbers of heads, whose sum is twice a prime."""
    taken = {int(d) for t in graph.initialisers.values() for d in t.shape}
    taken |= {d for i in graph.inputs.values() for d in i.shape if isinstance(d, int)}
    caches = any(len(i.shape) == 4 for i in graph.inputs.values())
    primes = [n for n in range(37, 1000) if all(n % d for d in range(2, int(n**0.5) + 1)) and n not in taken]
    for tokens in primes:
        for past in (n for n in primes if n > 200) if caches else (0,):
            seen = tokens + past
            if seen not in taken and (not past or seen // 2 in primes):
                return tokens, past
    raise AssertionError("a model with all dimensions there are")
