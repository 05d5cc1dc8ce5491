"""Files of mapped weights that cannot be read while a model is open: requests are refused, and right again with the
files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import hetcomp
from hetcomp.plan_wishes import PlanWishes
from hetcomp.runtime import Runtime
from hetcomp.runtime_abi import RuntimeRefusal, Status
from tests.parity.test_from_disk import machine
from tests.reference.tiny_models import save_tiny

PROMPT = [5, 17, 99, 3, 42, 7]


def tokens(runtime: Runtime) -> list[int]:
    with runtime.session() as session:
        return [token.id for token in session.generate(PROMPT, max_new_tokens=5, ignore_eos=True)]


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_file_that_is_cut_refuses_requests_until_it_is_whole(from_disk: bool, tmp_path: Path):
    save_tiny("qwen3_moe", tmp_path / "hf", intermediate_size=256, moe_intermediate_size=256)
    folder = str(tmp_path / "hf")
    exe = hetcomp.compile(
        folder,
        machine(100_000 if from_disk else -10_000_000, folder, ("*=cpu",)),
        formats="f32",
        out=tmp_path / "tiny.hetc",
        isa=("avx2",),
        max_batch=2,
        wishes=PlanWishes(pins=("*=cpu",), from_disk=from_disk),
    )
    exe.runtime.close()
    runtime = hetcomp.load(tmp_path / "tiny.hetc", weights="mmap", threads=2).runtime
    expected = tokens(runtime)
    files = sorted((tmp_path / "tiny.hetc").glob("weights-*.safetensors"))
    content = files[-1].read_bytes()
    with runtime.session() as held:
        held.forward(PROMPT[:3])
        for _ in range(2):
            os.truncate(files[-1], 0)
            for ask in (lambda: tokens(runtime), lambda: held.forward(PROMPT[3:])):
                with pytest.raises(RuntimeRefusal, match="could not be read at byte") as refused:
                    ask()
                assert refused.value.status == Status.IO
                assert f"{files[-1]} " in str(refused.value) and "was cut to 0 of" in str(refused.value)
            with files[-1].open("r+b") as file:
                file.write(content)
            assert tokens(runtime) == expected
        whole = runtime.forward(PROMPT)
        assert len(held) == 3
        np.testing.assert_array_equal(held.forward(PROMPT[3:]), whole[3:])
    runtime.close()
