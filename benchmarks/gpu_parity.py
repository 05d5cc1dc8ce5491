"""Whether artifacts with GPU code compute what the CPU's artifact of the same model does.

python -m benchmarks.gpu_parity CPU.hetc GPU.hetc [MORE.hetc ..] [--positions 2000]

On evaluation text, for every artifact beside the first: KL divergence and agreement of the most likely token over
positions computed in one go, the same over positions decoded one by one, several sequences of different lengths decoded
together, and greedy continuations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hetcomp
from benchmarks.cpu_e2e import show
from benchmarks.record import Record
from hetcomp.executable import Executable
from hetcomp.models_zoo import find

_CHUNK = 500  # positions of a sequence
_DECODED = 100
_GREEDY = 64
_LENGTHS = (5, 40, 130)  # of sequences that are decoded together


def texts() -> str:
    """The evaluation text of all domains."""
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((find("demo-moe").parent / "eval").glob("*.txt"))
    )


def chunks(exe: Executable, positions: int) -> list[list[int]]:
    """Token ids of the text, in sequences."""
    ids = exe.runtime.tokenize(texts())
    step = max(1, len(ids) // -(-positions // _CHUNK))
    return [ids[at : at + _CHUNK] for at in range(0, len(ids) - _CHUNK, step)][: -(-positions // _CHUNK)]


def compare(record: Record, name: str, mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Adds KL(theirs || mine) and the share of rows with the same most likely token."""
    p, q = log_softmax(theirs), log_softmax(mine)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    same = mine.argmax(axis=-1) == theirs.argmax(axis=-1)
    scale = np.abs(theirs - theirs.mean(axis=-1, keepdims=True)).max()
    record.derived[f"{name}, positions"] = float(len(same))
    record.derived[f"{name}, KL"] = float(kl.mean())
    record.derived[f"{name}, same most likely token"] = float(same.mean())
    record.derived[f"{name}, largest difference / largest logit"] = float(np.abs(mine - theirs).max() / scale)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """In float64, over the last axis."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def decoded(exe: Executable, ids: list[int], tokens: int) -> NDArray[np.float32]:
    """Logits of the last ``tokens`` of the ids, fed one by one."""
    with exe.runtime.session() as session:
        session.prefill(ids[:-tokens])
        return np.stack([exe.runtime.decode([session], [token])[0] for token in ids[-tokens:]])


def together(exe: Executable, ids: list[int], tokens: int) -> NDArray[np.float32]:
    """Logits of sequences of different lengths that are decoded together."""
    sessions = [exe.runtime.session() for _ in _LENGTHS]
    for session, length in zip(sessions, _LENGTHS, strict=True):
        session.prefill(ids[:length])
    rows = [exe.runtime.decode(sessions, [ids[n + i] for n in _LENGTHS]) for i in range(tokens)]
    for session in sessions:
        session.close()
    return np.concatenate(rows)


def greedy(exe: Executable, ids: list[int]) -> list[int]:
    """Tokens that follow the ids."""
    return [token.id for token in exe.generate(ids, max_new_tokens=_GREEDY, ignore_eos=True)]


def measured(exe: Executable, sequences: list[list[int]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What is compared."""
    yield "at once", np.concatenate([exe(ids) for ids in sequences])
    yield "one by one", decoded(exe, sequences[0], _DECODED)
    yield "together", together(exe, sequences[0], _DECODED)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    record = Record("gpu_parity", {"artifacts": [path.stem for path in o.artifacts]})
    first = hetcomp.load(o.artifacts[0], threads=o.threads)
    sequences = chunks(first, o.positions)
    wanted = dict(measured(first, sequences))
    texts_of = [greedy(first, ids[:50]) for ids in sequences]
    first.runtime.close()
    stats = {}
    for path in o.artifacts[1:]:
        exe = hetcomp.load(path, threads=o.threads)
        for what, logits in measured(exe, sequences):
            compare(record, f"{path.stem} {what}", logits, wanted[what])
        mine = [token for ids in sequences for token in greedy(exe, ids[:50])]
        record.derived[f"{path.stem} greedy tokens, same"] = float(np.mean(np.array(mine) == np.concatenate(texts_of)))
        stats[f"{path.stem} stats"] = exe.stats
        exe.runtime.close()
    show(record)
    record.conditions |= stats
    print(record.write(o.out) if o.out else record.write())


if __name__ == "__main__":
    main()
