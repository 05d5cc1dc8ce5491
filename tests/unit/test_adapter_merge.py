"""Compiling with an adapter: what is refused, what the plan says, and that nothing is left out unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hetcomp.adapters.base_model import BaseModel, import_base
from hetcomp.adapters.bind_adapter import read_adapter
from hetcomp.adapters.merge import MergedReader, adapter_to_merge
from hetcomp.backends.cut_weights import CutReader
from hetcomp.backends.gpu.gpu_program import lower_programs
from hetcomp.backends.gpu.tile_choices import choices_of
from hetcomp.backends.pack_weights import WeightPacker
from hetcomp.backends.program import ProgramLayout
from hetcomp.build_artifact import all_cuts
from hetcomp.cli.main import app
from hetcomp.compiler import plan_model
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.ir.plan import ValueKind
from hetcomp.ir.serialise import from_json, to_json
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.quantised_checkpoints import write
from tests.reference.tiny_models import build, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a Qwen3-MoE (hf), an adapter of everything (adapter) and a profile (machine.json)."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("qwen3_moe", folder / "hf")
    make_adapter(build("qwen3_moe"), folder / "adapter", **everything("qwen3_moe"))
    (folder / "machine.json").write_text(avx2_machine(1).model_dump_json(by_alias=True))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--adapter", "adapter"), "is merged into its weights: add --merge"),
        (("--merge",), "no adapter to merge"),
        (("--adapter", "adapter", "--adapter", "adapter", "--merge"), "One adapter can be merged, 2"),
        (("--adapter", "adapter", "--merge", "--defer", "auto"), "without adapter adapter"),
        (("--adapter", "hf", "--merge"), "not a PEFT adapter"),
    ],
)
def test_compile_refuses(options, named, tiny, tmp_path):
    options = [tiny / option if option in ("adapter", "hf") else option for option in options]
    result = run("compile", tiny / "hf", "-o", tmp_path / "out.hetc", "--hw", tiny / "machine.json", *options)
    assert result.exit_code == 1 and named in result.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_quantised_checkpoints_are_refused(tiny, tmp_path):
    def codes(weight: torch.Tensor):
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}, weight

    quantised, _ = write(tmp_path, "qwen3_moe", {"quant_method": "fp8", "weight_block_size": [128, 128]}, codes)
    with pytest.raises(HetcompError, match=r"adapter cannot be merged: .*q_proj\.weight in .* is stored as F8_E4M3"):
        plan_model(quantised, hw_profile=avx2_machine(1), adapters=[tiny / "adapter"], merge=True)


def test_the_plan_says_what_is_merged(tiny, tmp_path):
    options = ["--hw", tiny / "machine.json", "--adapter", tiny / "adapter", "--merge"]
    result = run("plan", tiny / "hf", *options, "--no-improvements", "--plan-out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    text = result.output.replace("\n", " ")
    assert "adapter adapter (sha256" in text and "6 gate_up" not in text and "3 gate_up_proj (rank 3)" in text
    plan = from_json((tmp_path / "plan.json").read_text())
    assert plan.adapters[0].merged and len(plan.adapters[0].targets) == 18
    assert from_json(to_json(plan)) == plan
    document = json.loads(run("plan", tiny / "hf", *options, "--no-improvements", "--json").stdout)
    assert document["adapters"][0]["sha256"] == plan.adapters[0].sha256
    result = run("plan", tiny / "hf", *options, "--stop-after", "attach_lora")
    assert "merged into 18 weights" in result.output and "formats_chosen" not in result.output
    # The plan of one adapter is not compiled with another, or with none.
    result = run(
        "compile",
        tiny / "hf",
        "-o",
        tmp_path / "x.hetc",
        "--hw",
        tiny / "machine.json",
        "--plan",
        tmp_path / "plan.json",
    )
    assert result.exit_code == 1 and "other adapters" in result.output


def test_a_delta_that_is_not_read_is_noticed(tiny):
    imported = import_base(tiny / "hf")
    adapter = adapter_to_merge([tiny / "adapter"], True, imported)
    assert adapter is not None and imported.checkpoint is not None
    reader = MergedReader(imported.checkpoint, adapter)
    weights = [v for v in imported.plan.values if v.kind is ValueKind.WEIGHT]
    for value in weights[1:]:
        reader.read(value)
    assert weights[0].fqn not in adapter.weights
    assert [w.fqn for w in reader.report()] == list(adapter.weights)
    forgetful = MergedReader(imported.checkpoint, adapter)
    for value in weights:
        if value.fqn in adapter.weights and len(value.type.shape) == 3:
            for expert in range(1, int(value.type.shape[0])):
                forgetful.read_expert(value, expert)
        else:
            forgetful.read(value)
    with pytest.raises(HetcompError, match=r"not merged into all of model\.layers\.0\.mlp\.experts"):
        forgetful.report()


@pytest.mark.parametrize(
    ("family", "pins", "vram"),
    [
        ("gpt_oss", (), GPU_RESERVE + 900_000),  # about half of the experts on the GPU
        ("deepseek_v3", ("*=gpu:0", "moe.experts=cpu"), None),
        ("deepseek_v3", ("*=cpu",), None),
    ],
)
def test_nothing_is_left_out_where_weights_are_cut(family, pins, vram, tmp_path):
    """Experts on both devices and weights cut over two NUMA nodes: all that is packed together has the whole delta."""
    save_tiny(family, tmp_path / "hf")
    make_adapter(build(family), tmp_path / "a", **everything(family))
    plain = avx2_machine(2)
    slow = BandwidthPoint(threads=4, gb_per_s=0.01)  # what is not pinned goes to the GPU
    nodes = tuple(node.model_copy(update={"read_bandwidth": (slow,)}) for node in plain.nodes)
    planned = plan_model(
        tmp_path / "hf",
        hw_profile=plain.model_copy(update={"gpus": (gpu(),), "nodes": nodes}),
        context_length=32,
        formats="f32",
        wishes=PlanWishes(pins=pins, vram=vram),
        adapters=[tmp_path / "a"],
        merge=True,
    )
    programs = lower_programs(planned.plan, choices_of([]))
    assert (not programs) == (pins == ("*=cpu",))
    placements = [p for call in planned.plan.calls for _, p in call.placements]
    assert bool(vram) == any(len({run.device.partition(":")[0] for run in p.experts}) > 1 for p in placements)
    assert planned.imported.checkpoint is not None and planned.adapter is not None
    reader = MergedReader(planned.imported.checkpoint, planned.adapter)
    packer = WeightPacker(CutReader(reader, all_cuts(planned.plan)))
    for _ in packer.chunks(
        [*ProgramLayout.of(planned.plan).weights, *(w for program in programs for w in program.weights)]
    ):
        pass
    assert len(reader.report()) == len(planned.adapter.weights)


def test_terms_that_cancel_each_other_are_no_missing_delta(tiny, tmp_path):
    """B A = 0 from terms of norm one: what is added is the rounding of these, not nothing."""
    shutil.copytree(tiny / "adapter", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in [n for n in tensors if "q_proj.lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        tensors[name] = tensors[name][:1].repeat(3, 1) * torch.tensor([[1.0], [1.0], [1.0]])
        tensors[other] = tensors[other][:, :1] * torch.tensor([[1 / 3, 1 / 3, -2 / 3]])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    imported = import_base(tiny / "hf")
    adapter = read_adapter(tmp_path / "a", BaseModel.of(imported))
    assert imported.checkpoint is not None
    reader = MergedReader(imported.checkpoint, adapter)
    for value in imported.plan.values:
        if value.kind is ValueKind.WEIGHT:
            reader.read(value)
    assert len(reader.report()) == len(adapter.weights)


def test_numbers_are_those_of_the_checkpoint_plus_the_delta(tiny):
    imported = import_base(tiny / "hf")
    adapter = read_adapter(tiny / "adapter", BaseModel.of(imported))
    assert imported.checkpoint is not None
    reader = MergedReader(imported.checkpoint, adapter)
    for value in imported.plan.values:
        if value.kind is not ValueKind.WEIGHT:
            continue
        before, after = imported.checkpoint.read(value), reader.read(value)
        weight = adapter.weights.get(value.fqn or "")
        if weight is None:
            np.testing.assert_array_equal(before, after)
        elif weight.experts is None:
            np.testing.assert_allclose(after, before + weight.delta(), rtol=1e-6)
        else:
            np.testing.assert_allclose(after[3], before[3] + weight.delta(3), rtol=1e-6)


def test_wishes_are_kept_beside_an_adapter(tiny: Path):
    planned = plan_model(
        tiny / "hf",
        hw_profile=avx2_machine(1),
        adapters=[tiny / "adapter"],
        merge=True,
        wishes=PlanWishes(vram=0),
    )
    assert planned.adapter is not None and planned.plan.adapters[0].name == "adapter"
