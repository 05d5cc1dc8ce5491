"""Writes an artifact: weights, programs, plan, tokenizer, the runtime's own files, and last the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetcomp import installed_runtime
from hetcomp.artifact.external_weights import ExternalRecord, ExternalWeights
from hetcomp.artifact.weight_files import WeightRecord
from hetcomp.backends.program import ProgramLayout
from hetcomp.backends.protocol import Isa
from hetcomp.ir.expert_matrices import expert_matrices
from hetcomp.ir.kv_pool import KvPool, row_runs
from hetcomp.ir.plan import Plan, Value, ValueKind

MANIFEST_SCHEMA = (1, 4)


@dataclass(frozen=True)
class Documents:
    """The small texts of an artifact besides its code: None where the model has none."""

    plan_json: str
    plan_text: str
    tokenizer: bytes | None
    chat_template: bytes | None


def write_documents(documents: Documents, folder: Path) -> None:
    """Writes plan.json, plan.txt and, if given, the tokenizer and chat template files."""
    (folder / "plan.json").write_text(documents.plan_json, encoding="utf-8")
    (folder / "plan.txt").write_text(documents.plan_text, encoding="utf-8")
    if documents.tokenizer is not None:
        (folder / "tokenizer.hetc.json").write_bytes(documents.tokenizer)
    if documents.chat_template is not None:
        (folder / "chat_template.hetc.json").write_bytes(documents.chat_template)


def copy_runtime(folder: Path) -> None:
    """Copies the executable, the shared library and the C header that make the artifact run without Python."""
    for source, target in (
        (installed_runtime.executable(), folder / "bin" / "hetcomp-run"),
        (installed_runtime.library(), folder / "lib" / "libhetcomp_runtime.so"),
        (installed_runtime.include() / "hetcomp" / "hetcomp.h", folder / "include" / "hetcomp" / "hetcomp.h"),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / "bin" / "hetcomp-run").chmod(0o755)


def write_manifest(
    plan: Plan,
    layout: ProgramLayout,
    weights: Sequence[WeightRecord | ExternalRecord],
    isas: Sequence[Isa],
    version: str,
    profile: Mapping[str, str],
    folder: Path,
    gpus: Sequence[Mapping[str, Any]] = (),
    pinned: Sequence[str] = (),
    external: ExternalWeights | None = None,
) -> None:
    """Writes manifest.json over everything that is already in ``folder``. ``isas``: best first. ``gpus``: an entry for
    each GPU's program. ``pinned``: names of the buffers that CPU and GPUs share, in the order of the CPU's program.
    ``external``: what knows of weights in other files."""
    dims, on_demand = plan.max_dims(), expert_matrices(plan) if plan.disk is not None else set()
    manifest: dict[str, Any] = {
        "schema": list(MANIFEST_SCHEMA),
        "hetcomp": version,
        "model": {
            "name": plan.model.name,
            "architecture": plan.model.architecture,
            "vocab": plan.model.vocab,
            "context": dims["context"],
            "max_batch": dims["slots"],
            "kv_tokens": KvPool.of(dims).tokens,
            "max_tokens": dims["T"],
            "max_logit_rows": dims["R"],
            "eos_token_ids": list(plan.model.eos_token_ids),
            "bos_token_id": plan.model.bos_token_id,
            "recurrent": any(v.kind is ValueKind.STATE and not v.type.is_cache for v in plan.values),
            "config_sha256": plan.model.config_sha256,
        },
        "hw_profile": dict(profile),
        "files": _files(folder),
        "programs": [{"isa": isa.value, "file": f"kernels/lib_{isa.value}.so"} for isa in isas],
        "nodes": list(layout.nodes),
        "main_node": layout.main,
        "weights": [_weight(r, v, layout, on_demand) for r, v in zip(weights, layout.weights, strict=True)],
        "states": [_state(v, dims) for v in layout.states],
        "timers": list(layout.timers),
        "tokenizer": _present(folder, "tokenizer.hetc.json"),
        "chat_template": _present(folder, "chat_template.hetc.json"),
    }
    if external is not None:
        manifest |= {"sources": external.sources(), "packed_because": dict(external.packed)}
    if gpus:
        manifest |= {"gpus": list(gpus), "pinned": list(pinned)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _weight(
    record: WeightRecord | ExternalRecord, value: Value, layout: ProgramLayout, on_demand: set[str]
) -> dict[str, Any]:
    whole = layout.cuts[value.id][0] if value.id in layout.cuts else value
    entry = {"name": record.name, "bytes": record.bytes, "xxh3_64": record.xxh3_64, "node": record.node}
    return entry | record.place() | ({"on_demand": True} if whole.id in on_demand else {})


def _state(value: Value, dims: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": value.fqn or value.id,
        "bytes_per_slot": value.type.bytes({**dims, "slots": 1}),
        "bytes": KvPool.of(dims).cpu_bytes(value.type),
        "rows": row_runs(value.type),
    }


def _present(folder: Path, name: str) -> str | None:
    return name if (folder / name).is_file() else None


def _files(folder: Path) -> dict[str, dict[str, object]]:
    """Size of every file; SHA-256 of all but the weights, whose tensors carry an XXH3 each."""
    files: dict[str, dict[str, object]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entry: dict[str, object] = {"bytes": path.stat().st_size}
        if path.suffix != ".safetensors":
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.relative_to(folder).as_posix()] = entry
    return files
