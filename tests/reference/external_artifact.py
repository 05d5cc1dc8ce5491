"""A model's weights as an artifact that refers to its files has them, around a program that computes nothing with them:
all of the way of ``--weights external`` without the compile of kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hetcomp.artifact.external_weights import ExternalWeights, record_external
from hetcomp.backends.cut_weights import CutReader
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.backends.program import ProgramLayout
from hetcomp.build_artifact import all_cuts
from hetcomp.compiler import plan_model
from hetcomp.external import external_weights
from hetcomp.ir.plan import Plan
from hetcomp.runtime import Runtime
from tests.reference import fake_artifact
from tests.reference.plan_builder import avx2_machine

CONTEXT = 64


def write(folder: Path, model: Path, nodes: int = 1, **options: Any) -> tuple[Plan, ExternalWeights]:
    """Writes an artifact of those weights of ``model`` that stay in its files; the plan, and what stays. nodes: of the
    machine; options: of plan_model."""
    machine = avx2_machine(nodes)
    planned = plan_model(model, hw_profile=machine, context_length=CONTEXT, isa=("avx2",), **options)
    checkpoint, plan = planned.imported.checkpoint, planned.plan
    assert checkpoint is not None
    layout, cuts = ProgramLayout.of(plan), all_cuts(plan)
    planned, external = external_weights(planned, checkpoint, cuts)
    packer = WeightPacker(CutReader(checkpoint, cuts))
    values = [v for v in layout.weights if external.stored(v) is not None]
    records = record_external(values, external, packer.chunks(values), lambda size, name: None)
    nodes = [n for v, n in zip(layout.weights, layout.weight_nodes, strict=True) if v in values]
    folder.mkdir()
    program = fake_artifact.build_program(folder, f"FAKE_WEIGHTS={len(values)}", f"FAKE_NODES={len(layout.nodes)}")
    fake_artifact.write_artifact(folder / "fake.hetc", program, text=False)
    file = folder / "fake.hetc" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest |= {"nodes": list(layout.nodes), "main_node": layout.main, "sources": external.sources()}
    manifest["weights"] = [
        {"name": r.name, "bytes": r.bytes, "xxh3_64": r.xxh3_64, "node": node} | r.place()
        for r, node in zip(records, nodes, strict=True)
    ]
    del manifest["files"]["weights.safetensors"]
    file.write_text(json.dumps(manifest))
    return planned.plan, external


def load(folder: Path, weights: str = "ram", verify: bool = True) -> None:
    """Loads the artifact, which makes all of its weights. Raises HetcompError if one has another hash than the bytes
    that compiling made."""
    Runtime.load(folder / "fake.hetc", weights=weights, verify_weights=verify, threads=2).close()
