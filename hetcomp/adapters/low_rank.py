"""Low-rank deltas of weights: what an adapter is once its names are understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# Numbers as the file has them, bf16 as bits in uint16; views of the mapped file, in any strides.
Stored = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta ``scale * b @ a`` of a matrix w[out, in]. a: f32 [r, in]; b: f32 [out, r], its rows in the order of the
    parameter's own (GPT-OSS's gate and up rows in turn), whichever way the parameter itself lies."""

    a: Floats
    b: Floats
    scale: float

    @property
    def rank(self) -> int:
        """Columns of b."""
        return len(self.a)

    def delta(self) -> Floats:
        """f32 [out, in]."""
        return np.asarray(self.scale * self.b @ self.a, np.float32)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the delta, from the r x r matrices of inner products."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return max(0.0, float(self.scale**2 * np.sum((b.T @ b) * (a @ a.T))))

    def squared_terms(self) -> float:
        """The sum of the squared norms of the r terms of the delta, which may cancel each other in it."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return float(self.scale**2 * np.sum(np.square(b).sum(0) * np.square(a).sum(1)))


@dataclass(frozen=True, eq=False)
class Factor:
    """A stored pair, a [r, in] and b [rows, r], for ``rows`` (start, stop) of the matrix, None: for all."""

    a: Stored
    b: Stored
    scale: float
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        """Rows of a."""
        return int(self.a.shape[0])

    @property
    def bytes(self) -> int:
        """Stored bytes of both."""
        return self.a.size * self.a.itemsize + self.b.size * self.b.itemsize


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """The deltas of one parameter of the traced model, ``fqn`` as plan values carry it, of shape ``shape``: [out, in],
    or [E, out, in] with a delta for every expert; ``transposed``: [in, out] and [E, in, out] instead;
    ``interleaved``: gate and up rows in turn. ``factors`` has
    one entry for a matrix and one for every expert, of one pair, or of several for different rows (gate and up)."""

    fqn: str
    shape: tuple[int, ...]
    transposed: bool
    interleaved: bool
    role: str
    factors: tuple[tuple[Factor, ...], ...]

    @property
    def experts(self) -> int | None:
        """Number of experts; None for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def out_features(self) -> int:
        """Rows of the matrix as it is multiplied with."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def in_features(self) -> int:
        """Columns of the matrix as it is multiplied with."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(sum(f.rank for f in factors) for factors in self.factors)

    @property
    def bytes(self) -> int:
        """Stored bytes of all pairs."""
        return sum(f.bytes for factors in self.factors for f in factors)

    def pair(self, expert: int | None = None) -> LowRank:
        """The delta of the matrix, or of one expert, in f32. Pairs for different rows become one: their a stacked,
        their b block-diagonal; where their scales differ, these are in b."""
        parts = self.factors[expert or 0]
        if len(parts) == 1 and parts[0].rows is None:
            return LowRank(to_f32(parts[0].a), to_f32(parts[0].b), parts[0].scale)
        equal = len({part.scale for part in parts}) == 1
        b = np.zeros((self.out_features, sum(part.rank for part in parts)), np.float32)
        column = 0
        for part in parts:
            start, stop = part.rows or (0, self.out_features)
            scale = np.float32(1.0 if equal else part.scale)
            b[start:stop, column : column + part.rank] = scale * to_f32(part.b)
            column += part.rank
        return LowRank(np.concatenate([to_f32(p.a) for p in parts]), b, parts[0].scale if equal else 1.0)

    def delta(self, expert: int | None = None) -> Floats:
        """f32, as the parameter lies: [out, in] or, transposed, [in, out]; of one expert, if one is named."""
        made = self.pair(expert).delta()
        return made.T if self.transposed else made

    def norm(self) -> float:
        """Frobenius norm of the delta, over all experts."""
        return float(np.sqrt(sum(self.pair(e).squared_norm() for e in range(len(self.factors)))))

    def norm_of_terms(self) -> float:
        """Frobenius norm of all terms of the delta taken by themselves: what its rounding errors are relative to."""
        return float(np.sqrt(sum(self.pair(e).squared_terms() for e in range(len(self.factors)))))


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter bound to a model. ``sha256``: of its config and its tensors. ``base``: the model that it says it
    was made for. ``dtypes``: of its tensors. ``weights``: by fqn, in the model's order."""

    name: str
    sha256: str
    base: str
    rank: int
    alpha: float
    dtypes: tuple[str, ...]
    weights: Mapping[str, AdaptedWeight]

    @property
    def bytes(self) -> int:
        """Stored bytes of all pairs."""
        return sum(w.bytes for w in self.weights.values())

    @property
    def parameters(self) -> int:
        """Numbers in all pairs."""
        return sum(f.a.size + f.b.size for w in self.weights.values() for factors in w.factors for f in factors)


def to_f32(stored: Stored) -> Floats:
    """The numbers in f32, contiguous."""
    if stored.dtype == np.uint16:
        return (np.ascontiguousarray(stored).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(stored, np.float32)
