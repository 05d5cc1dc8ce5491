"""One LoRA adapter at run time on one GGUF file: tokens a second with it and without, ours beside llama.cpp's.

python -m benchmarks.adapter_beside_llama --peer-python .venv-peers/bin/python [--type Q4_0] [--rank 16] [--rounds 5]

Both sides read the same base and the same random adapter of attention and all experts (ours packed, llama.cpp's as
hetcomp adapter export --to gguf writes it); the logits must agree. llama.cpp runs with repacked weights and with
weights as they lie, and the better of both counts. Turns are those of benchmarks.cpu_e2e.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import hetcomp
from benchmarks import models
from benchmarks.adapter_cost import random_adapter
from benchmarks.cpu_e2e import CONTEXT, show
from benchmarks.gguf_speed import LEAST_COSINE
from benchmarks.record import Record
from benchmarks.worker import Worker
from hetcomp.adapters.export_gguf import export_gguf
from hetcomp.adapters.pack_adapter import artifact_base, pack_bound


def engines(file: Path, artifact: Path, folder: Path, o: argparse.Namespace) -> dict[str, Worker]:
    """Ours and llama.cpp's by name, each without the adapter and with it."""
    base = artifact_base(artifact)
    adapter = random_adapter(base, o.rank, 0)
    packed, lora = folder / "adapter.hetlora", folder / "adapter.gguf"
    for old in (packed, lora):
        old.unlink(missing_ok=True)
    pack_bound(artifact, adapter, packed)
    export_gguf(adapter, base, lora)
    threads = ("--threads", str(o.threads))
    found = {}
    for with_it, ours, theirs in (("", (), ()), (" + adapter", ("--adapter", str(packed)), ("--lora", str(lora)))):
        found[f"hetcomp{with_it}"] = Worker(sys.executable, "hetcomp_worker", artifact, *threads, *ours)
        for name, plain in (("llama.cpp", ()), ("llama.cpp plain", ("--no-repack",))):
            options = (*threads, "--context", str(CONTEXT), *plain, *theirs)
            found[f"{name}{with_it}"] = Worker(o.peer_python, "llama_cpp_worker", file, *options)
    return found


def check_agreement(record: Record, workers: dict[str, Worker], ids: list[int]) -> None:
    """With the adapter and without both sides give the same logits, and the adapter changes them."""
    logits = {name: np.array(worker.call("logits", prompt=ids)) for name, worker in workers.items()}

    def cosine(one: str, other: str) -> float:
        a, b = logits[one], logits[other]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    for name in ("llama.cpp", "llama.cpp + adapter"):
        found = record.derived[f"{name} logits, cosine to ours"] = cosine(name, name.replace("llama.cpp", "hetcomp"))
        if not found > LEAST_COSINE:
            raise SystemExit(f"{name} computes something else: cosine of the logits {found:.4f}")
    changed = record.derived["logits with the adapter, cosine to those without"] = cosine(
        "hetcomp + adapter", "hetcomp"
    )
    if not changed < LEAST_COSINE:
        raise SystemExit(f"The adapter changes nothing: cosine of the logits {changed:.4f}")


def derive(record: Record, prompt: int) -> None:
    """Ratios by phase."""
    for phase in ("decode", f"prefill {prompt}"):
        speed = {
            series.name.removesuffix(f" {phase}"): series.median for series in record.series if phase in series.name
        }
        for side in ("hetcomp", "llama.cpp", "llama.cpp plain"):
            record.derived[f"{side} {phase}: time with the adapter over without"] = (
                speed[side] / speed[f"{side} + adapter"]
            )
        best = max(speed["llama.cpp + adapter"], speed["llama.cpp plain + adapter"])
        record.derived[f"{phase} with the adapter, over llama.cpp's best"] = speed["hetcomp + adapter"] / best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3moe-1b")
    parser.add_argument("--type", default="Q4_0", help="llama.cpp's")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    o = parser.parse_args()
    record = Record("adapter_beside_llama", {k: str(v) for k, v in vars(o).items() if k != "peer_python"})
    file = models.gguf(o.model, o.peer_python, o.type)
    artifact = models.FOLDER / f"{file.stem}-from-gguf.hetc"
    hetcomp.compile(file, context_length=CONTEXT, out=artifact)
    record.plan_sha256 = models.plan_sha256(artifact)
    with ExitStack() as stack:
        workers = engines(file, artifact, models.FOLDER, o)
        for worker in workers.values():
            stack.enter_context(worker)
            record.versions.update(worker.call("version"))
        ids = random.Random(0).choices(range(models.plan(artifact).model.vocab), k=o.prompt)
        check_agreement(record, workers, ids[:16])
        for round_ in range(o.rounds + 1):  # the first one warms up
            for phase, call, given in (
                ("decode", "decode", {"prompt": ids[:16], "tokens": o.tokens}),
                (f"prefill {o.prompt}", "prefill", {"prompt": ids}),
            ):
                for name, worker in workers.items():
                    speed = worker.call(call, **given)
                    if round_:
                        record.add(f"{name} {phase}", "tok/s", speed)
    derive(record, o.prompt)
    show(record)
    print(record.write())


if __name__ == "__main__":
    main()
