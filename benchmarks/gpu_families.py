"""Tiny models of every family, everything on the GPU (or their layers on two) in f32, against transformers.

python -m benchmarks.gpu_families make FOLDER --hw PROFILE [--two]    # needs transformers and Triton, no GPU
python -m benchmarks.gpu_families run FOLDER [--gpus 0,1]             # needs a GPU or two, numpy and the artifacts

A family's figure is the largest difference of logits relative to the largest logit: of a prompt of 40 tokens at once,
of its last 20 decoded one by one, and of three sequences of different lengths decoded together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.record import Record

_TOKENS = 40
_PROMPT = 20
_STARTS = (5, 12, 19)  # of sequences that are decoded together
_STEPS = 8
_VRAM = 8 << 30
_ON_ONE = ("*=gpu:0",)
_ON_TWO = ("embed=gpu:0", "*@0=gpu:0", "*@1-99=gpu:1", "final_norm=gpu:1", "lm_head=gpu:1")


def make(folder: Path, hw: str, two: bool) -> None:
    """Writes an artifact of each family and what transformers computes."""
    from hetcomp.plan_wishes import PlanWishes
    from tests.parity.test_families import reference_logits
    from tests.reference.tiny_models import FAMILIES, save_tiny, token_ids

    wishes = PlanWishes(pins=_ON_TWO if two else _ON_ONE, vram=_VRAM)
    for family in FAMILIES:
        checkpoint = folder / "checkpoints" / family
        model = save_tiny(family, checkpoint, odd=True)
        ids = token_ids(model, _TOKENS)
        np.savez(folder / f"{family}.npz", ids=np.asarray(ids[0]), logits=reference_logits(model, ids))
        hetcomp.compile(
            checkpoint,
            hw,
            formats="f32",
            context_length=64,
            max_batch=len(_STARTS),
            out=folder / f"{family}.hetc",
            isa=("avx2",),
            wishes=wishes,
        )


def off(rows: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Largest difference relative to the largest logit."""
    return float(np.abs(rows.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def run(folder: Path, out: Path | None, gpus: list[int]) -> None:
    """Compares every artifact and writes the record."""
    record = Record("gpu_families", {"formats": "f32"})
    for stored in sorted(folder.glob("*.npz")):
        with np.load(stored) as arrays:
            ids, wanted = [int(i) for i in arrays["ids"]], arrays["logits"]
        exe = hetcomp.load(folder / f"{stored.stem}.hetc", gpus=gpus)
        record.conditions["gpus"] = [f"{gpu.number}: {gpu.name}" for gpu in exe.runtime.info.gpus]
        record.derived[f"{stored.stem} prompt"] = off(exe(ids), wanted)
        with exe.runtime.session() as session:
            rows = [session.prefill(ids[:_PROMPT])]
            rows += [exe.runtime.decode([session], [token])[0] for token in ids[_PROMPT:]]
        record.derived[f"{stored.stem} decode"] = off(np.stack(rows), wanted[_PROMPT - 1 :])
        sessions = [exe.runtime.session() for _ in _STARTS]
        for session, start in zip(sessions, _STARTS, strict=True):
            session.prefill(ids[:start])
        steps = [exe.runtime.decode(sessions, [ids[s + i] for s in _STARTS]) for i in range(_STEPS)]
        for session in sessions:
            session.close()
        beside = [wanted[[s + i for s in _STARTS]] for i in range(_STEPS)]
        record.derived[f"{stored.stem} together"] = off(np.concatenate(steps), np.concatenate(beside))
        exe.runtime.close()
    show(record)
    print(record.write(out) if out else record.write())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hw", default="auto")
    parser.add_argument("--two", action="store_true", help="the first layer on gpu:0, the others on gpu:1")
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    if o.what == "make":
        make(o.folder, o.hw, o.two)
    else:
        run(o.folder, o.out, o.gpus)


if __name__ == "__main__":
    main()
