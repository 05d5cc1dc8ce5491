"""An adapter merged into the weights as they are read for packing, one matrix at a time."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hetcomp.adapters.base_model import BaseModel
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.low_rank import Adapter, Floats
from hetcomp.backends.packing import to_f32
from hetcomp.backends.quantiser import Numbers
from hetcomp.errors import HetcompError
from hetcomp.frontend import Imported
from hetcomp.frontend.checkpoint import BaseCheckpoint, viewed
from hetcomp.ir.annotations import AdapterTarget, AttachedAdapter
from hetcomp.ir.plan import Value
from hetcomp.quantised_numbers import QuantisedNumbers
from hetcomp.row_pieces import Runs, take_rows

REPORT = "merged_adapter.json"
# Of norms in f32 over matrices of millions of numbers, and of deltas whose terms cancel each other.
_NORM_TOLERANCE, _ROUNDING = 1e-3, 1e-5


def adapter_to_merge(
    folders: Sequence[str | Path], merge: bool, imported: Imported, *, allow_router: bool = False
) -> Adapter | None:
    """The adapter of the only folder, bound to the model; None without a folder. Raises HetcompError if it is not to be
    merged, if there are several, and as bind_adapter.read_adapter."""
    if not folders:
        if merge:
            raise HetcompError("There is no adapter to merge; name its folder (--adapter FOLDER, adapters=[folder]).")
        return None
    if not merge:
        raise HetcompError(
            "An adapter that a model is compiled with is merged into its weights: add --merge (merge=True); or compile "
            "without it, and load it at run time (hetcomp adapter pack)."
        )
    if len(folders) > 1:
        raise HetcompError(f"One adapter can be merged, {len(folders)} were given; compile an artifact for each.")
    file = imported.onnx if imported.gguf is None else imported.gguf.path
    if file is not None:
        raise HetcompError(
            f"Adapters are not merged into GGUF and ONNX files ({file}); give the folder of the checkpoint that it was "
            "made from."
        )
    return read_adapter(folders[0], BaseModel.of(imported), allow_router=allow_router)


def attached(adapter: Adapter) -> AttachedAdapter:
    """What a plan records of an adapter that is merged."""
    targets = tuple(AdapterTarget(w.fqn, w.rank) for w in adapter.weights.values())
    return AttachedAdapter(adapter.name, adapter.sha256, True, targets)


@dataclass(frozen=True)
class MergedWeight:
    """Frobenius norms of a weight before merging and of the delta that was added to it, over all experts."""

    fqn: str
    rank: int
    weight_norm: float
    delta_norm: float


class MergedReader:
    """A WeightReader of a checkpoint's weights with an adapter's deltas added, in f32. Weights that the adapter leaves
    alone come as they are stored. At most one matrix and its delta are held."""

    def __init__(self, checkpoint: BaseCheckpoint, adapter: Adapter) -> None:
        self._checkpoint = checkpoint
        self._adapter = adapter
        # By fqn, value and expert: the squared norms of the weight and the delta. A matrix may be read more than once.
        self._squares: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}

    def read(self, value: Value) -> Numbers | QuantisedNumbers:
        """The whole weight in the value's shape."""
        weight = self._adapter.weights.get(value.fqn or "")
        if weight is None:
            return self._checkpoint.read(value)
        if weight.experts is None:
            return self._added(value, 0, self._checkpoint.read(value))
        merged = np.empty([int(d) for d in value.type.shape], np.float32)
        for expert in range(weight.experts):
            merged[expert] = self._added(value, expert, self._checkpoint.read_expert(value, expert))
        return merged

    def read_expert(self, value: Value, expert: int) -> Numbers | QuantisedNumbers:
        """Matrix ``expert`` of a weight whose first axis counts experts."""
        numbers = self._checkpoint.read_expert(value, expert)
        return self._added(value, expert, numbers) if value.fqn in self._adapter.weights else numbers

    def read_pieces(
        self, value: Value, pieces: Sequence[Runs], expert: int | None = None
    ) -> Generator[Numbers | QuantisedNumbers]:
        """See WeightReader: a delta is made for a matrix as a whole."""
        if value.fqn not in self._adapter.weights:
            yield from self._checkpoint.read_pieces(value, pieces, expert)
            return
        numbers = self.read(value) if expert is None else self.read_expert(value, expert)
        yield from (take_rows(numbers, runs) for runs in pieces)

    def _added(self, value: Value, expert: int, numbers: Numbers | QuantisedNumbers) -> Floats:
        weight = self._adapter.weights[value.fqn or ""]
        assert not isinstance(numbers, QuantisedNumbers)  # attach_lora refuses them
        delta = viewed(weight.delta(expert), self._checkpoint.source(value))
        # A copy in each case: the checkpoint may be a module in memory.
        merged = to_f32(numbers) if numbers.dtype == np.uint16 else numbers.astype(np.float32)
        squares = self._squares.setdefault(weight.fqn, {})
        squares[value.id, expert] = _square(merged), _square(delta)
        merged += delta
        return merged

    def report(self) -> list[MergedWeight]:
        """The norms of all that was merged. Raises HetcompError if a delta was not added in whole: packing has left out
        a part of a weight."""
        found = []
        for weight in self._adapter.weights.values():
            squares = self._squares.get(weight.fqn, {}).values()
            before, added = (float(np.sqrt(sum(s[i] for s in squares))) for i in (0, 1))
            expected = weight.norm()
            if abs(added - expected) > _NORM_TOLERANCE * expected + _ROUNDING * weight.norm_of_terms():
                raise HetcompError(
                    f"Adapter {self._adapter.name} was not merged into all of {weight.fqn}: a delta of norm {added:g} "
                    f"was added instead of {expected:g}; report this bug."
                )
            found.append(MergedWeight(weight.fqn, weight.rank, before, added))
        return found

    def write_report(self, folder: Path) -> list[MergedWeight]:
        """Writes the report into an artifact's folder and returns it."""
        merged = self.report()
        document = {
            "name": self._adapter.name,
            "sha256": self._adapter.sha256,
            "base": self._adapter.base,
            "weights": [asdict(weight) for weight in merged],
        }
        (folder / REPORT).write_text(json.dumps(document, indent=1), encoding="utf-8")
        return merged


def report_line(artifact: Path) -> str:
    """How much the adapter of an artifact changes its weights, in one line."""
    document = json.loads((artifact / REPORT).read_text(encoding="utf-8"))
    weights = [MergedWeight(**weight) for weight in document["weights"]]
    shares = sorted(w.delta_norm / w.weight_norm for w in weights if w.weight_norm > 0) or [0.0]
    return (
        f"adapter {document['name']} merged into {len(weights)} weights; norm of the delta by that of the weight: "
        f"{shares[0]:.3g} to {shares[-1]:.3g}, median {shares[len(shares) // 2]:.3g}"
    )


def _square(numbers: Floats) -> float:
    return float(np.linalg.norm(numbers)) ** 2
