"""A token's logits do not depend on how many others are decoded beside it: programs of the CPU alone, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hetcomp
from hetcomp.backends.cpu_isa import cpu_isa
from hetcomp.backends.protocol import Isa
from hetcomp.plan_wishes import PlanWishes
from hetcomp.runtime import Runtime
from tests.parity.test_deferral import ROUNDING
from tests.parity.test_families import relative_error
from tests.reference.kernel_harness import isas_here
from tests.reference.plan_builder import avx2_machine
from tests.reference.tiny_models import save_tiny, token_ids

ISAS, BATCH = (Isa.AVX2, Isa.AVX512), 5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model of whose plan deferral is wished, for which there is no GPU to wait for, and texts."""
    folder = tmp_path_factory.mktemp("sizes")
    model = save_tiny("qwen3_moe", folder / "hf", odd=True)
    exe = hetcomp.compile(
        folder / "hf",
        avx2_machine(1),
        formats="f32",
        context_length=32,
        max_batch=BATCH,
        out=folder / "tiny.hetc",
        isa=tuple(isa.value for isa in ISAS),
        wishes=PlanWishes(deferral=2),
    )
    assert "nothing to defer" in exe.plan.notes[-1]
    return exe.path, [token_ids(model, n + 2, seed=n)[0].tolist() for n in range(BATCH)]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_batches_of_all_sizes(artifact: tuple[Path, list[list[int]]], isa: Isa):
    """In any company bit for bit what it is in another of the same size; and what it is alone, bit for bit up to the
    rows that linears multiply as they do one (experts: more), else but for rounding."""
    path, texts = artifact
    if isa not in isas_here():
        pytest.skip(f"this CPU has no {isa}")
    runtime = Runtime.load(path, isa=isa.value, threads=2)
    sessions = [runtime.session() for _ in texts]
    for session, text in zip(sessions, texts, strict=True):
        session.prefill(text[:-1])

    def decode(*members: int) -> list[np.ndarray]:
        rows = runtime.decode([sessions[m] for m in members], [texts[m][-1] for m in members])
        for member in members:
            sessions[member].truncate(len(sessions[member]) - 1)
        return list(rows)

    alone = [decode(member)[0] for member in range(BATCH)]
    facts = cpu_isa(isa)
    alike = min(facts.tuning("f32").gemv_rows, facts.pass_rows)
    for size in range(2, BATCH + 1):
        of_size: dict[int, bytes] = {}
        for first in range(BATCH):
            members = [(first + 2 * i) % BATCH for i in range(size)]
            for member, row in zip(members, decode(*members), strict=True):
                assert relative_error(row, alone[member]) < ROUNDING
                assert of_size.setdefault(member, row.tobytes()) == row.tobytes()
                assert size > alike or row.tobytes() == alone[member].tobytes()
    runtime.close()
