"""What an adapter is, in figures: for ``hetcomp adapter inspect``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hetcomp.adapters.low_rank import Adapter, LowRank, to_f32
from hetcomp.adapters.peft_folder import PeftFolder

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Ranks in common use.
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class TargetNorm:
    """Frobenius norm of the delta of one target in one layer (None: outside of layers); None where only the model says
    how many experts share the tensors."""

    layer: int | None
    target: str
    rank: int
    norm: float | None


@dataclass(frozen=True)
class Inspection:
    """``memory``: by rank the bytes of the same targets as stored and in f32, where all ranks grow alike."""

    name: str
    sha256: str
    base: str
    rank: int
    alpha: float
    rslora: bool
    dtypes: tuple[str, ...]
    parameters: int
    targets: tuple[TargetNorm, ...]
    memory: tuple[tuple[int, int, int], ...]


def inspect_adapter(folder: PeftFolder, adapter: Adapter | None) -> Inspection:
    """Figures of a folder; ``adapter``: the same bound to its base, which tells experts and parameters apart."""
    modules = folder.modules.values()
    numbers = sum(m.a.size + m.b.size for m in modules)
    stored = sum(m.a.nbytes + m.b.nbytes for m in modules)
    config = folder.config
    return Inspection(
        folder.name,
        folder.sha256,
        config.base_model_name_or_path or "",
        config.r,
        config.lora_alpha,
        config.use_rslora,
        tuple(sorted({m.dtype for m in modules})),
        numbers,
        tuple(_bound(adapter) if adapter is not None else _unbound(folder)),
        tuple((r, stored * r // config.r, 4 * numbers * r // config.r) for r in sorted({*RANKS, config.r})),
    )


def _bound(adapter: Adapter) -> Iterable[TargetNorm]:
    for fqn, weight in adapter.weights.items():
        yield TargetNorm(*_layer_and_rest(fqn.removesuffix(".weight")), weight.rank, weight.norm())


def _unbound(folder: PeftFolder) -> Iterable[TargetNorm]:
    for path, module in folder.modules.items():
        rank = folder.config.rank(path)
        norm = None
        if module.a.shape[0] == rank:
            scale = folder.config.scale(folder.config.alpha(path), rank)
            norm = float(np.sqrt(LowRank(to_f32(module.a), to_f32(module.b), scale).squared_norm()))
        yield TargetNorm(*_layer_and_rest(path), rank, norm)


def _layer_and_rest(name: str) -> tuple[int | None, str]:
    found = _LAYER.search(name)
    return (int(found.group(1)), name[found.end() :]) if found else (None, name)


def norms_by_layer(targets: Iterable[TargetNorm]) -> Mapping[int | None, tuple[int, float | None]]:
    """By layer: the number of targets, and the Frobenius norm of all their deltas; None if one's is not known."""
    out: dict[int | None, tuple[int, float | None]] = {}
    for target in targets:
        count, norm = out.get(target.layer, (0, 0.0))
        both = None if norm is None or target.norm is None else float(np.hypot(norm, target.norm))
        out[target.layer] = (count + 1, both)
    return dict(sorted(out.items(), key=lambda item: (item[0] is None, item[0] or 0)))
