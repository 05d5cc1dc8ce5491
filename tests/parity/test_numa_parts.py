"""Artifacts for two NUMA nodes, run here, against transformers: cuts with and without biases, experts as a whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import hetcomp
from tests.parity.test_families import CONTEXT, TOLERANCE, reference_logits, relative_error
from tests.reference.plan_builder import GIB, avx2_machine
from tests.reference.tiny_models import save_tiny, token_ids


def check(path, model) -> None:
    ids = token_ids(model, 33)
    with torch.no_grad():
        want = reference_logits(model, ids)
    for threads in (1, 2):  # both nodes' parts by one thread, and a thread for each
        exe = hetcomp.load(path, threads=threads)
        assert len(exe.stats["nodes"]) == 2
        assert relative_error(exe(ids[0].tolist()), want) < TOLERANCE
        decoded = exe.runtime.session()
        decoded.prefill(ids[0, :-1].tolist())
        last = exe.runtime.decode([decoded], [int(ids[0, -1])])[0]
        decoded.close()
        assert relative_error(last, want[-1]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param(
            "qwen3_moe", {"moe_intermediate_size": 96, "tie_word_embeddings": False}, marks=pytest.mark.exhaustive
        ),
        ("gpt_oss", {"intermediate_size": 96}),  # biases everywhere
        ("deepseek_v3", {"moe_intermediate_size": 72, "odd": True}),  # MLA, a shared expert, a last slice of 8 columns
    ],
)
def test_cut_weights(family, sizes, tmp_path):
    model = save_tiny(family, tmp_path / "hf", **sizes)
    hetcomp.compile(tmp_path / "hf", avx2_machine(2), formats="f32", context_length=CONTEXT, out=tmp_path / "two.hetc")
    names = {w["name"] for w in json.loads((tmp_path / "two.hetc" / "manifest.json").read_text())["weights"]}
    assert {name.rpartition("@")[2] for name in names if "experts" in name and "@" in name} == {"0", "1"}
    check(tmp_path / "two.hetc", model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "memory"),
    [
        pytest.param("qwen3_moe", (8 * GIB, 400_000), marks=pytest.mark.exhaustive),
        ("qwen3_moe", (700_000, 8 * GIB)),  # of some layers all experts are on the other node
        ("gpt_oss", (8 * GIB, 400_000)),
    ],
)
def test_experts_as_a_whole(family, memory, tmp_path):
    sizes = {"intermediate_size": 96} if family == "gpt_oss" else {"moe_intermediate_size": 96}
    model = save_tiny(family, tmp_path / "hf", **sizes)
    exe = hetcomp.compile(
        tmp_path / "hf",
        avx2_machine(2, memory),
        formats="f32",
        context_length=CONTEXT,
        out=tmp_path / "two.hetc",
    )
    homes = [{r.device for r in p.experts} for call in exe.plan.calls for _, p in call.placements if p.experts]
    assert {"cpu:0", "cpu:1"} in homes
    check(tmp_path / "two.hetc", model)


@pytest.mark.slow
def test_a_program_freed_while_another_load_of_it_lives_is_not_mistaken_for_the_next(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "hf")
    paths = [tmp_path / "f32.hetc", tmp_path / "bf16.hetc"]
    for path in paths:
        hetcomp.compile(tmp_path / "hf", formats=path.stem, context_length=CONTEXT, out=path)
    first, second = hetcomp.load(paths[0]), hetcomp.load(paths[0])
    before = second([5, 6, 7])
    del first
    other = hetcomp.load(paths[1])([5, 6, 7])  # takes the freed descriptor
    assert np.array_equal(second([5, 6, 7]), before) and not np.array_equal(other, before)
