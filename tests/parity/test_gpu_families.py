"""Families with a GPU in the plan against transformers in float32: the kernels run in Triton's interpreter, the CPU's
part, the graphs and all hand-overs are real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

import hetcomp
from hetcomp.compiler import PlanWishes
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.passes.placement_problem import GPU_RESERVE
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids

CONTEXT = 32
MAX_BATCH = 3  # sequences; the graphs of exact rows are then for 1, 2 and 4
# The CPU's memory takes so long to read that what is not pinned goes to the GPU as long as it fits.
SLOW = BandwidthPoint(threads=4, gb_per_s=0.01)


@dataclass(frozen=True)
class Case:
    """A tiny model and where it is: all on the ``gpu``, its ``experts`` on the CPU, one ``layer`` on the CPU, or
    ``split``: about half of the experts in ``vram`` bytes."""

    family: str
    odd: bool
    placement: str
    vram: int = 0

    def __str__(self) -> str:
        return f"{self.family}{'-odd' if self.odd else ''}-{self.placement}"

    def compile(self, model: Path, out: Path) -> Executable:
        """The artifact for one node with AVX2 and one GPU."""
        pins = {
            "gpu": ("*=gpu:0",),
            "experts": ("*=gpu:0", "moe.experts=cpu"),
            "layer": ("*@0=gpu:0", "*@1=cpu", "*@2=gpu:0"),
            "split": (),
        }
        wishes = PlanWishes(pins=pins[self.placement], vram=GPU_RESERVE + self.vram if self.vram else None)
        node = avx2_machine(1).nodes[0].model_copy(update={"read_bandwidth": (SLOW,)})
        machine = avx2_machine(1).model_copy(update={"gpus": (gpu(),), "nodes": (node,)})
        return hetcomp.compile(
            model,
            machine,
            formats="f32",
            context_length=CONTEXT,
            max_batch=MAX_BATCH,
            out=out,
            isa=("avx2",),
            wishes=wishes,
        )


CASES = [
    Case("qwen3_moe", False, "gpu"),
    Case("mixtral", True, "gpu"),
    Case("gpt_oss", True, "gpu"),
    Case("deepseek_v3", True, "gpu"),
    Case("llama", True, "gpu"),
    Case("qwen3_moe", True, "experts"),
    Case("glm4_moe", True, "experts"),
    Case("deepseek_v3", False, "experts"),
    Case("qwen3", False, "layer"),
    Case("qwen2_moe", False, "split", 900_000),
    Case("gpt_oss", False, "split", 900_000),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Executable]]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(str(case))
    model = save_tiny(case.family, folder / "hf", odd=case.odd)
    with emulated_gpu(compute_capability=89):
        exe = case.compile(folder / "hf", folder / "tiny.hetc")
        if case.placement == "split":
            assert any(_is_split(exe, call) for call in range(len(exe.plan.calls)))
        yield model, exe
        exe.runtime.close()


def _is_split(exe: Executable, call: int) -> bool:
    placed = [p for _, p in exe.plan.calls[call].placements]
    return any(len({e.device for e in p.experts}) > 1 for p in placed)


@pytest.mark.slow
def test_a_prompt_of_several_tokens(pair):
    model, exe = pair
    ids = token_ids(model, 9)
    assert relative_error(exe(ids[0].tolist()), reference_logits(model, ids)) < TOLERANCE


@pytest.mark.slow
def test_decode_behind_a_prompt(pair):
    model, exe = pair
    ids = token_ids(model, 9, seed=3)
    with exe.runtime.session() as session:
        rows = [session.prefill(ids[0, :6].tolist())]
        rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, 6:]]
    assert relative_error(np.stack(rows), reference_logits(model, ids)[5:]) < TOLERANCE


@pytest.mark.slow
def test_sessions_of_different_lengths_in_one_batch(pair):
    """Three sessions in the graph of four rows, twice: what the fourth row writes shows in the second step."""
    model, exe = pair
    texts = [token_ids(model, n + 2, seed=n) for n in (1, 4, 7)]
    sessions = [exe.runtime.session() for _ in texts]
    for session, ids in zip(sessions, texts, strict=True):
        session.prefill(ids[0, :-2].tolist())
    for step in (-2, -1):
        rows = exe.runtime.decode(sessions, [int(ids[0, step]) for ids in texts])
        want = np.stack([reference_logits(model, ids)[step] for ids in texts])
        assert relative_error(rows, want) < TOLERANCE
    for session in sessions:
        session.close()
