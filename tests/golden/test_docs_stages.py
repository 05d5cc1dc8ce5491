"""docs/stages: one MoE layer at every stage; `pytest tests/golden --update-golden` makes the files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hetcomp import frontend
from hetcomp.backends.program import render_program
from hetcomp.backends.protocol import Isa
from hetcomp.backends.select_kernels import CpuTarget, default_backends, select_kernels
from hetcomp.frontend.source import resolve
from hetcomp.frontend.trace import meta_model, trace
from hetcomp.frontend.traced_model import module_path
from hetcomp.hardware.profile import load_profile
from hetcomp.ir.plan import Plan, Template
from hetcomp.ir.printer import print_plan, print_template
from hetcomp.passes.context import Context, FormatRequest
from hetcomp.passes.pipeline import run_pipeline
from tests.reference import tiny_models

STAGES = Path(__file__).resolve().parents[2] / "docs" / "stages"
PROFILE = Path(__file__).with_name("desktop_profile.json")
LAYER = 1
CONTEXT = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "tiny-qwen3-moe"
    tiny_models.save_tiny("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def imported(checkpoint: Path) -> frontend.Imported:
    return frontend.load(checkpoint, context_length=CONTEXT, max_batch=1, max_tokens=64, max_logit_rows=8)


@pytest.fixture(scope="module")
def context(imported: frontend.Imported) -> Context:
    target = CpuTarget((Isa.AVX512,), default_backends())
    return Context(load_profile(str(PROFILE)), imported.checkpoint, target, FormatRequest.parse("bf16"))


@pytest.fixture(scope="module")
def planned(imported: frontend.Imported, context: Context) -> Plan:
    return run_pipeline(imported.plan, context)


def _moe_template(plan: Plan) -> Template:
    return next(t for t in plan.templates if any(op.kind == "moe_experts" for op in t.ops))


def _template_and_call(plan: Plan) -> str:
    """The layer's template, and the first call of it as the whole plan prints it."""
    template = _moe_template(plan)
    lines = print_plan(plan).splitlines()
    calls = lines[next(i for i, line in enumerate(lines) if line.startswith("calls (")) + 1 :]
    start = next(i for i, line in enumerate(calls) if line.startswith(f"  {template.name} layer {LAYER}("))
    end = next((i for i in range(start + 1, len(calls)) if not calls[i].startswith("    ")), len(calls))
    return print_template(template) + "\n" + "\n".join(calls[start:end]) + "\n"


def _without_hashes(source: str) -> str:
    """Kernel names without the hash of their contents."""
    return re.sub(r"(_avx512)_[0-9a-f]{12,}", r"\1", source)


def _function(source: str, start: str) -> str:
    """The C++ function or template whose definition starts so, with the comment above it."""
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start) and not line.endswith(";"))
    last = lines.index("}", first)
    while lines[first - 1].startswith(("//", "template <")):
        first -= 1
    return "\n".join(lines[first : last + 1]) + "\n"


def test_graph(golden, checkpoint):
    source = resolve(checkpoint)
    traced = trace(meta_model(source.model_class, source.config), CONTEXT)
    inside = [
        node for node in traced.graph.nodes if node.op == "call_function" and f"layers.{LAYER}" in module_path(node)
    ]
    lines = []
    for node in inside:
        value = node.meta.get("val")
        shape = f" : [{', '.join(map(str, value.shape))}]" if hasattr(value, "shape") else ""
        arguments = ", ".join(traced.fqns.get(str(a), str(a)) for a in node.args)
        lines.append(f"%{node.name} = {node.target}({arguments}){shape}")
    # torch numbers its symbols as it likes; the only one here is the number of tokens.
    golden(STAGES / "1-graph.txt", re.sub(r"\bs\d+\b", "T", "\n".join(lines)) + "\n")


def test_lowered(golden, imported):
    golden(STAGES / "2-lowered.txt", _template_and_call(imported.plan))


def test_placed(golden, imported, context):
    golden(STAGES / "3-placed.txt", _template_and_call(run_pipeline(imported.plan, context, stop_after="place")))


def test_scheduled(golden, planned):
    golden(STAGES / "4-scheduled.txt", _template_and_call(planned))


def test_program_and_kernel(golden, planned, context):
    kernels = select_kernels(planned, context.target, Isa.AVX512)
    template = _moe_template(planned)
    program = render_program(planned, kernels, Isa.AVX512, plan_hash="0" * 64).splitlines()
    start = next(i for i, line in enumerate(program) if line.startswith(f"// {template.name}: "))
    end = program.index("}", start)
    golden(STAGES / "5-program.txt", _without_hashes("\n".join(program[start : end + 1])) + "\n")
    experts = next(op for op in template.ops if op.kind == "moe_experts")
    source = kernels[template.name, experts.id].source
    few_tokens = "// Shortened: the path of one to eight tokens and the entry.\n\n" + "\n".join(
        _function(source, name)
        for name in ("void few_gate_up_tasks(", "void few_down_run(", "void few(", "void moe_experts_")
    )
    golden(STAGES / "6-kernel.txt", _without_hashes(few_tokens))
