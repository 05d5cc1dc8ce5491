"""What adapters cost that are loaded at run time: decode and prompt with and without, batches of several, loading.

python -m benchmarks.adapter_cost [--model qwen3moe-1b] [--formats q4] [--rank 16] [--tokens 64] [--prompt 256]
       [--rounds 5] [--threads 0] [--load-mb 100] [--artifact OUT.hetc] [--targets attention] [--distinct 4]

Random weights, and random adapters of one rank on attention and all experts, or on attention alone. What is compared is
measured in turns, in one process: a token of one session, a step of 8 sessions on 4 adapters and on the base, a prompt.
An artifact with a GPU must have room for them: benchmarks.random_artifact .. --batch 8 --adapters 4 --adapter-rank 16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import hetcomp
from benchmarks import models
from benchmarks.cpu_e2e import show
from benchmarks.random_artifact import build
from benchmarks.record import Record
from hetcomp.adapters.base_model import BaseModel, BaseWeight
from hetcomp.adapters.low_rank import AdaptedWeight, Adapter, Factor
from hetcomp.adapters.pack_adapter import artifact_base, pack_bound
from hetcomp.plan_wishes import PlanWishes
from hetcomp.runtime import Runtime, Session

BATCH, ADAPTERS = 8, 4
_VOCABULARY = 1000  # ids of the prompts lie below


def random_adapter(base: BaseModel, rank: int, seed: int, share: float = 1.0, experts: bool = True) -> Adapter:
    """An adapter of all attention and, with ``experts``, expert matrices, or of the first ``share`` of them."""
    rng = np.random.default_rng(seed)
    distinct = {weight.fqn: weight for weight in base.weights.values()}.values()
    targets = [
        w for w in distinct if (experts and len(w.shape) == 3) or any(role.startswith("attn.") for role in w.roles)
    ]
    weights = {w.fqn: _random_pairs(rng, w, rank) for w in targets[: max(1, round(share * len(targets)))]}
    return Adapter(f"random{seed}", f"{seed:064x}", base.name, rank, rank, ("f32",), weights)


def _random_pairs(rng: np.random.Generator, weight: BaseWeight, rank: int) -> AdaptedWeight:
    rows, columns = weight.shape[-2:][:: -1 if weight.transposed else 1]

    def pair() -> Factor:
        a = rng.standard_normal((rank, columns), np.float32) / np.sqrt(columns, dtype=np.float32)
        return Factor(a, rng.standard_normal((rows, rank), np.float32) * np.float32(0.05), 1.0)

    count = weight.shape[0] if len(weight.shape) == 3 else 1
    factors = tuple((pair(),) for _ in range(count))
    return AdaptedWeight(weight.fqn, weight.shape, weight.transposed, weight.interleaved, "", factors)


def decode_seconds(runtime: Runtime, sessions: Sequence[Session], tokens: int) -> float:
    """Seconds of a step, over ``tokens`` steps behind a short prompt."""
    for session in sessions:
        session.reset()
        session.prefill(list(range(3, 19)))
    ids = [20 + i for i in range(len(sessions))]
    begin = time.perf_counter()
    for _ in range(tokens):
        runtime.decode(sessions, ids)
    return (time.perf_counter() - begin) / tokens


def prompt_seconds(session: Session, tokens: int) -> float:
    """Seconds of a prompt."""
    session.reset()
    begin = time.perf_counter()
    session.prefill([3 + i % _VOCABULARY for i in range(tokens)])
    return time.perf_counter() - begin


def with_names(runtime: Runtime, names: Sequence[str | None], run: Callable[[list[Session]], float]) -> float:
    """What ``run`` gives with sessions that have these adapters."""
    sessions = [runtime.session(name) for name in names]
    try:
        return run(sessions)
    finally:
        for session in sessions:
            session.close()


def measure(runtime: Runtime, record: Record, o: argparse.Namespace) -> None:
    """The cases in turns."""
    names = [f"random{i}" for i in range(ADAPTERS)]
    cases: dict[str, tuple[Sequence[str | None], Callable[[list[Session]], float]]] = {}
    for which, chosen in (("base", [None]), ("adapter", names[:1])):
        cases[f"decode, {which}"] = (chosen, lambda s: decode_seconds(runtime, s, o.tokens))
        cases[f"prompt, {which}"] = (chosen, lambda s: prompt_seconds(s[0], o.prompt))
    for which, of_batch in (("base", [None] * BATCH), ("4 adapters", [*names, *names][:BATCH])):
        cases[f"decode of 8, {which}"] = (of_batch, lambda s: decode_seconds(runtime, s, o.tokens))
    for warm in (True, *[False] * o.rounds):
        for name, (chosen, run) in cases.items():
            seconds = with_names(runtime, chosen, run)
            if not warm:
                record.add(name, "ms", 1e3 * seconds, higher_is_better=False)
    for kind, changed in (("decode", "adapter"), ("prompt", "adapter"), ("decode of 8", "4 adapters")):
        base, with_it = record[f"{kind}, base"].median, record[f"{kind}, {changed}"].median
        record.derived[f"{kind}, {changed}: time over base"] = with_it / base
    with runtime.session() as session:
        for i in range(20):
            begin = time.perf_counter()
            session.set_adapter(names[i % ADAPTERS])
            record.add("switch", "us", 1e6 * (time.perf_counter() - begin), higher_is_better=False)


def measure_load(runtime: Runtime, artifact: Path, record: Record, o: argparse.Namespace, folder: Path) -> None:
    """Loads an adapter of about the wanted size, which was just written, several times."""
    base = artifact_base(artifact)
    whole = runtime.adapters()[0]["bytes"]
    adapter = random_adapter(base, o.rank, 99, min(1.0, o.load_mb * 1e6 / whole), o.targets == "all")
    packed = pack_bound(artifact, adapter, folder / "load.hetlora")
    record.conditions["loaded adapter, bytes"] = packed.bytes
    for _ in range(o.rounds):
        begin = time.perf_counter()
        runtime.load_adapter(packed.path, "load")
        record.add("load", "ms", 1e3 * (time.perf_counter() - begin), higher_is_better=False)
        runtime.unload_adapter("load")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--formats", default="q4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--load-mb", type=float, default=100)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--distinct", type=int, default=ADAPTERS, help="adapters that are made; others are these again")
    parser.add_argument("--targets", choices=("all", "attention"), default="all")
    parser.add_argument("--artifact", type=Path, default=None, help="an artifact of this benchmark; else one is made")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hetcomp-") as temporary:
        folder = Path(temporary)
        artifact = o.artifact or folder / "model.hetc"
        if not artifact.exists():
            isa = [o.isa] if o.isa else None
            options = {"formats": o.formats, "isa": isa, "context": 512, "batch": BATCH}
            build(o.model, artifact, hw_profile="auto", wishes=PlanWishes(vram=0), **options)  # type: ignore[arg-type]
        record = Record("adapter_cost", {name: str(value) for name, value in vars(o).items()})
        record.plan_sha256 = models.plan_sha256(artifact)
        exe = hetcomp.load(artifact, threads=o.threads)
        base = artifact_base(artifact)
        for i in range(ADAPTERS):
            path = folder / f"random{i % o.distinct}.hetlora"
            if i < o.distinct:
                packed = pack_bound(artifact, random_adapter(base, o.rank, i, experts=o.targets == "all"), path)
            exe.load_adapter(path, f"random{i}")
        record.conditions["adapter, bytes"] = packed.bytes
        plan = models.plan(artifact)
        if plan.adapter_room is not None:
            decode = next(t.total_us for t in plan.timelines if t.phase == "decode")
            record.derived["decode, adapter: time over base, predicted"] = plan.adapter_room.decode_us / decode
        record.versions["hetcomp"] = hetcomp.__version__
        measure(exe.runtime, record, o)
        measure_load(exe.runtime, artifact, record, o, folder)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
