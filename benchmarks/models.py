"""Models that the benchmarks run on, made on the spot under out/bench: checkpoints, GGUF files, artifacts."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import hetcomp
from hetcomp.frontend.folder_tensors import has_weights
from hetcomp.ir.plan import Plan
from hetcomp.ir.serialise import from_json
from hetcomp.models_zoo import find
from hetcomp.models_zoo.synthesise import synthesise

FOLDER = Path(__file__).resolve().parent.parent / "out" / "bench"


def checkpoint(name: str) -> Path:
    """The zoo's bf16 checkpoint ``name`` or, of a config, a synthetic one, made at first use."""
    if has_weights(find(name)):
        return find(name)
    folder = FOLDER / name
    return folder if folder.exists() else synthesise(name, folder)


def gguf(name: str, peer_python: Path, kind: str = "BF16") -> Path:
    """The checkpoint as a GGUF file: in bf16 the same numbers, in another type (``Q4_0``) as llama.cpp quantises them;
    made at first use."""
    repository = FOLDER.parent.parent
    plain = FOLDER / f"{name}.gguf"
    if not plain.exists():
        command = [str(peer_python), "-m", "benchmarks.write_gguf", str(checkpoint(name)), str(plain)]
        subprocess.run(command, check=True, cwd=repository)
    if kind == "BF16":
        return plain
    target = FOLDER / f"{name}-{kind}.gguf"
    if not target.exists():
        command = [str(peer_python), "-m", "benchmarks.quantise_gguf", str(plain), str(target), kind]
        subprocess.run(command, check=True, cwd=repository)
    return target


def artifact(name: str, formats: str, context: int) -> Path:
    """The checkpoint compiled by the working tree's hetcomp for this machine; compiled anew at every call."""
    target = FOLDER / f"{name}-{formats}.hetc"
    hetcomp.compile(checkpoint(name), context_length=context, formats=formats, out=target)
    return target


def plan(artifact_folder: Path) -> Plan:
    """The plan that the artifact was generated from."""
    return from_json((artifact_folder / "plan.json").read_text(encoding="utf-8"))


def plan_sha256(artifact_folder: Path) -> str:
    """Hash of the plan that the artifact was generated from."""
    return hashlib.sha256((artifact_folder / "plan.json").read_bytes()).hexdigest()


def decode_bytes(of: Plan) -> float:
    """Bytes of weights that one decode step of one sequence reads, as the plan's cost annotations have it.

    Activations and the KV cache of a short context stay in the CPU's caches and are not counted.
    """
    total = 0.0
    for call in of.calls:
        for op in of.template(call.template).ops:
            if op.cost is not None:
                total += op.cost.phase("decode").weight_bytes
    return total
