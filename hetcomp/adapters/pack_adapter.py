"""Packs an adapter for a compiled model: one file that the runtime loads while it runs.

The file's form is that of runtime_lib/src/adapter.h. Numbers are rounded to bf16 beside weights that are not f32, once.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hetcomp.adapters.base_model import ARTIFACT_FILE, BaseModel
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter
from hetcomp.adapters.packed_pairs import cut_pairs, fits, pack_pairs, packed_rank, viewed_pairs
from hetcomp.adapters.pair_stack import PairStack, common_scale, stack_of
from hetcomp.adapters.tensor_file import new_file
from hetcomp.artifact.weight_files import tensor_name
from hetcomp.backends.adapted_ops import AdaptableWeight, adaptable_weights
from hetcomp.backends.program import ProgramLayout
from hetcomp.errors import HetcompError
from hetcomp.ir.homes import on_gpu
from hetcomp.ir.plan import Plan, Value, WeightSource
from hetcomp.ir.serialise import from_json

_MAGIC, SCHEMA = b"HETLORA\x01", (1, 0)
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
    """A weight of the program that an adapter changes, of the part of which it is a cut."""

    index: int
    value: Value
    shape: AdaptableWeight
    adapted: AdaptedWeight
    layout: ProgramLayout

    def pairs(self) -> PairStack:
        """Raises HetcompError naming the weight if the pairs do not have its shape."""
        whole, cut = self.layout.cuts.get(self.value.id, (self.value, None))
        pairs = viewed_pairs(stack_of(self.adapted), whole.view or WeightSource("plain", ()))
        pairs = cut_pairs(pairs, cut) if cut is not None else pairs
        if not fits(pairs, self.shape):
            raise HetcompError(
                f"The pairs of {self.adapted.fqn} cannot be brought into the form in which the model has the weight; "
                "report this bug, and compile with --adapter FOLDER --merge."
            )
        return pairs


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

    Raises HetcompError, with nothing left at ``out``, if the folder is refused (bind_adapter), the model computes with
    a GPU or has the weights of a target otherwise than as matrices, or ``out`` exists.
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
    if on_gpu(plan):
        raise HetcompError(
            f"A GPU computes a part of {artifact}, beside which adapters cannot be loaded at run time; compile the "
            "model with --adapter FOLDER --merge, or for the CPU alone (--vram 0)."
        )
    targets = list(_targets(plan, adapter))
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


def _targets(plan: Plan, adapter: Adapter) -> Iterator[_Target]:
    """The program's weights that the adapter changes. Raises HetcompError if one of the adapter's has no place."""
    layout = ProgramLayout.of(plan)
    shapes = adaptable_weights(plan, layout.weights, layout.cuts)
    placed: set[str] = set()
    for index, (value, shape) in enumerate(zip(layout.weights, shapes, strict=True)):
        whole = layout.cuts[value.id][0] if value.id in layout.cuts else value
        adapted = adapter.weights.get(whole.fqn or "")
        if adapted is None or shape.matrices == 0:
            continue
        placed.add(adapted.fqn)
        if packed_rank(adapted.rank) > _LARGEST_RANK:
            raise HetcompError(
                f"Adapter {adapter.name} has rank {adapted.rank} at {adapted.fqn}; at run time at most {_LARGEST_RANK} "
                "is possible."
            )
        yield _Target(index, value, shape, adapted, layout)
    missing = next((fqn for fqn in adapter.weights if fqn not in placed), None)
    if missing is not None:
        raise HetcompError(
            f"Adapter {adapter.name} changes {missing}, which {plan.model.name} uses in a way that adapters cannot "
            "change at run time; compile with --adapter FOLDER --merge."
        )


def _write(out: Path, targets: list[_Target], adapter: Adapter, digest: str) -> PackedAdapter:
    # The header's length does not depend on the data: it is written first with a hash of zeros, and again at the end.
    weights: list[dict[str, object]] = []
    position = 0
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
    header: dict[str, object] = {
        "schema": list(SCHEMA),
        "name": adapter.name,
        "plan": digest,
        "sha256": adapter.sha256,
        "base": adapter.base,
        "bytes": position,
        "xxh3_64": "0" * 16,
        "weights": weights,
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
    return PackedAdapter(out, len(targets), max(_sizes(target)[0] for target in targets), position)


def _sizes(target: _Target) -> tuple[int, int, int]:
    """Rank, and bytes of a and of b as they lie in the file, padding included."""
    rank, shape = packed_rank(target.adapted.rank), target.shape
    each = shape.matrices * rank * shape.number_bytes
    rows = shape.halves * _up(shape.rows // shape.halves, 16)
    return rank, _up(each * _up(shape.columns, 16), _ALIGNMENT), _up(each * rows, _ALIGNMENT)


def _head(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(24 + len(text)) % _ALIGNMENT)
    return _MAGIC + struct.pack("<QQ", len(text), xxhash.xxh3_64(text).intdigest()) + text


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
