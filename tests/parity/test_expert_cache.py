"""Experts that come into slots of the GPU and leave them while decoding give what experts that stay give: whole
artifacts on the emulated GPU against transformers in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import hetcomp
from hetcomp.errors import HetcompError
from hetcomp.executable import Executable
from hetcomp.hardware.figures import BandwidthPoint
from hetcomp.hardware.profile import HardwareProfile
from hetcomp.ir.plan import Plan
from hetcomp.passes import cache_experts, pipeline
from hetcomp.passes.expert_statistics import check_statistics, parse_statistics
from hetcomp.passes.memory_table import GPU_RESERVE
from hetcomp.plan_wishes import PlanWishes
from tests.parity.test_families import TOLERANCE, reference_logits, relative_error
from tests.reference.emulated_gpu import emulated_gpu
from tests.reference.plan_builder import avx2_machine, gpu
from tests.reference.tiny_models import save_tiny, token_ids
from tests.sampled_cases import rest

PROMPT, DECODED, CONTEXT = 6, 20, 40


@dataclass(frozen=True)
class Case:
    """``slots`` of the eight experts of each layer; None: all."""

    family: str
    policy: str
    slots: int | None

    def __str__(self) -> str:
        return f"{self.family}-{self.policy}-{self.slots}"


CASES = [
    Case("qwen3_moe", "lru", None),
    Case("gpt_oss", "lru", 4),  # biases are copied with their matrices
    Case("deepseek_v3", "lfu", 4),  # shared experts beside, and a dense layer before
]
MORE = [Case("qwen3_moe", "lru", 3), Case("qwen3_moe", "lfu", 2)]


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets how many slots a plan has, and lets as much be copied as the policy wants."""

    def put(wanted: int | None) -> None:
        real = cache_experts.cache_experts.function

        def function(plan: Plan, context: cache_experts.Context) -> Plan:
            made = real(plan, context)
            cache = made.expert_cache
            if cache is None or wanted is None:
                return made
            first = tuple(row[:wanted] for row in cache.first)
            gpus = tuple(replace(on, slots=wanted, bytes_per_step=1 << 30) for on in cache.gpus)
            return replace(made, expert_cache=replace(cache, gpus=gpus, first=first))

        patched = replace(cache_experts.cache_experts, function=function)
        passes = tuple(patched if p.name == "cache_experts" else p for p in pipeline.PIPELINE)
        monkeypatch.setattr(pipeline, "PIPELINE", passes)

    return put


def machine(gpus: int = 1) -> HardwareProfile:
    """A slow CPU beside GPUs with room for everything."""
    plain = avx2_machine(1)
    slow = BandwidthPoint(threads=4, gb_per_s=0.01)
    of_nodes = tuple(node.model_copy(update={"read_bandwidth": (slow,)}) for node in plain.nodes)
    return plain.model_copy(update={"gpus": (gpu(),) * gpus, "nodes": of_nodes})


def build(folder: Path, policy: str, pins: tuple[str, ...] = ("*=gpu:0",), gpus: int = 1) -> Executable:
    return hetcomp.compile(
        folder / "hf",
        machine(gpus),
        formats="f32",
        context_length=CONTEXT,
        max_batch=2,
        out=folder / f"{policy}.hetc",
        isa=("avx2",),
        wishes=PlanWishes(pins=pins, expert_cache=policy),
    )


def sticky_ids(model: PreTrainedModel) -> torch.Tensor:
    """A prompt, and two tokens that are repeated, so that some experts are not chosen for long."""
    ids = token_ids(model, PROMPT + DECODED)
    ids[0, PROMPT : PROMPT + DECODED // 2] = ids[0, PROMPT]
    ids[0, PROMPT + DECODED // 2 :] = ids[0, -1]
    return ids


def decoded(exe: Executable, ids: np.ndarray) -> np.ndarray:
    """Logits of each position from the prompt's last on."""
    with exe.runtime.session() as session:
        rows = [session.prefill(ids[:PROMPT].tolist())]
        rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[PROMPT:]]
    return np.stack(rows)


def choices(model: PreTrainedModel, exe: Executable, tokens: int) -> int:
    """Experts that tokens choose in all layers with a cache."""
    assert exe.plan.expert_cache is not None
    return tokens * len(exe.plan.expert_cache.first) * int(model.config.num_experts_per_tok)


@pytest.mark.parametrize("case", [*CASES, *rest(MORE)], ids=str)
def test_a_long_decode_under_swaps_gives_the_logits_of_transformers(case: Case, tmp_path: Path, slots):
    slots(case.slots)
    model = save_tiny(case.family, tmp_path / "hf", odd=False)
    ids = sticky_ids(model)
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, case.policy)
        rows = decoded(exe, ids[0].numpy())
        stats = exe.stats["gpu"]["cache"]
        exe.runtime.close()
    want = reference_logits(model, ids)[PROMPT - 1 :]
    assert relative_error(rows, want) < TOLERANCE
    assert stats["hits"] + stats["misses"] == choices(model, exe, DECODED)
    assert stats["hit_rate"] == pytest.approx(stats["hits"] / choices(model, exe, DECODED))
    if case.slots is None:
        assert stats["misses"] == stats["swaps"] == 0
    else:
        # What stayed behind the prompt needs no swap.
        assert stats["hits"] > 0 and stats["misses"] > 0 and stats["swaps"] > 0 and stats["swaps"] + stats["kept"] >= 3
        assert exe.plan.expert_cache is not None
        per_expert = stats["bytes"] / stats["swaps"]
        # Panels of 16 rows make a slot no smaller than an expert's numbers.
        assert per_expert >= 4 * 3 * 32 * 64


def test_it_gives_what_a_static_placement_gives_in_every_kind_of_step(tmp_path: Path, slots):
    """Prompts between, batches of two, a session that ends: as without a cache."""
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    texts = [token_ids(model, 40, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    found = []
    with emulated_gpu(compute_capability=89):
        for policy, pins in (("static", ("*=gpu:0", "moe.experts=cpu")), ("lfu", ("*=gpu:0",))):
            exe = build(tmp_path, policy, pins)
            rows = []
            first, second = exe.runtime.session(), exe.runtime.session()
            rows.append(first.prefill(texts[0][:20]))
            rows.append(second.prefill(texts[1][:3]))
            for t in range(20, 40):
                rows += list(exe.runtime.decode([first, second], [texts[0][t], texts[1][t - 17]]))
            second.close()
            third = exe.runtime.session()
            rows.append(third.prefill(texts[2][:35]))
            for t in range(35, 40):
                rows += list(exe.runtime.decode([third], [texts[2][t]]))
            found.append(np.stack(rows))
            stats = exe.stats["gpu"]
            exe.runtime.close()
            assert policy == "static" or stats["cache"]["swaps"] >= 3
            assert "cache" not in stats or policy != "static"
    assert relative_error(found[1], found[0]) < TOLERANCE


def test_each_of_two_gpus_keeps_experts_of_its_own_layers(tmp_path: Path, slots):
    """Under prompts, batches and swaps; the counts are those of all layers, in the model's order."""
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids = sticky_ids(model)
    with emulated_gpu(compute_capability=89, devices=2):
        exe = build(tmp_path, "lfu", ("*@0=gpu:1", "*@1=gpu:0", "*@2=gpu:1"), gpus=2)
        assert exe.plan.expert_cache is not None
        assert [on.gpu for on in exe.plan.expert_cache.gpus] == ["gpu:0", "gpu:1"]
        exe.count_experts()
        rows = decoded(exe, ids[0].numpy())
        stats, counts = exe.stats["gpu"]["cache"], json.loads(exe.expert_statistics())
        exe.runtime.reset_stats()
        assert not any(exe.stats["gpu"]["cache"].values())
        exe.runtime.close()
    assert relative_error(rows, reference_logits(model, ids)[PROMPT - 1 :]) < TOLERANCE
    assert stats["hits"] + stats["misses"] == choices(model, exe, DECODED)
    assert stats["hits"] > 0 and stats["misses"] > 0 and stats["swaps"] >= 3
    assert counts["frequency"] == chosen_by_routers(model, ids) and counts["tokens"] == PROMPT + DECODED


@pytest.mark.exhaustive
def test_the_same_steps_give_the_same_bytes_and_swaps(tmp_path: Path, slots):
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids = sticky_ids(model)[0].numpy()
    found = []
    with emulated_gpu(compute_capability=89):
        path = build(tmp_path, "lfu").path
        for _ in range(2):
            exe = hetcomp.load(path)
            found.append((decoded(exe, ids).tobytes(), exe.stats["gpu"]["cache"]))
            exe.runtime.close()
    assert found[0] == found[1] and found[0][1]["swaps"] > 0


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_experts_that_a_prompt_streams_stay_for_the_tokens_behind_it(policy: str, tmp_path: Path, slots):
    """A prompt whose second half repeats a token, which is then decoded as well."""
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids, prompt = token_ids(model, 38), 32
    ids[0, prompt // 2 :] = ids[0, -1]
    found = []
    with emulated_gpu(compute_capability=89):
        path = build(tmp_path, policy).path
        for _ in range(2):
            exe = hetcomp.load(path)
            with exe.runtime.session() as session:
                rows = [session.prefill(ids[0, :prompt].tolist())]
                after = exe.stats["gpu"]["cache"]
                rows += [exe.runtime.decode([session], [int(i)])[0] for i in ids[0, prompt:]]
            found.append((np.stack(rows), exe.stats["gpu"]["cache"]))
            exe.runtime.close()
    assert after["kept"] > 0 and after["bytes"] == after["swaps"] == after["hits"] == 0
    assert relative_error(found[0][0], reference_logits(model, ids)[prompt - 1 :]) < TOLERANCE
    assert found[0][0].tobytes() == found[1][0].tobytes() and found[0][1] == found[1][1]
    stats = found[0][1]
    assert stats["kept"] == after["kept"] and stats["hits"] > stats["misses"]


def test_where_pinning_is_refused_experts_come_through_a_ring(tmp_path: Path, slots):
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids = token_ids(model, PROMPT + DECODED)[0].numpy()
    found = []
    for refuse in (False, True):
        with emulated_gpu(compute_capability=89, refuse_pinning=refuse):
            exe = hetcomp.load(tmp_path / "lru.hetc") if found else build(tmp_path, "lru")
            found.append((decoded(exe, ids).tobytes(), exe.stats["gpu"]["cache"]))
            exe.runtime.close()
    assert found[0] == found[1] and found[0][1]["swaps"] > 0


def test_where_nothing_can_be_pinned_the_experts_in_slots_stay(tmp_path: Path, slots):
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids = token_ids(model, PROMPT + DECODED)
    with emulated_gpu(compute_capability=89, refuse_pinning=True, most_pinned=1 << 20):
        exe = build(tmp_path, "lru")
        rows = decoded(exe, ids[0].numpy())
        stats = exe.stats
        exe.runtime.close()
    assert relative_error(rows, reference_logits(model, ids)[PROMPT - 1 :]) < TOLERANCE
    assert stats["gpu"]["cache"]["swaps"] == 0 and stats["gpu"]["cache"]["hits"] > 0
    assert any("cannot be pinned" in note and "exchanged" in note for note in stats["notes"])


@torch.no_grad()
def chosen_by_routers(model: PreTrainedModel, ids: torch.Tensor) -> list[list[int]]:
    """By layer and expert: how many of the tokens choose it."""
    routers = model(input_ids=ids, output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok).indices.ravel() for layer in routers]
    return [torch.bincount(layer, minlength=8).tolist() for layer in chosen]


def test_counts_of_a_run_are_those_of_the_routers_and_a_file_of_statistics(tmp_path: Path, slots):
    slots(3)
    model = save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    ids = token_ids(model, PROMPT + 4)
    with emulated_gpu(compute_capability=89):
        exe = build(tmp_path, "lfu")
        exe.count_experts()
        decoded(exe, ids[0].numpy())
        text = exe.expert_statistics()
        exe.runtime.close()
    check_statistics(parse_statistics(text, "counts"), exe.plan)
    assert json.loads(text)["frequency"] == chosen_by_routers(model, ids)
    assert json.loads(text)["tokens"] == PROMPT + 4


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"pins": ("*=gpu:0", "moe.experts@1=gpu:0")}, "moe.experts@1=gpu:0"),
        ({"pins": ("*=cpu",)}, "needs a GPU"),
        ({"vram": 0, "pins": ()}, "needs a GPU"),
        ({"expert_cache": "mru"}, "static, lru, lfu"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused_in_a_sentence(wish, words, tmp_path: Path):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    wishes = PlanWishes(**{"pins": ("*=gpu:0",), "expert_cache": "lru"} | wish)
    with pytest.raises(HetcompError, match=words.replace("*", r"\*")):
        hetcomp.compile(
            tmp_path / "hf", machine(), formats="f32", out=tmp_path / "no.hetc", isa=("avx2",), wishes=wishes
        )
    assert not (tmp_path / "no.hetc").exists()


def test_without_room_for_streams_or_slots_it_is_refused(tmp_path: Path):
    save_tiny("qwen3_moe", tmp_path / "hf", odd=False)
    wishes = PlanWishes(pins=("*=gpu:0",), expert_cache="lru", vram=GPU_RESERVE + (1 << 20))
    with pytest.raises(HetcompError, match="expert-cache lru needs room on the GPU"):
        hetcomp.compile(
            tmp_path / "hf", machine(), formats="f32", context_length=CONTEXT, out=tmp_path / "no.hetc", wishes=wishes
        )
    assert not (tmp_path / "no.hetc").exists()
