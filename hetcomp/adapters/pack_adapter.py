"""Packs an adapter for a compiled model: one file that the runtime loads while it runs.

The file's form is that of runtime_lib/src/adapter.h. Numbers are rounded once, to what adapted_ops.number_bytes says.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import xxhash

from hetcomp.adapters.base_model import ARTIFACT_FILE, BaseModel
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter
from hetcomp.adapters.packed_pairs import cut_pairs, fits, pack_pairs, packed_rank, viewed_pairs
from hetcomp.adapters.pair_stack import PairStack, common_scale, stack_of
from hetcomp.adapters.tensor_file import new_file
from hetcomp.artifact.weight_files import tensor_name
from hetcomp.backends.adapted_ops import AdaptableWeight, adaptable_weights, pair_bytes
from hetcomp.backends.gpu.pair_layout import PairLayout, changed_on, streamed_to
from hetcomp.backends.program import ProgramLayout
from hetcomp.errors import HetcompError
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.node_parts import Cut
from hetcomp.ir.plan import Plan, Value, WeightSource
from hetcomp.ir.serialise import from_json

_MAGIC, SCHEMA = b"HETLORA\x01", (2, 0)
_ALIGNMENT = 64
_LARGEST_RANK = 4096  # Adapter::kLargestRank


@dataclass(frozen=True)
class PackedAdapter:
    """What was written: the weights of the program that the adapter changes, the greatest rank, bytes in memory."""

    path: Path
    weights: int
    rank: int
    bytes: int


@dataclass(frozen=True)
class _Target:
    """A weight of a program that an adapter changes; ``cut``: of which whole weight it is what part, if it is one."""

    index: int
    value: Value
    shape: AdaptableWeight
    adapted: AdaptedWeight
    cut: tuple[Value, Cut] | None = None

    def pairs(self) -> PairStack:
        """Raises HetcompError naming the weight if the pairs do not have its shape."""
        whole, cut = self.cut or (self.value, None)
        pairs = viewed_pairs(stack_of(self.adapted), whole.view or WeightSource("plain", ()))
        pairs = cut_pairs(pairs, cut) if cut is not None else pairs
        if not fits(pairs, self.shape):
            raise HetcompError(
                f"The pairs of {self.adapted.fqn} cannot be brought into the form in which the model has the weight; "
                "report this bug, and compile with --adapter FOLDER --merge."
            )
        return pairs


@dataclass(frozen=True)
class _Targets:
    """Of the CPU's program, and of each GPU that has room for adapters."""

    cpu: tuple[_Target, ...]
    gpus: tuple[tuple[str, tuple[_Target, ...]], ...]

    def __iter__(self) -> Iterator[_Target]:
        """In the order of their data."""
        return chain(self.cpu, *(of_gpu for _, of_gpu in self.gpus))


def pack_adapter(
    artifact: str | Path,
    folder: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    allow_router: bool = False,
) -> PackedAdapter:
    """Packs the PEFT adapter in ``folder`` for the compiled model ``artifact`` into the new file ``out``. ``name``: the
    folder's by default.

    Raises HetcompError, with nothing left at ``out``, if the folder is refused (bind_adapter), a GPU that has no room
    for the pairs computes with a target, the model has the weights of one otherwise than as matrices, or ``out``
    exists.
    """
    artifact = Path(artifact)
    base = artifact_base(artifact)
    return pack_bound(artifact, read_adapter(folder, base, name=name, allow_router=allow_router), out)


def artifact_base(artifact: Path) -> BaseModel:
    """The model that ``artifact`` was compiled from, as far as an adapter needs it. Raises HetcompError."""
    return BaseModel.from_json(_read(artifact, ARTIFACT_FILE))


def pack_bound(artifact: Path, adapter: Adapter, out: str | Path) -> PackedAdapter:
    """As :func:`pack_adapter`, of an adapter that is bound to the artifact's base."""
    plan_json = _read(artifact, "plan.json")
    plan = from_json(plan_json)
    targets = _targets(plan, adapter)
    digest = hashlib.sha256(plan_json.encode()).hexdigest()
    return _write(Path(out), targets, adapter, digest)


def _read(artifact: Path, file: str) -> str:
    try:
        return (artifact / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HetcompError(
            f"{artifact} is no compiled model that adapters can be packed for: {file} cannot be read ({error}). "
            "Compile the model again."
        ) from None


def _targets(plan: Plan, adapter: Adapter) -> _Targets:
    """The weights that the adapter changes. Raises HetcompError if one of the adapter's has no place."""
    gpus = tuple((gpu, tuple(_gpu_targets(plan, gpu, adapter))) for gpu in on_gpu(plan))
    targets = _Targets(tuple(_cpu_targets(plan, adapter)), gpus if plan.adapter_room is not None else ())
    placed = {target.adapted.fqn for target in targets}
    missing = next((fqn for fqn in adapter.weights if fqn not in placed), None)
    if missing is not None:
        raise HetcompError(
            f"Adapter {adapter.name} changes {missing}, which {plan.model.name} uses in a way that adapters cannot "
            "change at run time; compile with --adapter FOLDER --merge."
        )
    return targets


def _cpu_targets(plan: Plan, adapter: Adapter) -> Iterator[_Target]:
    layout = ProgramLayout.of(plan)
    shapes = adaptable_weights(plan, layout.weights, layout.cuts)
    for index, (value, shape) in enumerate(zip(layout.weights, shapes, strict=True)):
        cut = layout.cuts.get(value.id)
        adapted = adapter.weights.get((cut[0] if cut else value).fqn or "")
        if adapted is None or shape.matrices == 0:
            continue
        _check_rank(adapter, adapted, _LARGEST_RANK, "at run time")
        yield _Target(index, value, shape, adapted, cut)


def _gpu_targets(plan: Plan, gpu: str, adapter: Adapter) -> Iterator[_Target]:
    """Raises HetcompError if the GPU computes with a weight that the adapter changes, but has no room for its pairs."""
    room, layout = plan.adapter_room, PairLayout.of(plan, gpu)
    weights = layout.weights if layout is not None else ()
    held = {value.id for value, _ in weights}
    computed = changed_on(plan, gpu) | (streamed_to(plan, gpu) if room is None else set())
    for value in plan.values:
        if value.fqn not in adapter.weights or value.id not in computed or value.id in held:
            continue
        wish = "--adapters N --adapter-rank R" if room is None else "--adapter-experts"
        raise HetcompError(
            f"Adapter {adapter.name} changes {value.fqn}, of which {gpu} computes a part or all, and the model was "
            f"compiled without room for {'adapters' if room is None else 'adapters of routed experts'} there; compile "
            f"it with {wish}, with --adapter FOLDER --merge, or for the CPU alone (--vram 0)."
        )
    for index, (value, shape) in enumerate(weights):
        adapted = adapter.weights.get(value.fqn or "")
        if adapted is not None and room is not None:
            _check_rank(adapter, adapted, packed_rank(room.rank), f"on {gpu}")
            yield _Target(index, value, shape, adapted)


def _check_rank(adapter: Adapter, adapted: AdaptedWeight, most: int, where: str) -> None:
    if packed_rank(adapted.rank) > most:
        raise HetcompError(
            f"Adapter {adapter.name} has rank {adapted.rank} at {adapted.fqn}; {where} at most {most} is possible"
            f"{'' if most == _LARGEST_RANK else ' (hetcomp compile --adapter-rank)'}."
        )


def _entries(targets: Sequence[_Target], position: int) -> tuple[list[dict[str, object]], int]:
    """Those of the header, of weights whose data begin at ``position``, and where they end."""
    weights: list[dict[str, object]] = []
    for target in targets:
        rank, a, b = _sizes(target)
        scale = common_scale(target.adapted)
        weights.append(
            {
                "weight": target.index,
                "name": tensor_name(target.value),
                "rank": rank,
                "scale": 1.0 if scale is None else scale,
                "a": position,
                "b": position + a,
            }
        )
        position += a + b
    return weights, position


def _write(out: Path, targets: _Targets, adapter: Adapter, digest: str) -> PackedAdapter:
    # The header's length does not depend on the data: it is written first with a hash of zeros, and again at the end.
    weights, position = _entries(targets.cpu, 0)
    gpus: list[dict[str, object]] = []
    for gpu, of_gpu in targets.gpus:
        entries, position = _entries(of_gpu, position)
        gpus.append({"device": gpu, "weights": entries})
    header: dict[str, object] = {
        "schema": list(SCHEMA),
        "name": adapter.name,
        "plan": digest,
        "sha256": adapter.sha256,
        "base": adapter.base,
        "bytes": position,
        "xxh3_64": "0" * 16,
        "weights": weights,
        **({"gpus": gpus} if gpus else {}),
    }
    hashed = xxhash.xxh3_64()
    with new_file(out) as file:
        begin = file.write(_head(header))
        for target in targets:
            for data in pack_pairs(target.pairs(), target.shape):
                padding = bytes(-data.size % _ALIGNMENT)
                for piece in (data.data, padding):
                    file.write(piece)
                    hashed.update(piece)
        assert file.tell() == begin + position
        file.seek(0)
        file.write(_head(header | {"xxh3_64": hashed.hexdigest()}))
    return PackedAdapter(out, len(list(targets)), max(_sizes(target)[0] for target in targets), position)


def _sizes(target: _Target) -> tuple[int, int, int]:
    """Rank, and bytes of a and of b as they lie in the file, padding included."""
    rank = packed_rank(target.adapted.rank)
    return rank, *pair_bytes(target.shape, rank)


def _head(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(24 + len(text)) % _ALIGNMENT)
    return _MAGIC + struct.pack("<QQ", len(text), xxhash.xxh3_64(text).intdigest()) + text
