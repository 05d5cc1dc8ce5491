"""Routing traces: which experts each token of a run chose in each MoE layer, and with what weights.

A trace is one safetensors file. Its metadata is ``format`` ("hetcomp routing trace 1"), ``model``, ``experts`` (of a
layer), and ``source`` (what was run); its arrays, N tokens in the order in which they were computed:

- ``experts`` u8 [N, layers, top_k] (u16 with more than 256 experts), ``weights`` f16 likewise, as the experts got them
- ``step`` u32 [N]: number of the step, from 0, never falling; ``decode`` u8 [N]: 1 if it was a step of decoding
- ``position`` u32 [N]: in the token's sequence; ``sequence`` u16 [N]: which of the run's sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hetcomp.artifact.staged_file import write_whole
from hetcomp.errors import HetcompError
from hetcomp.frontend.safetensors_header import read_header, read_metadata

FORMAT = "hetcomp routing trace 1"
_SHAPES = {"experts": 3, "weights": 3, "step": 1, "decode": 1, "position": 1, "sequence": 1}
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
}
_WANTED = {
    "experts": ("U8", "U16"),
    "weights": ("F16",),
    "step": ("U32",),
    "decode": ("U8",),
    "position": ("U32",),
    "sequence": ("U16",),
}


@dataclass(frozen=True)
class RoutedStep:
    """A step as the runtime tells it: ``experts`` i32 and ``weights`` f32 [layers, T, top_k], ``positions`` and
    ``slots`` i32 [T]."""

    decode: bool
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class RoutingTrace:
    """``experts`` u8 or u16 and ``weights`` f16 [N, layers, top_k]; ``step``, ``position`` u32, ``sequence`` u16 and
    ``decode`` u8 [N]; ``n_experts``: of a layer; ``source``: what was run, for messages."""

    model: str
    source: str
    n_experts: int
    experts: NDArray[np.unsignedinteger[Any]]
    weights: NDArray[np.float16]
    step: NDArray[np.uint32]
    decode: NDArray[np.uint8]
    position: NDArray[np.uint32]
    sequence: NDArray[np.uint16]

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.experts.shape[0])

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts that a token chooses in a layer."""
        return int(self.experts.shape[2])

    @staticmethod
    def of_steps(model: str, source: str, n_experts: int, steps: Sequence[RoutedStep]) -> RoutingTrace:
        """What a run gave. ``slots`` become sequences: a slot whose positions start anew is another one. Raises
        HetcompError if there are no steps, or of different numbers of layers or choices."""
        shapes = {(s.experts.shape[0], s.experts.shape[2]) for s in steps}
        if len(shapes) != 1:
            raise HetcompError(
                f"The run of {model} gives no routing trace: "
                + ("its steps differ in shape." if shapes else "no step.")
            )
        narrow = np.uint8 if n_experts <= 256 else np.uint16
        rows = [len(s.positions) for s in steps]
        return RoutingTrace(
            model,
            source,
            n_experts,
            np.concatenate([s.experts.swapaxes(0, 1) for s in steps]).astype(narrow),
            np.concatenate([s.weights.swapaxes(0, 1) for s in steps]).astype(np.float16),
            np.repeat(np.arange(len(steps), dtype=np.uint32), rows),
            np.repeat([np.uint8(s.decode) for s in steps], rows).astype(np.uint8),
            np.concatenate([s.positions for s in steps]).astype(np.uint32),
            _sequences(steps),
        )

    def first(self, tokens: int) -> RoutingTrace:
        """The trace of the first ``tokens`` tokens."""
        return replace(self, **{name: getattr(self, name)[:tokens] for name in _SHAPES})

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises HetcompError where that is not possible."""
        metadata = {"format": FORMAT, "model": self.model, "experts": str(self.n_experts), "source": self.source}
        write_whole(path, save({name: np.ascontiguousarray(getattr(self, name)) for name in _SHAPES}, metadata))

    @staticmethod
    def read(path: Path) -> RoutingTrace:
        """Reads a file. Raises HetcompError naming it and what is wrong: it is none, or damaged."""
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise HetcompError(
                f"{path} is no routing trace: its format is {metadata.get('format')!r}, expected {FORMAT!r}; record "
                "one with hetcomp trace MODEL.hetc --routing FILE."
            )
        arrays = _arrays(path)
        experts = metadata.get("experts", "")
        if not experts.isdecimal() or not 1 <= int(experts) <= 65536:
            raise HetcompError(f"{path}: the trace is of {experts!r} experts; expected a number from 1 to 65536.")
        trace = RoutingTrace(metadata.get("model", ""), metadata.get("source", ""), int(experts), **arrays)
        _check(path, trace)
        return trace


def _sequences(steps: Sequence[RoutedStep]) -> NDArray[np.uint16]:
    of_slot: dict[int, tuple[int, int]] = {}  # its sequence, and the position that was reached
    found: list[int] = []
    begun = 0
    for step in steps:
        for slot, position in zip(step.slots.tolist(), step.positions.tolist(), strict=True):
            sequence, reached = of_slot.get(slot, (-1, position))
            if position <= reached:
                sequence, begun = begun, begun + 1
            of_slot[slot] = sequence, position
            found.append(sequence)
    return np.array(found, dtype=np.uint16)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    header = read_header(path)
    found: dict[str, NDArray[Any]] = {}
    content = path.read_bytes()
    for name, wanted in _WANTED.items():
        entry = header.get(name)
        if entry is None:
            raise HetcompError(f"{path}: the routing trace lacks the array {name}; record it again.")
        if entry.dtype not in wanted or len(entry.shape) != _SHAPES[name]:
            raise HetcompError(
                f"{path}: the array {name} is {entry.dtype} {list(entry.shape)}; expected {' or '.join(wanted)} with "
                f"{_SHAPES[name]} dimensions."
            )
        data = content[entry.offset : entry.offset + entry.bytes]
        found[name] = np.frombuffer(data, _DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def _check(path: Path, trace: RoutingTrace) -> None:
    tokens, layers, top_k = trace.experts.shape
    if not (tokens and layers and 1 <= top_k <= trace.n_experts):
        raise HetcompError(f"{path}: experts is of {tokens} tokens, {layers} layers and {top_k} choices; none is 0.")
    if trace.weights.shape != trace.experts.shape:
        raise HetcompError(f"{path}: weights is {list(trace.weights.shape)}, experts {list(trace.experts.shape)}.")
    for name in ("step", "decode", "position", "sequence"):
        if getattr(trace, name).size != tokens:
            raise HetcompError(f"{path}: {name} has {getattr(trace, name).size} entries for {tokens} tokens.")
    if (largest := int(trace.experts.max())) >= trace.n_experts:
        raise HetcompError(f"{path}: expert {largest} was chosen, but a layer has {trace.n_experts}.")
    if top_k > 1 and not np.diff(np.sort(trace.experts.astype(np.int64), axis=2), axis=2).all():
        raise HetcompError(f"{path}: a token chooses an expert twice.")
    if not np.isfinite(trace.weights).all():
        raise HetcompError(f"{path}: weights has numbers that are not finite.")
    if (np.diff(trace.step.astype(np.int64)) < 0).any():
        raise HetcompError(f"{path}: the numbers of the steps fall.")
