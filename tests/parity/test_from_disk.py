"""Models whose experts stay on the disk: the same numbers as with all of them in memory, mapped or not."""

from __future__ import annotations

import json

import pytest

import hetcomp
from hetcomp.compiler import plan_model
from hetcomp.hardware.figures import Disk, Source
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.passes.disk_reads import resident_bytes
from hetcomp.passes.memory_table import expert_weight_bytes
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids

FEW, MANY = 3, 40  # tokens of a step: both ways to compute experts
PINS = {"cpu": ("*=cpu",), "experts on the cpu": ("*=gpu:0", "moe.experts=cpu")}


def machine(missing: int, folder: str, pins: tuple[str, ...]) -> HardwareProfile:
    """With ``missing`` bytes less than what the model needs of the CPU's memory."""
    gpus = () if pins == PINS["cpu"] else (gpu(),)
    disk = Disk(path="/", gb_per_s=1.0, source=Source.MEASURED)
    made = avx2_machine(1).model_copy(update={"gpus": gpus, "disk": disk})
    whole = plan_model(folder, hw_profile=made, formats="f32", isa=("avx2",), wishes=PlanWishes(pins=pins))
    needed = resident_bytes(whole.plan, whole.context) + expert_weight_bytes(whole.plan, whole.context)
    node = made.nodes[0].model_copy(update={"available_bytes": needed - missing})
    return made.model_copy(update={"nodes": (node,)})


@pytest.mark.parametrize("where", PINS)
def test_logits_are_the_models(where, tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "hf", intermediate_size=256, moe_intermediate_size=256)
    folder = str(tmp_path / "hf")
    with emulated_gpu(compute_capability=89):
        exe = hetcomp.compile(
            folder,
            machine(100_000, folder, PINS[where]),
            formats="f32",
            out=tmp_path / "tiny.hetc",
            isa=("avx2",),
            wishes=PlanWishes(pins=PINS[where], from_disk=True),
        )
        exe.runtime.close()
        marked = [
            w["name"]
            for w in json.loads((tmp_path / "tiny.hetc/manifest.json").read_text())["weights"]
            if "on_demand" in w
        ]
        assert marked and all("experts" in name for name in marked)
        for weights in ("mmap", "ram"):
            loaded = hetcomp.load(tmp_path / "tiny.hetc", weights=weights)
            for n in (FEW, MANY):
                ids = token_ids(model, n, seed=n)
                assert relative_error(loaded(ids[0]), reference_logits(model, ids)) < TOLERANCE
            loaded.runtime.close()


def test_experts_that_fit_after_all_are_no_exception(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "hf")
    exe = hetcomp.compile(
        str(tmp_path / "hf"), avx2_machine(1), formats="f32", out=tmp_path / "a.hetc", isa=("avx2",),
        wishes=PlanWishes(from_disk=True),
    )  # fmt: skip
    assert "on_demand" not in (tmp_path / "a.hetc/manifest.json").read_text()
    ids = token_ids(model, 5, seed=1)
    assert relative_error(exe(ids[0]), reference_logits(model, ids)) < TOLERANCE
    exe.runtime.close()
